"""How tokens are drawn on a device: decided here alone."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from tokenloom.worker.drawing.twin import TorchDrawing

if TYPE_CHECKING:
    import torch

    from tokenloom.worker.drawing.base import Drawing


def choose_drawing(device: torch.device) -> Drawing:
    """Returns the Triton kernels on CUDA, for which meta stands, and their twin elsewhere."""
    if device.type not in {"cuda", "meta"} or find_spec("triton") is None:
        return TorchDrawing()
    # Triton comes with torch's CUDA builds alone: imported when it is chosen.
    from tokenloom.worker.drawing.fused import FusedDrawing  # noqa: PLC0415

    return FusedDrawing()
