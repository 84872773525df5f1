"""Our own kernel over paged keys and values, in Triton: spans of every length, on any GPU.

A program computes, for one KV head, a tile of a span: some of its tokens times
the query heads that share the KV head, so keys and values are read once for all
of them. Where the tiles alone would leave the chip idle (few requests, long
contexts) each is split over its keys; the parts come with the logarithm of their
softmax's sum, and a second kernel weighs them:

    tile of a span      keys 0 …                                   kv_length
    ┌───────────────┐   ├── split 0 ──┼── split 1 ──┼── split 2 ──┤
    │ token 0 head 0│        part          part          part       partials [.., split, head_dim]
    │ token 0 head 1│     log-sum       log-sum       log-sum       log_sums [.., split]
    │ token 1 head 0│         └──────── combined ────────┘
    └───────────────┘

Grids depend on what the host knows of the shapes alone: nothing waits for the
device, and a captured launch stays right while requests grow below the width of
the block tables. A program past its span's or request's end returns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenloom.worker.attention.base import Pages, Spans

_TILE_BYTES = 16 * 1024
"""Of keys, and of values: a few of them in flight fill a multiprocessor's shared memory."""
_MIN_PART_KEYS = 128
"""A part below that costs more to combine than it takes to compute."""
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work of a step is cut."""

    num_rows: int
    """Of a tile: tokens times query heads of a KV head. A power of two, 16 at least."""
    num_keys: int
    """Of a tile: computed at once. A power of two, 16 at least."""
    tiles_per_span: int
    num_splits: int
    num_warps: int
    num_stages: int


class PagedAttention:
    """Triton kernels for float16, bfloat16 and float32 over blocks of any size."""

    name = "triton"
    capturable = True

    def __init__(self, block_size: int = 64, programs_per_processor: int = 2) -> None:
        """`programs_per_processor`: below that many for each multiprocessor, tiles are split."""
        self.block_size = block_size
        self._programs_per_processor = programs_per_processor
        self._num_processors: int | None = None

    def attend(
        self, pages: Pages, layer: int, queries: Tensor, spans: Spans, window: int | None
    ) -> Tensor:
        """Returns [num_tokens, num_heads, head_dim] for queries of that shape."""
        keys, values = pages.keys[layer], pages.values[layer]
        num_tokens, num_heads, head_dim = queries.shape
        tiling = self._tiling(queries, keys, spans)
        mixed = torch.empty_like(queries)
        partials = log_sums = None
        if tiling.num_splits > 1:
            parts = (num_tokens, num_heads, tiling.num_splits)
            partials = torch.empty((*parts, head_dim), dtype=torch.float32, device=queries.device)
            log_sums = torch.empty(parts, dtype=torch.float32, device=queries.device)
        num_spans, num_kv_heads = len(spans.kv_lengths), keys.shape[2]
        sizes = {
            "WINDOW": window,
            "NUM_HEADS": num_heads,
            "GROUP": num_heads // num_kv_heads,
            "HEAD_DIM": head_dim,
            "DIMS": max(16, triton.next_power_of_2(head_dim)),
            "ROWS": tiling.num_rows,
            "KEYS": tiling.num_keys,
            "MIN_PART_KEYS": max(_MIN_PART_KEYS, tiling.num_keys),
        }
        _attend[(num_spans * tiling.tiles_per_span * num_kv_heads, tiling.num_splits)](
            queries,
            keys,
            values,
            spans.block_tables,
            spans.offsets,
            spans.kv_lengths,
            mixed,
            partials,
            log_sums,
            head_dim**-0.5 * _LOG2_E,
            spans.block_tables.stride(0),
            tiling.tiles_per_span,
            tiling.num_splits,
            **sizes,
            BLOCK_SIZE=keys.shape[1],
            PRECISION="ieee" if queries.dtype == torch.float32 else "tf32",
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
        if partials is not None:
            _combine[(num_heads, num_spans * spans.max_length)](
                partials,
                log_sums,
                spans.offsets,
                spans.kv_lengths,
                mixed,
                spans.max_length,
                tiling.num_splits,
                **sizes,
                PARTS=32,
                num_warps=4,
            )
        return mixed

    def _tiling(self, queries: Tensor, keys: Tensor, spans: Spans) -> Tiling:
        """Returns tiles that suit the longest span, and enough splits to fill the chip."""
        num_heads, head_dim = queries.shape[1:]
        group = num_heads // keys.shape[2]
        itemsize = queries.element_size()
        key_bytes = max(16, triton.next_power_of_2(head_dim)) * itemsize
        # Two sizes, so that few kernels are compiled. float32 runs outside the matrix units,
        # where large tiles spill registers.
        num_rows = 16 if spans.max_length * group <= 16 or itemsize == 4 else 64
        num_rows = max(num_rows, triton.next_power_of_2(group))
        tiles_per_span = triton.cdiv(spans.max_length, num_rows // group)
        num_programs = len(spans.kv_lengths) * tiles_per_span * keys.shape[2]
        wanted = self._programs_per_processor * self._processors(queries.device)
        num_splits = min(
            triton.cdiv(wanted, num_programs),
            triton.cdiv(spans.block_tables.shape[1] * keys.shape[1], _MIN_PART_KEYS),
        )
        return Tiling(
            num_rows=num_rows,
            num_keys=min(max(16, _TILE_BYTES // key_bytes), 64),
            tiles_per_span=tiles_per_span,
            num_splits=num_splits,
            num_warps=8 if num_rows == 64 and head_dim > 128 else 4,
            num_stages=3,
        )

    def _processors(self, device: torch.device) -> int:
        if self._num_processors is None:
            self._num_processors = (
                torch.cuda.get_device_properties(device).multi_processor_count
                if device.type == "cuda"
                else 1
            )
        return self._num_processors


@triton.jit
def _tile_keys(
    start: int,
    num_tokens: int,
    first: int,
    num_splits: int,
    WINDOW: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_PART_KEYS: tl.constexpr,
) -> tuple[int, int, int]:
    """Returns first key, end and keys a part of the tile that begins at a span's token `first`."""
    end = start + tl.minimum(first + TILE_TOKENS, num_tokens)
    begin = 0
    if WINDOW is not None:
        begin = tl.maximum(start + first + 1 - WINDOW, 0) // KEYS * KEYS
    part = tl.cdiv(tl.cdiv(end - begin, num_splits), KEYS) * KEYS
    return begin, end, tl.maximum(part, MIN_PART_KEYS)


