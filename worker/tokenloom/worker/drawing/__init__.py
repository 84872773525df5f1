"""From logits to tokens, by each row's own parameters and nothing else.

`base` says what is drawn, `twin` draws it readably in torch (on a CPU, and as the
reference in tests), `fused` with two Triton kernels on CUDA. `choose_drawing` is
the one place that decides.
"""

from tokenloom.worker.drawing.base import Drawing, Drawn, DrawTable
from tokenloom.worker.drawing.choose import choose_drawing

__all__ = ["DrawTable", "Drawing", "Drawn", "choose_drawing"]
