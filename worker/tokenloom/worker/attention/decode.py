"""Our own kernel for decoding, in Triton: spans of one token over paged keys and values.

Decoding reads keys and values once and computes next to nothing, so every
multiprocessor has to read all the time, whether there are few long requests or
many of all lengths. The keys of all requests, cut in tiles and laid end to end,
are shared out evenly: for each KV head as many programs as fit on the chip at
once, each with one run of tiles.

    requests    │ 0  0  0  0  0 │ 1  1 │ 2  2  2  2  2  2 │     tiles of keys, end to end
    programs    │ 0  0  0  0 │ 1  1  1  1 │ 2  2  2  2 │ 3 │     a share is four tiles
                             └ request 0 is parted between programs 0 and 1

A program writes the result of a request that is all its own. Of a parted one it
leaves its part, with the logarithm of its softmax's sum; who comes last weighs the
parts, in their order, so that a result does not depend on who came last. A program
has at most two parts: one of a request that began before its run, and one of a
request that goes on behind it.

All query heads that share a KV head are computed together, so keys and values
are read once for all of them. Those in 8 bits are half the bytes: they are widened in
registers, and their scales go into the softmax. The grid depends on the device and the model alone:
nothing waits for the host, and a captured launch stays right as requests grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenloom.wire.messages import MAX_NUM_REQUESTS
from tokenloom.worker.attention.base import Pages, Spans
from tokenloom.worker.attention.coded import exponent_of, reciprocal_of, wide_type, widen_halves
from tokenloom.worker.kernels.overlap import overlaps, wait_for_previous

_LOG2_E = 1.4426950408889634
_SPAN_STEPS = (16, 128, 1024, MAX_NUM_REQUESTS)
"""Kernels are compiled for steps of up to so many spans."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut. What is not said here follows from the model and the device."""

    tile_bytes: int = 16 * 1024
    """Of keys, and of values, that are computed at once"""
    num_ahead: int = 2
    """Tiles that are under way while one is computed"""
    min_share: int = 1
    """Tiles that a program takes at least"""
    programs_per_processor: int = 2
    num_warps: int = 4
    weighed_bytes: int = 64 * 1024
    """Of parts that are weighed at once, in registers"""


@dataclass(frozen=True, kw_only=True)
class _Workspace:
    """What programs leave for each other. The kernel returns it as it was."""

    num_programs: int
    """For each KV head"""
    parts: Tensor
    """float32 [num_programs, 2, num_heads, head_dim] begun before the run, ended behind it"""
    log_sums: Tensor
    """float32 [num_programs, 2, num_heads] to the base 2"""
    counts: Tensor
    """int32 [num_programs, num_kv_heads] parts there are of the request that began here; zero"""


