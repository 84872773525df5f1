"""The operations as one Triton kernel each: what they read and write moves once.

Values are widened to float32 when they are loaded and rounded to their own type
where the twin rounds, but for the products of a rotation: the compiler makes one
fused multiply-add of each and the sum it goes into.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenloom.worker.fp8 import LARGEST, SMALLEST
from tokenloom.worker.kernels import norms
from tokenloom.worker.kernels.base import FAULTY, DecodeRows, Operations, Residual
from tokenloom.worker.kernels.eight_bit import multiply_eight_bit
from tokenloom.worker.kernels.four_bit import (
    Few,
    choose_for,
    has_kernels,
    multiply_dense,
    multiply_four_bit,
)
from tokenloom.worker.kernels.linear import choose_cut, multiply
from tokenloom.worker.kernels.overlap import let_next_start, overlaps, wait_for_previous
from tokenloom.worker.kernels.streamed import choose_tiling, multiply_streamed
from tokenloom.worker.weights.linears import DenseLinear, EightBitLinear, FourBitLinear

if TYPE_CHECKING:
    from tokenloom.worker.attention import Pages
    from tokenloom.worker.weights.linears import Linear

_TILE_HEADS = 8
_TILE_COLUMNS = 1024


class FusedOperations(Operations):
    """Triton kernels. Nothing here waits for the device or depends on what tensors hold."""

    name = "triton"

    def begin_decode(
        self, slots: Tensor, ends: Tensor, tokens: Tensor, tables: Tensor, block_size: int
    ) -> DecodeRows:
        """Looks up where slots stand."""
        num_rows, num_entries = len(slots), tables.shape[1]
        rows = DecodeRows(
            positions=torch.empty_like(slots),
            tokens=tokens.new_empty(num_rows),
            kv_lengths=tokens.new_empty(num_rows),
            places=torch.empty_like(slots),
            block_tables=tables.new_empty((num_rows, num_entries)),
        )
        tile = min(1024, triton.next_power_of_2(num_entries))
        _begin_decode[(num_rows, triton.cdiv(num_entries, tile))](
            slots,
            ends,
            tokens,
            tables,
            rows.positions,
            rows.tokens,
            rows.kv_lengths,
            rows.places,
            rows.block_tables,
            tokens.shape[1],
            num_entries,
            BLOCK_SIZE=block_size,
            TILE=tile,
            num_warps=4,
        )
        return rows

    def end_decode(
        self,
        slots: Tensor,
        positions: Tensor,
        drawn: Tensor,
        faulty: Tensor,
        ends: Tensor,
        tokens: Tensor,
        idle_slot: int,
    ) -> Tensor:
        """Appends what was drawn to the slots and moves their ends on; the idle slot's stays."""
        results = torch.empty_like(drawn)
        _end_decode[(len(slots),)](
            slots,
            positions,
            drawn,
            faulty,
            ends,
            tokens,
            results,
            tokens.shape[1],
            idle_slot,
            FAULTY=FAULTY,
            num_warps=1,
        )
        return results

    def norm(self, rows: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Returns [num_rows, size] rows over their root mean square, times [size] weight."""
        return norms.norm(rows, None, weight, eps)

    def add_norm(self, hidden: Tensor, update: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Adds update to [num_rows, size] hidden in place and returns the norm of the sum."""
        return norms.norm(hidden, update, weight, eps)

    def place_heads(
        self,
        qkv: Tensor,
        angles: Tensor,
        places: Tensor,
        pages: Pages,
        layer: int,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
    ) -> Tensor:
        """Normalizes and rotates queries and keys, and writes keys and values to the pool."""
        keys, scales = pages.keys[layer], pages.scales
        block_size, num_kv_heads, head_dim = keys.shape[1:]
        num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
        queries = torch.empty(
            (len(qkv), num_heads, head_dim), dtype=qkv.dtype, device=qkv.device
        )  # [num_tokens, num_heads, head_dim]
        q_norm, k_norm = (None, None) if norms is None else norms
        tiles = triton.cdiv(num_heads, _TILE_HEADS) + 2 * triton.cdiv(num_kv_heads, _TILE_HEADS)
        overlapped = overlaps(qkv.device)
        _place_heads[(len(qkv), tiles)](
            qkv,
            angles,
            places,
            queries,
            keys,
            pages.values[layer],
            None if scales is None else scales.keys[layer],
            None if scales is None else scales.values[layer],
            q_norm,
            k_norm,
            eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=block_size,
            HALF=triton.next_power_of_2(head_dim // 2),
            TILE_HEADS=_TILE_HEADS,
            SMALLEST=SMALLEST,
            LARGEST=LARGEST,
            OVERLAPPED=overlapped,
            num_warps=2,
            launch_pdl=overlapped,
        )
        return queries

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Returns silu(gate) * up, [num_rows, size], for [num_rows, 2 * size] gate and up."""
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        product = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
        grid = (num_rows, triton.cdiv(size, _TILE_COLUMNS))
        overlapped = overlaps(gate_up.device)
        _silu_mul[grid](
            gate_up,
            product,
            size,
            TILE=_TILE_COLUMNS,
            OVERLAPPED=overlapped,
            num_warps=4,
            launch_pdl=overlapped,
        )
        return product

    def norm_sum(self, residual: Residual, weight: Tensor, eps: float) -> Tensor:
        """Returns the norm of the rows with all that was added, [num_rows, size]."""
        board = residual.board()
        if board is None:
            return super().norm_sum(residual, weight, eps)
        return norms.sum_norm(board, *residual.own_parts(), weight, eps)

    def _to_norm(
        self, residual: Residual, weight: Tensor, eps: float
    ) -> tuple[Tensor, tuple[Tensor, float] | None]:
        """Returns rows with all that was added, and the norm that a matmul is to begin with.

        A kernel that sums over ranks has their norm for nothing.
        """
        if residual.board() is None:
            return residual.sum(), (weight, eps)
        return self.norm_sum(residual, weight, eps), None

    def norm_linear(
        self,
        residual: Residual,
        weight: Tensor,
        eps: float,
        linear: Linear,
        out: Tensor | None = None,
    ) -> Tensor:
        """Returns the matrix times the normalized rows, [num_rows, num_outputs]."""
        if isinstance(linear, DenseLinear):
            if cut := choose_cut(len(residual), linear):
                rows, norm = self._to_norm(residual, weight, eps)
                if out is None:
                    out = rows.new_empty((len(rows), linear.shape[0]))
                return multiply(cut, rows, linear, out, norm=norm)
            if tiling := choose_tiling(len(residual), linear):
                rows = self.norm_sum(residual, weight, eps)
                return multiply_streamed(tiling, rows, linear, out)
        if isinstance(linear, EightBitLinear) and linear.threshold == 0:
            rows, norm = self._to_norm(residual, weight, eps)
            if out is None:
                out = rows.new_empty((len(rows), linear.shape[0]))
            return multiply_eight_bit(rows, linear, out, norm=norm)
        if isinstance(linear, FourBitLinear) and has_kernels(linear, weight.dtype):
            return self._norm_four_bit(residual, weight, eps, linear, out)
        return super().norm_linear(residual, weight, eps, linear, out)

    def norm_gate_up(
        self, residual: Residual, weight: Tensor, eps: float, linear: Linear
    ) -> Tensor:
        """Returns silu(gate) * up of the normalized rows, [num_rows, num_outputs / 2]."""
        if isinstance(linear, DenseLinear):
            if cut := choose_cut(len(residual), linear, gated=True):
                rows, norm = self._to_norm(residual, weight, eps)
                out = rows.new_empty((len(rows), linear.shape[0] // 2))
                return multiply(cut, rows, linear, out, norm=norm, gated=True)
            if tiling := choose_tiling(len(residual), linear, gated=True):
                rows = self.norm_sum(residual, weight, eps)
                return multiply_streamed(tiling, rows, linear, gated=True)
        if isinstance(linear, EightBitLinear) and linear.threshold == 0:
            rows, norm = self._to_norm(residual, weight, eps)
            out = rows.new_empty((len(rows), linear.shape[0] // 2))
            return multiply_eight_bit(rows, linear, out, norm=norm, gated=True)
        if isinstance(linear, FourBitLinear) and has_kernels(linear, weight.dtype):
            return self._norm_four_bit(residual, weight, eps, linear, gated=True)
        return super().norm_gate_up(residual, weight, eps, linear)

    def add_linear(self, residual: Residual, rows: Tensor, linear: Linear) -> None:
        """Adds the matrix times [num_rows, num_inputs] rows to the residual."""
        if isinstance(linear, DenseLinear) and (cut := choose_cut(len(rows), linear)):
            residual.add_now(lambda out, before: multiply(cut, rows, linear, out, residual=before))
        elif isinstance(linear, DenseLinear) and (
            tiling := choose_tiling(len(rows), linear, in_parts=True)
        ):
            residual.add_later(multiply_streamed(tiling, rows, linear))
        elif isinstance(linear, EightBitLinear) and linear.threshold == 0:
            residual.add_now(
                lambda out, before: multiply_eight_bit(rows, linear, out, residual=before)
            )
        elif isinstance(linear, FourBitLinear) and has_kernels(linear, rows.dtype):
            if way := choose_for(len(rows), linear):
                residual.add_now(
                    lambda out, before: multiply_four_bit(way, rows, linear, out, residual=before)
                )
            else:
                residual.add_later(multiply_dense(rows, linear))
        else:
            super().add_linear(residual, rows, linear)

    def _norm_four_bit(
        self,
        residual: Residual,
        weight: Tensor,
        eps: float,
        linear: FourBitLinear,
        out: Tensor | None = None,
        *,
        gated: bool = False,
    ) -> Tensor:
        """Returns what `norm_linear` does, with `gated` what `norm_gate_up` does."""
        way = choose_for(len(residual), linear)
        if isinstance(way, Few):
            rows, norm = self._to_norm(residual, weight, eps)
            return multiply_four_bit(way, rows, linear, out, norm=norm, gated=gated)
        rows = self.norm_sum(residual, weight, eps)
        if way is not None:
            return multiply_four_bit(way, rows, linear, out, gated=gated)
        product = multiply_dense(rows, linear, out)
        return self.silu_mul(product) if gated else product


@triton.jit(do_not_specialize=["max_tokens", "num_entries"])
def _begin_decode(
    slots: tl.tensor,
    ends: tl.tensor,
    tokens: tl.tensor,
    tables: tl.tensor,
    positions: tl.tensor,
    row_tokens: tl.tensor,
    kv_lengths: tl.tensor,
    places: tl.tensor,
    row_tables: tl.tensor,
    max_tokens: int,
    num_entries: int,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A program a row and tile of its table; the first tile's does the rest."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    table = tables + slot * num_entries
    entries = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = entries < num_entries
    copied = tl.load(table + entries, mask=inside)
    tl.store(row_tables + row * num_entries + entries, copied, mask=inside)
    if tl.program_id(1) == 0:
        position = tl.load(ends + slot)
        block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
        tl.store(positions + row, position)
        tl.store(row_tokens + row, tl.load(tokens + slot * max_tokens + position))
        tl.store(kv_lengths + row, (position + 1).to(tl.int32))
        tl.store(places + row, block * BLOCK_SIZE + position % BLOCK_SIZE)


@triton.jit(do_not_specialize=["max_tokens", "idle_slot"])
def _end_decode(
    slots: tl.tensor,
    positions: tl.tensor,
    drawn: tl.tensor,
    faulty: tl.tensor,
    ends: tl.tensor,
    tokens: tl.tensor,
    results: tl.tensor,
    max_tokens: int,
    idle_slot: int,
    FAULTY: tl.constexpr,
) -> None:
    """A program a row; those of the idle slot, which are many, write nothing to it."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    following = tl.load(positions + row) + 1
    token = tl.load(drawn + row)
    tl.store(results + row, tl.where(tl.load(faulty + row), FAULTY, token))
    if slot != idle_slot:
        tl.store(ends + slot, following)
        tl.store(tokens + slot * max_tokens + following, token)


@triton.jit
def _rotate_tile(
    source: tl.tensor,
    angles: tl.tensor,
    gains: tl.tensor,
    columns: tl.tensor,
    inside: tl.tensor,
    eps: float,
    HEAD_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Normalizes, if there are gains, and rotates [tile_heads, head_dim]; returns its halves."""
    half: tl.constexpr = HEAD_DIM // 2
    first = tl.load(source, mask=inside, other=0.0)
    dtype: tl.constexpr = first.dtype
    first = first.to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    if gains is not None:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        first_gain = tl.load(gains + columns, mask=columns < half, other=0.0).to(tl.float32)
        second_gain = tl.load(gains + half + columns, mask=columns < half, other=0.0)
        first = (first * scale).to(dtype).to(tl.float32) * first_gain
        second = (second * scale).to(dtype).to(tl.float32) * second_gain.to(tl.float32)
        first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
    cos = tl.load(angles + columns, mask=columns < half, other=0.0).to(tl.float32)
    sin = tl.load(angles + half + columns, mask=columns < half, other=0.0).to(tl.float32)
    left = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    right = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    return left.to(dtype), right.to(dtype)


@triton.jit
def _place_tile(
    left: tl.tensor,
    right: tl.tensor,
    target: tl.tensor,
    scales: tl.tensor,
    scales_at: tl.tensor,
    heads: tl.tensor,
    inside: tl.tensor,
    HEAD_DIM: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """Writes the halves of keys or values to the pool, as codes where it has scales (`fp8`)."""
    half: tl.constexpr = HEAD_DIM // 2
    if scales is not None:
        left, right = left.to(tl.float32), right.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(left), 1), tl.max(tl.abs(right), 1))[:, None]
        # 2^e, at least: what the mantissa has above that of 448 is carried to the exponent.
        bits = tl.maximum(largest, SMALLEST).to(tl.int32, bitcast=True)
        exponent = ((bits + 0x1FFFFF) >> 23) - (127 + 8)
        reciprocal = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        reciprocal = tl.where(largest <= LARGEST, reciprocal, float("nan"))
        left, right = left * reciprocal, right * reciprocal
        scale = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
        tl.store(scales + scales_at, scale, mask=heads < NUM_KV_HEADS)
    dtype: tl.constexpr = target.dtype.scalar.element_ty
    tl.store(target, left.to(dtype), mask=inside)
    tl.store(target + half, right.to(dtype), mask=inside)


@triton.jit
def _place_heads(
    qkv: tl.tensor,
    angles: tl.tensor,
    places: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    eps: float,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    OVERLAPPED: tl.constexpr,
) -> None:
    """A program a token and tile of heads: tiles of queries, then of keys, then of values."""
    let_next_start(OVERLAPPED)
    wait_for_previous(OVERLAPPED)
    half: tl.constexpr = HEAD_DIM // 2
    num_q_tiles: tl.constexpr = (NUM_HEADS + TILE_HEADS - 1) // TILE_HEADS
    num_kv_tiles: tl.constexpr = (NUM_KV_HEADS + TILE_HEADS - 1) // TILE_HEADS
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    columns = tl.arange(0, HALF)[None, :]
    tile_heads = tl.arange(0, TILE_HEADS)[:, None]
    q = qkv + token * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    k = q + NUM_HEADS * HEAD_DIM
    v = k + NUM_KV_HEADS * HEAD_DIM
    turn = angles + token * HEAD_DIM
    if tile < num_q_tiles:
        heads = tile * TILE_HEADS + tile_heads
        inside = (heads < NUM_HEADS) & (columns < half)
        cells = heads * HEAD_DIM + columns
        out = queries + token * NUM_HEADS * HEAD_DIM + cells
        left, right = _rotate_tile(q + cells, turn, q_norm, columns, inside, eps, HEAD_DIM)
        tl.store(out, left, mask=inside)
        tl.store(out + half, right, mask=inside)
    else:
        heads = (tile - num_q_tiles) % num_kv_tiles * TILE_HEADS + tile_heads
        inside = (heads < NUM_KV_HEADS) & (columns < half)
        cells = heads * HEAD_DIM + columns
        place = tl.load(places + token)
        pool_at = place * NUM_KV_HEADS * HEAD_DIM + cells
        scales_at = (place // BLOCK_SIZE * NUM_KV_HEADS + heads) * BLOCK_SIZE + place % BLOCK_SIZE
        if tile < num_q_tiles + num_kv_tiles:
            left, right = _rotate_tile(k + cells, turn, k_norm, columns, inside, eps, HEAD_DIM)
            _place_tile(
                left,
                right,
                keys + pool_at,
                key_scales,
                scales_at,
                heads,
                inside,
                HEAD_DIM,
                NUM_KV_HEADS,
                SMALLEST,
                LARGEST,
            )
        else:
            left = tl.load(v + cells, mask=inside, other=0.0)
            right = tl.load(v + half + cells, mask=inside, other=0.0)
            _place_tile(
                left,
                right,
                values + pool_at,
                value_scales,
                scales_at,
                heads,
                inside,
                HEAD_DIM,
                NUM_KV_HEADS,
                SMALLEST,
                LARGEST,
            )


@triton.jit
def _silu_mul(
    gate_up: tl.tensor,
    product: tl.tensor,
    size: int,
    TILE: tl.constexpr,
    OVERLAPPED: tl.constexpr,
) -> None:
    """A program a row and tile of columns."""
    let_next_start(OVERLAPPED)
    wait_for_previous(OVERLAPPED)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < size
    gate = tl.load(gate_up + row * 2 * size + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(product + row * size + columns, (activated * up.to(tl.float32)).to(gate.dtype), inside)
