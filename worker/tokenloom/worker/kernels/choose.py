"""Which operations a decoder runs on a device: decided here alone."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from tokenloom.worker.kernels.twin import TorchOperations

if TYPE_CHECKING:
    import torch

    from tokenloom.worker.kernels.base import Operations


def choose_operations(device: torch.device) -> Operations:
    """Returns the fused kernels on CUDA, their twins elsewhere."""
    if device.type != "cuda" or find_spec("triton") is None:
        return TorchOperations()
    # Triton comes with torch's CUDA builds alone: imported when it is chosen.
    from tokenloom.worker.kernels.fused import FusedOperations  # noqa: PLC0415

    return FusedOperations()
