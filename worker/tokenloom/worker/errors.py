"""The exceptions of a worker.

WorkerError
├── LoadError              the configuration cannot be served here; the process exits with 2
│   ├── UnsupportedModelError
│   ├── CheckpointError
│   └── PoolError
├── LinkError              the core does not let this process in; the process exits with 2
├── MeetingError           the ranks of an epoch do not meet; the process exits with 1
├── ProtocolError          a Step contradicts the ones before it; the process exits with 1
└── CudaError              a kernel cannot be compiled, loaded or launched
"""

from __future__ import annotations


class WorkerError(Exception):
    """Base of everything that a worker raises itself."""


class LoadError(WorkerError):
    """What Configure asks for cannot be loaded on this machine."""


class UnsupportedModelError(LoadError):
    """The checkpoint's config names an architecture or a feature that is not built."""


class CheckpointError(LoadError):
    """A file or a tensor of the checkpoint is missing, superfluous or misshapen."""


class PoolError(LoadError):
    """The memory left for the KV pool is too small."""


class LinkError(WorkerError):
    """There is no speaking with the core, and waiting would not change that."""


class MeetingError(WorkerError):
    """The other ranks of an epoch were not where they should be, or did not come."""


class ProtocolError(WorkerError):
    """A Step breaks the rules of tokenloom.wire.messages."""


class CudaError(WorkerError):
    """A call of the CUDA driver or of its compiler failed."""
