"""A worker that stands by: started, imports done, nothing held, until it is needed.

Imports are most of what the death of a worker costs beyond loading the model. The supervisor keeps
a process that has them behind it for each worker, and wakes it with a line on its standard input.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module

_SERVING = ("tokenloom.worker.runner", "tokenloom.worker.profile")
"""What every worker imports."""
_SERVING_ON_GPUS = (
    "tokenloom.worker.attention.widened",
    "tokenloom.worker.drawing.fused",
    "tokenloom.worker.kernels.fused",
    "tokenloom.worker.steps.ahead",
    "torch.distributed._symmetric_memory",
)
"""What is imported once there is a CUDA device. It takes no memory of one."""

_log = logging.getLogger(__name__)


def stand_by() -> bool:
    """Returns True when a line comes on standard input, False if it ends without one.

    Until then nothing is opened, and no device is touched.
    """
    _import(_SERVING)
    import torch  # noqa: PLC0415 - takes seconds

    if torch.version.cuda is not None:
        _import(_SERVING_ON_GPUS)
        _import_attention()
    return bool(sys.stdin.buffer.readline())


def _import(names: Sequence[str]) -> None:
    for name in names:
        try:
            import_module(name)
        except ImportError as error:  # whoever needs it says so in the end
            _log.debug("standing by without %s: %s", name, error)


def _import_attention() -> None:
    from tokenloom.worker.attention.flash import FlashAttention4  # noqa: PLC0415 - as above

    try:
        FlashAttention4().load()
    except Exception as error:  # noqa: BLE001 - of the package, which may be absent or unfit
        _log.debug("standing by without flash-attn-4: %s", error)
