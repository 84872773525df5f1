"""Which attention backend serves a model on a device, and a step's shape: decided here alone."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tokenloom.worker.attention.flash import FlashAttention, why_not_flash
from tokenloom.worker.attention.reference import ReferenceAttention
from tokenloom.worker.errors import LoadError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tokenloom.worker.attention.base import Attention, Pages, Spans

_log = logging.getLogger(__name__)


def choose_attention(
    name: str, *, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Attention:
    """Returns the backend called `name`, or with `auto` the fastest that works here.

    Raises:
        LoadError: The backend asked for by name does not work here.
    """
    no_flash = why_not_flash(head_dim=head_dim, dtype=dtype, device=device)
    no_triton = _why_not_triton(device)
    for backend, obstacle in (("flash", no_flash), ("triton", no_triton)):
        if name == backend and obstacle is not None:
            raise LoadError(f"attention {name} is not possible: {obstacle}")
    if name == "flash":
        return FlashAttention()
    if name == "torch" or (name == "auto" and no_triton is not None):
        if device.type == "cuda" and name == "auto":
            _log.warning("attention in plain torch, slowly: %s", no_triton)
        return ReferenceAttention()
    # Triton comes with torch's CUDA builds alone: imported when it is chosen.
    from tokenloom.worker.attention.paged import PagedAttention  # noqa: PLC0415

    if name == "triton" or no_flash is not None:
        return PagedAttention()
    return ShapedAttention(FlashAttention(), PagedAttention(FlashAttention.block_size))


def _why_not_triton(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    return None


class ShapedAttention:
    """The backend whose kernel is the faster one for a step of its shape.

    flash-attn does not split a decoding request over its keys: few requests
    leave most multiprocessors idle, and the longer they are, the longer. Steps
    that only decode go to the kernel that splits, which measured no slower on
    large batches (bench/README.md); steps with prefill in them go to flash.
    """

    def __init__(self, flash: Attention, split: Attention) -> None:
        """Both read blocks of one size."""
        self.name = f"{flash.name}, {split.name} for decodes"
        self.block_size = flash.block_size
        self.capturable = flash.capturable and split.capturable
        self._flash, self._split = flash, split

    def attend(
        self, pages: Pages, layer: int, queries: Tensor, spans: Spans, window: int | None
    ) -> Tensor:
        """Returns [num_tokens, num_heads, head_dim] for queries of that shape."""
        backend = self._split if spans.max_length == 1 else self._flash
        return backend.attend(pages, layer, queries, spans, window)