@triton.jit(do_not_specialize=["table_stride", "tiles_per_span", "num_splits"])
def _attend(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tables: tl.tensor,
    offsets: tl.tensor,
    kv_lengths: tl.tensor,
    mixed: tl.tensor,
    partials: tl.tensor,
    log_sums: tl.tensor,
    scale: float,
    table_stride: int,
    tiles_per_span: int,
    num_splits: int,
    WINDOW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_PART_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """A program a KV head, tile of a span, and split. `scale` is to the base 2."""
    num_kv_heads: tl.constexpr = NUM_HEADS // GROUP
    tile_tokens: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(0) % num_kv_heads
    tile = tl.program_id(0) // num_kv_heads
    span = tile // tiles_per_span
    first = tile % tiles_per_span * tile_tokens
    split = tl.program_id(1)
    span_token = tl.load(offsets + span)
    num_tokens = tl.load(offsets + span + 1) - span_token
    if first >= num_tokens:
        return
    start = tl.load(kv_lengths + span) - num_tokens
    begin, end, part = _tile_keys(
        start, num_tokens, first, num_splits, WINDOW, tile_tokens, KEYS, MIN_PART_KEYS
    )
    begin += split * part
    end = tl.minimum(begin + part, end)
    if begin >= end:
        return

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    in_dims = dims < HEAD_DIM
    token = first + rows // GROUP  # of the span
    in_rows = (rows < tile_tokens * GROUP) & (token < num_tokens)
    position = start + token
    cell = (span_token + token).to(tl.int64) * NUM_HEADS + kv_head * GROUP + rows % GROUP
    in_tile = in_rows[:, None] & in_dims[None, :]
    q = tl.load(queries + cell[:, None] * HEAD_DIM + dims[None, :], mask=in_tile, other=0.0)

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mix = tl.zeros([ROWS, DIMS], tl.float32)
    table = tables + span.to(tl.int64) * table_stride
    for key in range(begin, end, KEYS):
        key = tl.multiple_of(key, KEYS)
        keys_at = key + tl.arange(0, KEYS)
        in_part = keys_at < end
        if KEYS <= BLOCK_SIZE:  # one block holds them all
            block = tl.load(table + key // BLOCK_SIZE).to(tl.int64)
            place = block * BLOCK_SIZE + key % BLOCK_SIZE + tl.arange(0, KEYS)
        else:
            block = tl.load(table + keys_at // BLOCK_SIZE, mask=in_part, other=0).to(tl.int64)
            place = block * BLOCK_SIZE + keys_at % BLOCK_SIZE
        at = (place * num_kv_heads + kv_head) * HEAD_DIM
        # What lies behind a request's end is never loaded: 0 times NaN would be NaN.
        k = tl.load(
            keys + at[None, :] + dims[:, None],
            mask=in_part[None, :] & in_dims[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        seen = in_part[None, :] & (keys_at[None, :] <= position[:, None])
        if WINDOW is not None:
            seen &= keys_at[None, :] > position[:, None] - WINDOW
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row may see none so far
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(
            values + at[:, None] + dims[None, :],
            mask=in_part[:, None] & in_dims[None, :],
            other=0.0,
        )
        mix = tl.dot(weights.to(v.dtype), v, acc=mix * shrink[:, None], input_precision=PRECISION)
        highest = higher

    mix = mix / tl.where(total == 0, 1.0, total)[:, None]
    if partials is None:
        tl.store(mixed + cell[:, None] * HEAD_DIM + dims[None, :], mix.to(q.dtype), mask=in_tile)
    else:
        at = cell * num_splits + split
        tl.store(partials + at[:, None] * HEAD_DIM + dims[None, :], mix, mask=in_tile)
        tl.store(log_sums + at, highest + tl.log2(total), mask=in_rows)  # -inf for a row of none


@triton.jit(do_not_specialize=["max_length", "num_splits"])
def _combine(
    partials: tl.tensor,
    log_sums: tl.tensor,
    offsets: tl.tensor,
    kv_lengths: tl.tensor,
    mixed: tl.tensor,
    max_length: int,
    num_splits: int,
    WINDOW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_PART_KEYS: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """A program a query head and token. It knows which splits had keys as `_attend` does."""
    tile_tokens: tl.constexpr = ROWS // GROUP
    span = tl.program_id(1) // max_length
    token = tl.program_id(1) % max_length
    span_token = tl.load(offsets + span)
    num_tokens = tl.load(offsets + span + 1) - span_token
    if token >= num_tokens:
        return
    start = tl.load(kv_lengths + span) - num_tokens
    first = token // tile_tokens * tile_tokens
    begin, end, part = _tile_keys(
        start, num_tokens, first, num_splits, WINDOW, tile_tokens, KEYS, MIN_PART_KEYS
    )
    num_parts = tl.cdiv(end - begin, part)
    dims = tl.arange(0, DIMS)
    in_dims = dims < HEAD_DIM
    cell = (span_token + token).to(tl.int64) * NUM_HEADS + tl.program_id(0)
    highest = -float("inf")
    total = 0.0
    mix = tl.zeros([DIMS], tl.float32)
    for split in range(0, num_parts, PARTS):
        splits = split + tl.arange(0, PARTS)
        at = cell * num_splits + splits
        there = splits < num_parts
        log_sum = tl.load(log_sums + at, mask=there, other=float("-inf"))
        parts = tl.load(
            partials + at[:, None] * HEAD_DIM + dims[None, :],
            mask=there[:, None] & in_dims[None, :],
            other=0.0,
        )
        higher = tl.maximum(highest, tl.max(log_sum, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(log_sum - base)
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weights, 0)
        mix = mix * shrink + tl.sum(weights[:, None] * parts, 0)
        highest = higher
    out = (mix / total).to(mixed.dtype.element_ty)
    tl.store(mixed + cell * HEAD_DIM + dims, out, mask=in_dims)
