"""Our own kernel over paged keys and values, in Triton: spans of every length, on any GPU.

A program computes, for one KV head, a tile of a span: some of its tokens times
the query heads that share the KV head, so keys and values are read once for all
of them.

    tile of a span       keys 0 …
    ┌───────────────┐   ┌────────┬────────┬────────┬────
    │ token 0 head 0│   │ some   │ some   │ up to the tile's last token
    │ token 0 head 1│   │ at once│ at once│
    │ token 1 head 0│   └────────┴────────┴────────┴────
    └───────────────┘

The grid depends on what the host knows of the shapes alone: nothing waits for
the device. A program past its span's end returns. Spans of one token are better
served by `decode`, which parts the keys of long requests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenloom.worker.attention.base import Pages, Spans
from tokenloom.worker.attention.coded import exponent_of, reciprocal_of, wide_type

_TILE_BYTES = 16 * 1024
"""Of keys, and of values: a few of them in flight fill a multiprocessor's shared memory."""
_LOG2_E = 1.4426950408889634


class PagedAttention:
    """Triton kernel for float16, bfloat16 and float32 over blocks of 16 or more, a power of two.

    Keys and values may be codes.
    """

    name = "triton"
    capturable = True
    num_widened = 0

    def __init__(self, block_size: int = 64) -> None:
        self.block_size = block_size

    def load(self) -> None:
        """Has nothing to import."""

    def attend(
        self, pages: Pages, layer: int, queries: Tensor, spans: Spans, window: int | None
    ) -> Tensor:
        """Returns [num_tokens, num_heads, head_dim] for queries of that shape."""
        mixed = torch.empty_like(queries)
        self.attend_into(mixed, pages, layer, queries, spans, window)
        return mixed

    def attend_into(
        self,
        mixed: Tensor,
        pages: Pages,
        layer: int,
        queries: Tensor,
        spans: Spans,
        window: int | None,
    ) -> None:
        """Writes all tokens of spans whose kv_length is not 0, like `attend`."""
        keys, values, scales = pages.keys[layer], pages.values[layer], pages.scales
        num_heads, head_dim = queries.shape[1:]
        num_kv_heads = keys.shape[2]
        wide = wide_type(queries.dtype)
        group, itemsize = num_heads // num_kv_heads, queries.element_size()
        dims = max(16, triton.next_power_of_2(head_dim))
        # Two sizes, so that few kernels are compiled. float32 runs outside the matrix units,
        # where large tiles spill registers.
        num_rows = 16 if spans.max_length * group <= 16 or itemsize == 4 else 64
        num_rows = max(num_rows, triton.next_power_of_2(group))
        tiles_per_span = triton.cdiv(spans.max_length, num_rows // group)
        _attend[(spans.num_spans * tiles_per_span * num_kv_heads,)](
            queries,
            keys,
            values,
            None if scales is None else scales.keys[layer],
            None if scales is None else scales.values[layer],
            spans.block_tables,
            spans.offsets,
            spans.kv_lengths,
            mixed,
            head_dim**-0.5 * _LOG2_E,
            spans.block_tables.stride(0),
            tiles_per_span,
            WINDOW=window,
            KV_HEADS=num_kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            DIMS=dims,
            ROWS=num_rows,
            KEYS=min(max(16, _TILE_BYTES // (dims * itemsize)), 64, self.block_size),
            BLOCK_SIZE=keys.shape[1],
            PRECISION="ieee" if queries.dtype == torch.float32 else "tf32",
            WIDE=wide,
            num_warps=8 if num_rows == 64 and head_dim > 128 else 4,
            num_stages=3,
        )


@triton.jit(
    do_not_specialize=["table_stride", "tiles_per_span"],
    # Of spans behind decodes, which may be any number.
    do_not_specialize_on_alignment=["tables", "offsets", "kv_lengths"],
)
def _attend(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    tables: tl.tensor,
    offsets: tl.tensor,
    kv_lengths: tl.tensor,
    mixed: tl.tensor,
    scale: float,
    table_stride: int,
    tiles_per_span: int,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """A program a KV head and tile of a span. `scale` is to the base 2."""
    tile_tokens: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(0) % KV_HEADS
    tile = tl.program_id(0) // KV_HEADS
    span = tile // tiles_per_span
    first = (tiles_per_span - 1 - tile % tiles_per_span) * tile_tokens  # the most keys first
    span_token = tl.load(offsets + span)
    num_tokens = tl.load(offsets + span + 1) - span_token
    kv_length = tl.load(kv_lengths + span)
    if (first >= num_tokens) | (kv_length == 0):
        return
    start = kv_length - num_tokens
    begin, end = 0, start + tl.minimum(first + tile_tokens, num_tokens)
    if WINDOW is not None:
        begin = tl.maximum(start + first + 1 - WINDOW, 0) // KEYS * KEYS

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    in_dims = dims < HEAD_DIM
    token = first + rows // GROUP  # of the span
    in_rows = (rows < tile_tokens * GROUP) & (token < num_tokens)
    position = start + token
    cell = (span_token + token).to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + rows % GROUP
    in_tile = in_rows[:, None] & in_dims[None, :]
    q = tl.load(queries + cell[:, None] * HEAD_DIM + dims[None, :], mask=in_tile, other=0.0)
    if key_scales is not None:
        q = (q.to(tl.float32) * scale).to(WIDE)

    inside = (tl.arange(0, KEYS) * KV_HEADS + kv_head) * HEAD_DIM  # a tile lies in one block
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mix = tl.zeros([ROWS, DIMS], tl.float32)
    table = tables + span.to(tl.int64) * table_stride
    for key in range(begin, end, KEYS):
        key = tl.multiple_of(key, KEYS)
        keys_at = key + tl.arange(0, KEYS)
        there = keys_at < end
        block = tl.load(table + key // BLOCK_SIZE).to(tl.int64)
        at = (block * BLOCK_SIZE + key % BLOCK_SIZE) * (KV_HEADS * HEAD_DIM)
        # What lies behind a request's end is never loaded: 0 times NaN would be NaN.
        k = tl.load(
            keys + at + inside[None, :] + dims[:, None],
            mask=there[None, :] & in_dims[:, None],
            other=0.0,
        )
        if key_scales is None:
            scores = tl.dot(q, k, input_precision=PRECISION) * scale
        else:
            # As in `decode`, a value's scale goes into the score.
            scales_at = (block * KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE
            scales_at += tl.arange(0, KEYS)
            k_scale = tl.load(key_scales + scales_at, mask=there, other=1.0)
            v_scale = tl.load(value_scales + scales_at, mask=there, other=1.0)
            scores = tl.dot(q, k.to(WIDE), input_precision=PRECISION)
            scores = scores * k_scale[None, :] + exponent_of(v_scale)[None, :]
        seen = there[None, :] & (keys_at[None, :] <= position[:, None])
        if WINDOW is not None:
            seen &= keys_at[None, :] > position[:, None] - WINDOW
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row may see none so far
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        if key_scales is None:
            total = total * shrink + tl.sum(weights, 1)
        else:
            total = total * shrink + tl.sum(weights * reciprocal_of(v_scale)[None, :], 1)
        v = tl.load(
            values + at + inside[:, None] + dims[None, :],
            mask=there[:, None] & in_dims[None, :],
            other=0.0,
        )
        if key_scales is not None:
            v = v.to(WIDE)
        mix = tl.dot(weights.to(v.dtype), v, acc=mix * shrink[:, None], input_precision=PRECISION)
        highest = higher

    mix = mix / tl.where(total == 0, 1.0, total)[:, None]  # zero for a row of none
    mix = mix.to(mixed.dtype.element_ty)
    tl.store(mixed + cell[:, None] * HEAD_DIM + dims[None, :], mix, mask=in_tile)
