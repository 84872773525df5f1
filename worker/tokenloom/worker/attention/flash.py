"""flash-attn-4 over paged keys and values: Hopper and Blackwell.

The one place that imports flash-attn. Its kernels load whole pages and mask
what lies past a request's end, but a NaN there would survive the mask: the KV
pool is zeroed when it is made and when a block changes hands.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from tokenloom.worker.attention.base import Pages, Spans

if TYPE_CHECKING:
    from torch import Tensor

_CAPABILITIES = (9, 10)
"""Major compute capabilities with kernels for paged keys and values."""
_HEAD_DIMS = range(8, 129, 8)


def why_not_flash(*, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Returns why flash-attn-4 cannot serve a model on a device; None if it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device}"
    if torch.cuda.get_device_capability(device)[0] not in _CAPABILITIES:
        return f"{torch.cuda.get_device_name(device)} has no kernel for paged attention in it"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not {dtype}"
    if head_dim not in _HEAD_DIMS:
        return f"head_dim {head_dim} is no multiple of 8 up to 128"
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return "the package flash-attn-4 is not installed"
    return None


class FlashAttention:
    """flash_attn_varlen_func with a page table."""

    name = "flash"
    capturable = True
    block_size = 128
    """The kernel's own key tile, so that a page is one bulk copy (TMA)."""

    def __init__(self) -> None:
        # Slow, and it needs a CUDA device: imported when it is chosen.
        from flash_attn.cute import flash_attn_varlen_func  # noqa: PLC0415

        self._kernel = flash_attn_varlen_func

    def attend(
        self, pages: Pages, layer: int, queries: Tensor, spans: Spans, window: int | None
    ) -> Tensor:
        """Returns [num_tokens, num_heads, head_dim] for queries of that shape."""
        mixed: Tensor
        mixed, _ = self._kernel(
            queries,
            pages.keys[layer],
            pages.values[layer],
            cu_seqlens_q=spans.offsets,
            max_seqlen_q=spans.max_length,
            max_seqlen_k=spans.max_kv_length,
            seqused_k=spans.kv_lengths,
            page_table=spans.block_tables,
            causal=True,
            window_size=(None, None) if window is None else (window - 1, 0),
        )
        return mixed
