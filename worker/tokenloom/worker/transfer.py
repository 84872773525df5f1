"""Copies between host and device that do not make either wait for the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from torch import Tensor

_ALIGNED = 4
"""Numbers in 16 bytes."""
Column: TypeAlias = npt.NDArray[np.int32] | npt.NDArray[np.float32]


def upload(device: torch.device, *columns: Column) -> tuple[Tensor, ...]:
    """Returns int32 and float32 arrays as tensors of a device, sent as one packed copy.

    The host side is pinned. Each tensor begins at a multiple of 16 bytes: kernels
    are compiled anew for tensors that do not.
    """
    begins = np.cumsum([0, *(-(-column.size // _ALIGNED) * _ALIGNED for column in columns)])
    packed = np.empty(begins[-1], dtype=np.int32)
    for begin, column in zip(begins.tolist(), columns, strict=False):
        packed[begin : begin + column.size] = column.reshape(-1).view(np.int32)
    host = pinned(packed) if device.type == "cuda" else torch.from_numpy(packed)
    whole = host.to(device, non_blocking=True)
    return tuple(
        _typed(whole[begin : begin + column.size], column)
        for begin, column in zip(begins.tolist(), columns, strict=False)
    )


def _typed(part: Tensor, column: Column) -> Tensor:
    return (part.view(torch.float32) if column.dtype == np.float32 else part).view(column.shape)


def pinned(array: npt.NDArray[np.generic]) -> Tensor:
    """Returns a copy in pinned memory; torch's host allocator keeps it until copies are over."""
    return torch.from_numpy(array).pin_memory()


def download(tensor: Tensor) -> Tensor:
    """Returns a host copy whose content is there once the device reached this point."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
