"""What a layer does between its matmuls, in as few passes over memory as it takes.

`base` says what the operations are, `twin` does them readably in torch (on a CPU,
and as the reference in tests), `fused` with a Triton kernel each on CUDA.
`choose_operations` is the one place that decides.
"""

from tokenloom.worker.kernels.base import FAULTY, Operations
from tokenloom.worker.kernels.choose import choose_operations

__all__ = ["FAULTY", "Operations", "choose_operations"]