class PagedDecoding:
    """Triton kernel for float16, bfloat16 and float32 over blocks of 16 or more, a power of two.

    Keys and values may be codes. Calls share memory, so they are to be in one stream.
    """

    name = "triton"

    def __init__(self, tiling: Tiling | None = None) -> None:
        self._tiling = tiling or Tiling()
        self._workspaces: dict[tuple[torch.device, int, int, int], _Workspace] = {}

    def attend(
        self,
        pages: Pages,
        layer: int,
        queries: Tensor,
        spans: Spans,
        window: int | None,
        mixed: Tensor,
    ) -> None:
        """Writes the first num_spans tokens of [num_tokens, num_heads, head_dim]."""
        keys, values, scales = pages.keys[layer], pages.values[layer], pages.scales
        num_heads, head_dim = queries.shape[1:]
        block_size, num_kv_heads = keys.shape[1:3]
        tiling, group = self._tiling, num_heads // num_kv_heads
        heads = triton.next_power_of_2(group)
        space = self._workspace(queries.device, num_heads, num_kv_heads, head_dim)
        # Half of the dimensions of a code's head are a matrix of their own.
        dims = max(16 if scales is None else 32, triton.next_power_of_2(head_dim))
        num_keys = max(16, tiling.tile_bytes // (dims * keys.element_size()))
        overlapped = overlaps(queries.device)
        _attend[(space.num_programs * num_kv_heads,)](
            queries,
            keys,
            values,
            None if scales is None else scales.keys[layer],
            None if scales is None else scales.values[layer],
            spans.block_tables,
            spans.kv_lengths,
            mixed,
            space.parts,
            space.log_sums,
            space.counts,
            head_dim**-0.5 * _LOG2_E,
            spans.num_spans,
            spans.block_tables.stride(0),
            space.num_programs,
            tiling.min_share,
            SPANS=min(each for each in _SPAN_STEPS if each >= spans.num_spans),
            WINDOW=window,
            KV_HEADS=num_kv_heads,
            GROUP=group,
            HEADS=heads,
            HEAD_DIM=head_dim,
            DIMS=dims,
            ROWS=max(16, heads),
            KEYS=min(num_keys, block_size),
            BLOCK_SIZE=block_size,
            PARTS=max(1, tiling.weighed_bytes // (heads * dims * 4)),
            PRECISION="ieee" if queries.dtype == torch.float32 else "tf32",
            WIDE=wide_type(queries.dtype),
            OVERLAPPED=overlapped,
            launch_pdl=overlapped,
            num_warps=tiling.num_warps,
            # To Triton, looking a block up is a stage of its own.
            num_stages=2 * tiling.num_ahead + 1,
        )

    def _workspace(
        self, device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> _Workspace:
        """Returns the model's workspace. It stays: captured launches refer to it."""
        key = (device, num_heads, num_kv_heads, head_dim)
        if key not in self._workspaces:
            at_once = self._tiling.programs_per_processor * _num_processors(device)
            num_programs = max(1, at_once // num_kv_heads)
            parts = (num_programs, 2, num_heads)
            self._workspaces[key] = _Workspace(
                num_programs=num_programs,
                parts=torch.empty((*parts, head_dim), dtype=torch.float32, device=device),
                log_sums=torch.empty(parts, dtype=torch.float32, device=device),
                counts=torch.zeros((num_programs, num_kv_heads), dtype=torch.int32, device=device),
            )
        return self._workspaces[key]


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _first_tile(kv_length: tl.tensor, WINDOW: tl.constexpr, KEYS: tl.constexpr) -> tl.tensor:
    """Returns the first tile of a request that its last token sees."""
    return kv_length * 0 if WINDOW is None else tl.maximum(kv_length - WINDOW, 0) // KEYS


@triton.jit(do_not_specialize=["num_spans", "table_stride", "num_programs", "min_share"])
def _attend(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    tables: tl.tensor,
    kv_lengths: tl.tensor,
    mixed: tl.tensor,
    parts: tl.tensor,
    log_sums: tl.tensor,
    counts: tl.tensor,
    scale: float,
    num_spans: int,
    table_stride: int,
    num_programs: int,
    min_share: int,
    SPANS: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    OVERLAPPED: tl.constexpr,
) -> None:
    """A program of a KV head. `scale` is to the base 2."""
    kv_head = tl.program_id(0) % KV_HEADS
    program = tl.program_id(0) // KV_HEADS
    spans = tl.arange(0, SPANS)
    lengths = tl.load(kv_lengths + spans, mask=spans < num_spans, other=0)
    tiles = tl.cdiv(lengths, KEYS) - _first_tile(lengths, WINDOW, KEYS)
    ends = tl.cumsum(tiles, 0)
    num_tiles = tl.sum(tiles, 0)
    share = tl.maximum(tl.cdiv(num_tiles, num_programs), min_share)
    run = program * share
    run_end = tl.minimum(run + share, num_tiles)
    wait_for_previous(OVERLAPPED)  # lengths are the step's, older than what overlaps
    if run >= run_end:
        return
    first = tl.sum((ends <= run).to(tl.int32), 0)
    last = tl.sum((ends < run_end).to(tl.int32), 0)
    begin = tl.sum(tl.where(spans < first, tiles, 0), 0)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    in_rows, in_dims = rows < GROUP, dims < HEAD_DIM
    in_tile = in_rows[:, None] & in_dims[None, :]
    head = kv_head * GROUP + rows
    for span in range(first, last + 1):
        kv_length = tl.load(kv_lengths + span)
        skipped = _first_tile(kv_length, WINDOW, KEYS)
        end = begin + tl.cdiv(kv_length, KEYS) - skipped  # of the span, in tiles of all
        key_begin = (tl.maximum(run, begin) - begin + skipped) * KEYS
        key_end = tl.minimum((tl.minimum(run_end, end) - begin + skipped) * KEYS, kv_length)
        cell = tl.cast(span, tl.int64) * KV_HEADS * GROUP + head
        at = cell[:, None] * HEAD_DIM + dims[None, :]
        q = tl.load(queries + at, mask=in_tile, other=0.0)
        table = tables + tl.cast(span, tl.int64) * table_stride

        first_seen = 0 if WINDOW is None else kv_length - WINDOW
        if key_scales is None:
            mix, total, highest = _mix(
                q,
                keys,
                values,
                table,
                kv_head,
                key_begin,
                key_end,
                first_seen,
                scale,
                KV_HEADS,
                HEAD_DIM,
                DIMS,
                ROWS,
                KEYS,
                BLOCK_SIZE,
                PRECISION,
            )
        else:
            mix, total, highest = _mix_coded(
                (q.to(tl.float32) * scale).to(WIDE),
                keys,
                values,
                key_scales,
                value_scales,
                table,
                kv_head,
                key_begin,
                key_end,
                first_seen,
                KV_HEADS,
                HEAD_DIM,
                DIMS,
                ROWS,
                KEYS,
                BLOCK_SIZE,
                PRECISION,
            )
        mix = mix / total[:, None]
        begins, stops = begin >= run, end <= run_end
        if begins & stops:
            tl.store(mixed + at, mix.to(q.dtype), mask=in_tile)
        else:
            part = ((program * 2 + begins.to(tl.int32)) * KV_HEADS * GROUP) + head
            tl.store(parts + part[:, None] * HEAD_DIM + dims[None, :], mix, mask=in_tile)
            tl.store(log_sums + part, highest + tl.log2(total), mask=in_rows)
            tl.debug_barrier()  # all threads' stores come before the count
            first_program = begin // share
            num_parts = (end - 1) // share - first_program + 1
            count = counts + first_program * KV_HEADS + kv_head
            if tl.atomic_add(count, 1, sem="acq_rel") == num_parts - 1:
                tl.store(count, 0)
                _weigh(
                    parts,
                    log_sums,
                    mixed + tl.cast(span, tl.int64) * KV_HEADS * GROUP * HEAD_DIM,
                    kv_head,
                    first_program,
                    num_parts,
                    KV_HEADS,
                    GROUP,
                    HEADS,
                    HEAD_DIM,
                    DIMS,
                    PARTS,
                )
        begin = end


@triton.jit
def _mix(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    kv_head: int,
    key_begin: int,
    key_end: int,
    first_seen: int,
    scale: float,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns values weighed by the softmax of scores, unnormalized; its sum and its base."""
    dims = tl.arange(0, DIMS)
    in_dims = dims < HEAD_DIM
    inside = (tl.arange(0, KEYS) * KV_HEADS + kv_head) * HEAD_DIM  # a tile lies in one block
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mix = tl.zeros([ROWS, DIMS], tl.float32)
    for key in range(key_begin, key_end, KEYS):
        key = tl.multiple_of(key, KEYS)
        keys_at = key + tl.arange(0, KEYS)
        there = keys_at < key_end
        block = tl.load(table + key // BLOCK_SIZE).to(tl.int64)
        tile = (block * BLOCK_SIZE + key % BLOCK_SIZE) * (KV_HEADS * HEAD_DIM)
        # What lies behind a request's end is never loaded: 0 times NaN would be NaN.
        k = tl.load(
            keys + tile + inside[None, :] + dims[:, None],
            mask=there[None, :] & in_dims[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        seen = there & (keys_at >= first_seen)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))  # of at least one key that is seen
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(
            values + tile + inside[:, None] + dims[None, :],
            mask=there[:, None] & in_dims[None, :],
            other=0.0,
        )
        mix = tl.dot(weights.to(v.dtype), v, acc=mix * shrink[:, None], input_precision=PRECISION)
        highest = higher
    return mix, total, highest


@triton.jit
def _mix_coded(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    table: tl.tensor,
    kv_head: int,
    key_begin: int,
    key_end: int,
    first_seen: int,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Does as `_mix` does, with codes and for scaled queries of the type that codes widen to.

    A value's scale multiplies its weight: its logarithm is added to the score, so
    that the largest product is 1 however small values are, and the sum of the
    weights themselves is divided by it again.
    """
    dims = tl.arange(0, DIMS)
    in_dims = dims < HEAD_DIM
    pairs = tl.arange(0, DIMS // 2)
    in_pairs = pairs < HEAD_DIM // 2
    value_pairs = values.to(tl.pointer_type(tl.int16))
    inside = (tl.arange(0, KEYS) * KV_HEADS + kv_head) * HEAD_DIM  # a tile lies in one block
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mix_left = tl.zeros([ROWS, DIMS // 2], tl.float32)
    mix_right = tl.zeros([ROWS, DIMS // 2], tl.float32)
    for key in range(key_begin, key_end, KEYS):
        key = tl.multiple_of(key, KEYS)
        keys_at = key + tl.arange(0, KEYS)
        there = keys_at < key_end
        block = tl.load(table + key // BLOCK_SIZE).to(tl.int64)
        tile = (block * BLOCK_SIZE + key % BLOCK_SIZE) * (KV_HEADS * HEAD_DIM)
        scales_at = (block * KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE
        scales_at += tl.arange(0, KEYS)
        k = tl.load(
            keys + tile + inside[None, :] + dims[:, None],
            mask=there[None, :] & in_dims[:, None],
            other=0.0,
        )
        k_scale = tl.load(key_scales + scales_at, mask=there, other=1.0)
        v_scale = tl.load(value_scales + scales_at, mask=there, other=1.0)
        scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION)
        scores = scores * k_scale[None, :] + exponent_of(v_scale)[None, :]
        seen = there & (keys_at >= first_seen)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))  # of at least one key that is seen
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights * reciprocal_of(v_scale)[None, :], 1)
        v = tl.load(
            value_pairs + (tile + inside[:, None]) // 2 + pairs[None, :],
            mask=there[:, None] & in_pairs[None, :],
            other=0,
        )
        left, right = widen_halves(v, q.dtype)
        weights = weights.to(q.dtype)
        mix_left = tl.dot(weights, left, acc=mix_left * shrink[:, None], input_precision=PRECISION)
        mix_right = tl.dot(
            weights, right, acc=mix_right * shrink[:, None], input_precision=PRECISION
        )
        highest = higher
    return tl.reshape(tl.join(mix_left, mix_right), (ROWS, DIMS)), total, highest


@triton.jit
def _weigh(
    parts: tl.tensor,
    log_sums: tl.tensor,
    mixed: tl.tensor,
    kv_head: int,
    first_program: int,
    num_parts: int,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Writes a span's result for the query heads of a KV head; `mixed` is the span's."""
    heads = tl.arange(0, HEADS)
    dims = tl.arange(0, DIMS)
    in_heads, in_dims = heads < GROUP, dims < HEAD_DIM
    highest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    mix = tl.zeros([HEADS, DIMS], tl.float32)
    for done in range(0, num_parts, PARTS):
        nth = done + tl.arange(0, PARTS)
        program = first_program + nth
        # The span begins in its first program's run and was begun before all others'.
        row = (program * 2 + (nth == 0).to(tl.int32)) * KV_HEADS + kv_head
        at = row[:, None] * GROUP + heads[None, :]
        there = (nth < num_parts)[:, None] & in_heads[None, :]
        # Past the first-level cache: other multiprocessors wrote them.
        log_sum = tl.load(log_sums + at, mask=there, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            parts + at[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=there[:, :, None] & in_dims[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        higher = tl.maximum(highest, tl.max(log_sum, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # of a head that pads the group
        weights = tl.exp2(log_sum - base[None, :])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weights, 0)
        mix = mix * shrink[:, None] + tl.sum(weights[:, :, None] * part, 0)
        highest = higher
    out = (mix / tl.where(total == 0, 1.0, total)[:, None]).to(mixed.dtype.element_ty)
    at = (kv_head * GROUP + heads)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(mixed + at, out, mask=in_heads[:, None] & in_dims[None, :])
