"""The operations in plain torch: the CPU's, and what kernels are tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from tokenloom.worker.fp8 import to_codes
from tokenloom.worker.kernels.base import FAULTY, DecodeRows, Operations, finished
from tokenloom.worker.rotary import rotate

if TYPE_CHECKING:
    from tokenloom.worker.attention import Pages


class TorchOperations(Operations):
    """One torch call after the other, as transformers does it."""

    name = "torch"

    def begin_decode(
        self, slots: Tensor, ends: Tensor, tokens: Tensor, tables: Tensor, block_size: int
    ) -> DecodeRows:
        """Looks up where slots stand."""
        positions = ends[slots]
        rows = tables[slots]  # [num_rows, max_slot_blocks]
        blocks = rows.gather(1, (positions // block_size)[:, None]).squeeze(1)
        return DecodeRows(
            positions=positions,
            tokens=tokens[slots, positions],
            kv_lengths=(positions + 1).int(),
            places=blocks.long() * block_size + positions % block_size,
            block_tables=rows,
        )

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
        tokens[slots, positions + 1] = drawn
        ends[slots] = positions + (slots != idle_slot)
        return drawn.masked_fill(faulty, FAULTY)

    def norm(self, rows: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Returns [num_rows, size] rows over their root mean square, times [size] weight."""
        wide = rows.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * (wide * scale).to(rows.dtype)

    def add_norm(self, hidden: Tensor, update: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Adds update to [num_rows, size] hidden in place and returns the norm of the sum."""
        return self.norm(hidden.add_(finished(update, hidden.dtype)), weight, eps)

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
        num_kv_heads, head_dim = pages.keys.shape[-2:]
        heads = qkv.view(len(qkv), -1, head_dim)
        num_heads = heads.shape[1] - 2 * num_kv_heads
        q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if norms is not None:
            q, k = self.norm(q, norms[0], eps), self.norm(k, norms[1], eps)
        cos, sin = angles.unsqueeze(2).unbind(1)  # each [num_tokens, 1, head_dim / 2]
        k, scales = rotate(k, cos, sin), pages.scales
        if scales is None:
            _place(k, pages.keys[layer], places)
            _place(v, pages.values[layer], places)
        else:
            _place_codes(k, pages.keys[layer], scales.keys[layer], places)
            _place_codes(v, pages.values[layer], scales.values[layer], places)
        return rotate(q, cos, sin)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Returns silu(gate) * up, [num_rows, size], for [num_rows, 2 * size] gate and up."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up


def _place(rows: Tensor, pool: Tensor, places: Tensor) -> None:
    """Writes [num_tokens, num_kv_heads, head_dim] to [num_blocks, block_size, …] of a layer."""
    pool.flatten(0, 1).index_copy_(0, places, rows)


def _place_codes(rows: Tensor, pool: Tensor, pool_scales: Tensor, places: Tensor) -> None:
    """Writes their codes; `pool_scales` is [num_blocks, num_kv_heads, block_size]."""
    codes, scales = to_codes(rows)
    _place(codes.view(torch.uint8), pool.view(torch.uint8), places)  # torch copies no codes
    block_size = pool.shape[1]
    pool_scales[places // block_size, :, places % block_size] = scales
