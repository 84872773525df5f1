"""flash-attn over paged keys and values: version 4 on Hopper and Blackwell, version 2 from Ampere.

The one place that imports flash-attn. Both versions come as a package
`flash_attn`: 4 is its part `cute`, 2 what lies around that, with its kernels in
a module of their own. Spans may begin behind the step's first token, so the
tokens before them stay unwritten in the result.
"""

from __future__ import annotations

from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from tokenloom.worker.attention.base import Pages, Spans
from tokenloom.worker.gpus import FLASH4_GENERATIONS, FLASH4_HEAD_DIMS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16)
_CAPABILITY_2 = 8
_HEAD_DIMS_2 = range(8, 257, 8)


def why_not_flash4(*, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Returns why flash-attn-4 cannot serve a model on a device; None if it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device}"
    if torch.cuda.get_device_capability(device)[0] not in FLASH4_GENERATIONS:
        return f"{torch.cuda.get_device_name(device)} has no kernel for paged attention in it"
    if dtype not in _DTYPES:
        return f"it computes in bfloat16 or float16, not {dtype}"
    if head_dim not in FLASH4_HEAD_DIMS:
        return f"head_dim {head_dim} is no multiple of 8 up to {FLASH4_HEAD_DIMS[-1]}"
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return "the package flash-attn-4 is not installed"
    return None


def why_not_flash2(*, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Returns why flash-attn 2 cannot serve a model on a device; None if it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device}"
    if torch.cuda.get_device_capability(device)[0] < _CAPABILITY_2:
        return f"{torch.cuda.get_device_name(device)} is older than its kernels, which begin at 8.0"
    if dtype not in _DTYPES:
        return f"it computes in bfloat16 or float16, not {dtype}"
    if head_dim not in _HEAD_DIMS_2:
        return f"head_dim {head_dim} is no multiple of 8 up to {_HEAD_DIMS_2[-1]}"
    if find_spec("flash_attn_2_cuda") is None:
        return "the package flash-attn (version 2) is not installed"
    return None


class FlashAttention4:
    """flash_attn_varlen_func of flash-attn-4, with a page table.

    Its kernels load whole pages and mask what lies past a request's end, but a
    NaN there would survive the mask: the KV pool is zeroed when it is made and
    when a block changes hands.
    """

    name = "flash4"
    block_size = 128
    """The kernel's own key tile, so that a page is one bulk copy (TMA)."""
    capturable = True
    num_widened = 0

    def load(self) -> None:
        """Imports the package, which takes seconds."""
        _ = self._kernel

    @cached_property
    def _kernel(self) -> Callable[..., tuple[Tensor, ...]]:
        # It needs a CUDA device: imported when it is chosen.
        from flash_attn.cute import flash_attn_varlen_func  # noqa: PLC0415

        kernel: Callable[..., tuple[Tensor, ...]] = flash_attn_varlen_func
        return kernel

    def attend(
        self, pages: Pages, layer: int, queries: Tensor, spans: Spans, window: int | None
    ) -> Tensor:
        """Returns [num_tokens, num_heads, head_dim] for queries of that shape."""
        if queries.is_meta:
            return torch.empty_like(queries)
        mixed, _ = self._kernel(
            queries,
            pages.keys[layer],
            pages.values[layer],
            cu_seqlens_q=spans.offsets,
            # Without max_seqlen_q: with it, short spans have a kernel of their own, which is
            # on Hopper the same one compiled again.
            max_seqlen_k=spans.max_kv_length,
            seqused_k=spans.kv_lengths,
            page_table=spans.block_tables,
            causal=True,
            window_size=(None, None) if window is None else (window - 1, 0),
        )
        return mixed


class FlashAttention2:
    """flash_attn_varlen_func of flash-attn 2.8, with a block table.

    Written to the documented interface and tested against a stand-in that holds
    callers to it; the tests that need the package itself run where it is installed.
    """

    name = "flash2"
    block_size = 256
    """The smallest that its kernels take."""
    capturable = True
    num_widened = 0

    def load(self) -> None:
        """Imports the package."""
        _ = self._kernel

    @cached_property
    def _kernel(self) -> Callable[..., Tensor]:
        # It needs a CUDA device: imported when it is chosen.
        from flash_attn import flash_attn_varlen_func  # noqa: PLC0415

        kernel: Callable[..., Tensor] = flash_attn_varlen_func
        return kernel

    def attend(
        self, pages: Pages, layer: int, queries: Tensor, spans: Spans, window: int | None
    ) -> Tensor:
        """Returns [num_tokens, num_heads, head_dim] for queries of that shape."""
        if queries.is_meta:
            return torch.empty_like(queries)
        return self._kernel(
            queries,
            pages.keys[layer],
            pages.values[layer],
            spans.offsets,
            spans.kv_offsets,
            spans.max_length,
            spans.max_kv_length,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            block_table=spans.block_tables,
        )
