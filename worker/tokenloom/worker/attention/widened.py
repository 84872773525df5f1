"""Codes of keys and values for a backend that cannot read them.

The blocks of a step's requests are widened, layer by layer, into a room of blocks in the
queries' type, which the backend then reads. Widening is exact (`fp8`), so the backend sees
what kernels see that read codes.

    pool's blocks, codes         ·  ·  7  ·  2  ·  ·  5  ·
    block tables                 [ 7, 2 ] [ 5, 7, 2 ]
    room's blocks, widened       7  2  5  7  2  ·  ·
    the backend's block tables   [ 0, 1 ] [ 2, 3, 4 ]

The room holds any single request and a step's tokens beside it. Of several long requests
in one step the first ones go there, as many as fit; the others are read by our own kernel,
slower, where they are. Who that is, is found out on the device: nothing waits for it, and
a captured step stays right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenloom.worker.attention.base import Attention, Pages, Spans
from tokenloom.worker.attention.paged import PagedAttention

_TILE_ROWS = 32
"""Heads of positions that a program widens."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How a step's spans are read."""

    spans: Spans
    """Those of the step"""
    sources: Tensor
    """int32 [num_room_blocks] block of the pool that each block of the room holds; -1: none"""
    widened: Spans
    """The spans with block tables of the room"""
    rest: Spans | None
    """The spans, where those in the room have a kv_length of 0; None: all fit, whatever they are"""


class WidenedAttention:
    """A backend over a room of widened blocks. Calls share it, so they are to be in one stream."""

    def __init__(self, inner: Attention, num_positions: int) -> None:
        """The room is for `num_positions` positions, and made when it is first needed."""
        self.name = f"{inner.name} on widened keys"
        self.block_size = inner.block_size
        self.capturable = inner.capturable
        self._inner = inner
        self._in_place = PagedAttention(inner.block_size)
        self._num_blocks = -(-num_positions // inner.block_size)
        self.num_widened = self._num_blocks * inner.block_size
        self._rooms: dict[torch.device, Pages] = {}
        self._plan: _Plan | None = None

    def load(self) -> None:
        """Imports what the backend does."""
        self._inner.load()

    def attend(
        self, pages: Pages, layer: int, queries: Tensor, spans: Spans, window: int | None
    ) -> Tensor:
        """Returns [num_tokens, num_heads, head_dim] for queries of that shape."""
        if self._plan is None or self._plan.spans is not spans:  # one for all layers
            self._plan = self._planned(spans)
        plan, room = self._plan, self._fill(pages, layer, queries.dtype, self._plan.sources)
        mixed = self._inner.attend(room, 0, queries, plan.widened, window)
        if plan.rest is not None:
            self._in_place.attend_into(mixed, pages, layer, queries, plan.rest, window)
        return mixed

    def _planned(self, spans: Spans) -> _Plan:
        tables, room = spans.block_tables, self._num_blocks
        max_blocks, device = tables.shape[1], tables.device
        num_blocks = -(-spans.kv_lengths // self.block_size)
        ends = num_blocks.cumsum(0, dtype=torch.int32)
        begins = ends - num_blocks
        at = torch.arange(room, dtype=torch.int32, device=device)
        owners = torch.searchsorted(ends, at, right=True).clamp(max=spans.num_spans - 1)
        sources = tables[owners, (at - begins[owners]).clamp(0, max_blocks - 1)]
        entries = begins[:, None] + torch.arange(max_blocks, dtype=torch.int32, device=device)
        rest = None
        if spans.num_spans * max_blocks > room:
            fits = ends <= room
            rest = replace(spans, kv_lengths=spans.kv_lengths.masked_fill(fits, 0))
        return _Plan(
            spans=spans,
            sources=sources.masked_fill(at >= ends[-1], -1),
            # What does not fit is computed all the same, from whatever is there, and overwritten.
            widened=replace(spans, block_tables=entries.clamp(max=room - 1)),
            rest=rest,
        )

    def _fill(self, pages: Pages, layer: int, dtype: torch.dtype, sources: Tensor) -> Pages:
        """Returns the room with a layer's blocks in it."""
        assert pages.scales is not None
        keys, values, scales = pages.keys[layer], pages.values[layer], pages.scales
        block_size, num_kv_heads, head_dim = keys.shape[1:]
        if keys.device not in self._rooms:
            shape = (1, self._num_blocks, block_size, num_kv_heads, head_dim)
            self._rooms[keys.device] = Pages(
                keys=torch.zeros(shape, dtype=dtype, device=keys.device),
                values=torch.zeros(shape, dtype=dtype, device=keys.device),
            )
        room = self._rooms[keys.device]
        tiles = triton.cdiv(block_size * num_kv_heads, _TILE_ROWS)
        _widen[(self._num_blocks, tiles, 2)](
            keys,
            values,
            scales.keys[layer],
            scales.values[layer],
            sources,
            room.keys,
            room.values,
            KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            DIMS=triton.next_power_of_2(head_dim),
            BLOCK_SIZE=block_size,
            ROWS=_TILE_ROWS,
            num_warps=4,
        )
        return room


@triton.jit
def _widen(
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    sources: tl.tensor,
    room_keys: tl.tensor,
    room_values: tl.tensor,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """A program a block of the room, tile of its heads, and keys or values."""
    block = tl.program_id(0).to(tl.int64)
    source = tl.load(sources + block).to(tl.int64)
    if source < 0:
        return
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)[None, :]
    in_block = rows < BLOCK_SIZE * KV_HEADS
    inside = in_block[:, None] & (dims < HEAD_DIM)
    cells = rows[:, None] * HEAD_DIM + dims
    scales_at = (source * KV_HEADS + rows % KV_HEADS) * BLOCK_SIZE + rows // KV_HEADS
    source_cells = source * (BLOCK_SIZE * KV_HEADS * HEAD_DIM) + cells
    room_cells = block * (BLOCK_SIZE * KV_HEADS * HEAD_DIM) + cells
    if tl.program_id(2) == 0:
        codes, scales, target = keys, key_scales, room_keys
    else:
        codes, scales, target = values, value_scales, room_values
    scale = tl.load(scales + scales_at, mask=in_block, other=1.0)
    wide = tl.load(codes + source_cells, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
    tl.store(target + room_cells, wide.to(target.dtype.element_ty), mask=inside)
