"""A stand-in for flash-attn 2.8.3's `flash_attn_varlen_func`, with what its kernels check.

It takes what the package takes, in its order, refuses what the package refuses,
and computes in float64, request by request. What is not needed for paged causal
attention it does not know.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


def module() -> ModuleType:
    """Returns a module `flash_attn`."""
    flash_attn = ModuleType("flash_attn")
    flash_attn.__dict__["flash_attn_varlen_func"] = flash_attn_varlen_func
    return flash_attn


def flash_attn_varlen_func(  # noqa: PLR0917 - the package's own order
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    assert (dropout_p, softcap, alibi_slopes, deterministic, return_attn_probs) == (
        0.0,
        0.0,
        None,
        False,
        False,
    )
    assert block_table is not None
    assert causal
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in {torch.float16, torch.bfloat16}
    num_spans, num_heads, head_dim = len(cu_seqlens_q) - 1, *q.shape[1:]
    num_blocks, block_size, num_kv_heads = k.shape[:3]
    assert k.shape == v.shape == (num_blocks, block_size, num_kv_heads, head_dim)
    assert block_size % 256 == 0, "Paged KV cache block size must be divisible by 256"
    assert head_dim in range(8, 257, 8)
    assert num_heads % num_kv_heads == 0
    assert block_table.dtype == torch.int32
    assert block_table.shape[0] == num_spans
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == block_table.stride(-1) == 1
    for each in (cu_seqlens_q, cu_seqlens_k):
        assert each.dtype == torch.int32
        assert each.shape == (num_spans + 1,)
        assert each.is_contiguous()
    assert isinstance(max_seqlen_q, int)
    assert isinstance(max_seqlen_k, int)
    lengths, kv_lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert max(lengths) <= max_seqlen_q
    assert max(kv_lengths) <= max_seqlen_k
    if max_seqlen_q == 1:  # the kernels then take token i for span i
        assert len(q) == num_spans

    out = torch.full_like(q, float("nan"))  # of tokens in no span
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    group = num_heads // num_kv_heads
    for span, (length, kv_length) in enumerate(zip(lengths, kv_lengths, strict=True)):
        blocks = block_table[span, : -(-kv_length // block_size)].long()
        keys, values = (
            each[blocks].flatten(0, 1)[:kv_length].double().repeat_interleave(group, 1)
            for each in (k, v)
        )
        begin = int(cu_seqlens_q[span])
        queries = q[begin : begin + length].double()
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        # Aligned to the bottom right: query i stands at i + kv_length - length.
        here = torch.arange(length)[:, None] + kv_length - length
        there = torch.arange(kv_length)
        left, right = window_size[0], 0
        seen = there <= here + right
        if left >= 0:
            seen &= there >= here - left
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[begin : begin + length] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out
