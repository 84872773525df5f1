"""What a layer does beside attention, in as few passes over memory as it takes.

`base` says what the operations are, `twin` does them readably in torch (on a CPU,
and as the reference in tests), `fused` with a Triton kernel each on CUDA: for norms those of
`norms`, one of which sums over ranks in the same pass. `linear` multiplies dense matrices
with one row, `streamed` with more, up to 128, on Hopper, `eight_bit` those of 8 bits with
any, `four_bit` those of 4 bits by kernels in CUDA C++, which `cuda` compiles and launches.
`choose_operations` decides by the device, `linear.choose_cut`, after it
`streamed.choose_tiling`, `eight_bit.multiply_eight_bit` and `four_bit.choose_for` by rows
and matrix.
"""

from tokenloom.worker.kernels.base import FAULTY, Operations, Residual
from tokenloom.worker.kernels.choose import choose_operations

__all__ = ["FAULTY", "Operations", "Residual", "choose_operations"]
