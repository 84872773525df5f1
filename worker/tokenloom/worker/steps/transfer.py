"""Copies between host and device that do not make either wait for the other."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from torch import Tensor

_ALIGNED = 4
"""Numbers in 16 bytes."""
Column: TypeAlias = npt.NDArray[np.int32] | npt.NDArray[np.float32]


def upload(
    device: torch.device, *columns: Column, memory: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Returns int32 and float32 arrays as tensors of a device, sent as one packed copy.

    The host side is pinned. Each tensor begins at a multiple of 16 bytes: kernels
    are compiled anew for tensors that do not. With `memory`, int32 and large enough,
    they lie there: columns of the same sizes always in the same places.
    """
    begins = _begins(columns)
    packed = np.empty(begins[-1], dtype=np.int32)
    for begin, column in zip(begins, columns, strict=False):
        packed[begin : begin + column.size] = column.reshape(-1).view(np.int32)
    host = staged(packed, device)
    if memory is None:
        whole = host.to(device, non_blocking=True)
    else:
        whole = memory[: len(packed)].copy_(host, non_blocking=True)
    return tuple(
        _typed(whole[begin : begin + column.size], column)
        for begin, column in zip(begins, columns, strict=False)
    )


def packed_size(*columns: Column) -> int:
    """Returns how many numbers of `memory` columns of these sizes take."""
    return _begins(columns)[-1]


def _begins(columns: tuple[Column, ...]) -> list[int]:
    """Returns where each begins, and where the last ends."""
    sizes = (-(-column.size // _ALIGNED) * _ALIGNED for column in columns)
    return list(accumulate(sizes, initial=0))


def _typed(part: Tensor, column: Column) -> Tensor:
    return (part.view(torch.float32) if column.dtype == np.float32 else part).view(column.shape)


def staged(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Returns a host tensor that a copy to the device need not wait for.

    For CUDA it is a copy in pinned memory; torch's host allocator keeps it until copies
    are over.
    """
    host = torch.from_numpy(array)
    return host.pin_memory() if device.type == "cuda" else host


def download(tensor: Tensor) -> Tensor:
    """Returns a host copy whose content is there once the device reached this point."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
