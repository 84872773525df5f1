"""The operations of a decoder layer that are no attention.

A norm sums in float32, is rounded to the rows' own type and then multiplied with
its weight, as transformers does it; kernel and twin differ by the order of that
sum, and by how a product is rounded before it is added to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from tokenloom.worker.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenloom.worker.attention import Pages
    from tokenloom.worker.ranks.board import Board
    from tokenloom.worker.weights.linears import Linear


FAULTY = -1
"""Stands for the token of a row whose logits were not finite."""


@dataclass(frozen=True, kw_only=True)
class DecodeRows:
    """Where each row of a decode step stands."""

    positions: Tensor
    """int64 [num_rows] of the token to compute"""
    tokens: Tensor
    """int32 [num_rows] that token"""
    kv_lengths: Tensor
    """int32 [num_rows] positions up to and with it"""
    places: Tensor
    """int64 [num_rows] block * block_size + offset where its K and V go"""
    block_tables: Tensor
    """int32 [num_rows, max_slot_blocks]"""


class Residual:
    """The hidden states that run through the layers, which each adds to.

    What a matmul adds may be left aside: whoever normalizes the sum next adds it
    in the same pass. It is [num_rows, hidden_size] like the states or, unfinished,
    float32 [num_splits, num_rows, hidden_size] partial sums of it. All ranks have
    the same states; of an update each has a part, and the ranks' sum is what is added.
    """

    def __init__(
        self, hidden: Tensor, update: Tensor | None = None, *, ranks: Ranks = ALONE
    ) -> None:
        """Takes [num_rows, hidden_size] states, to be changed in place, and what they lack."""
        self._hidden = hidden
        self._update = update
        self._ranks = ranks

    def __len__(self) -> int:
        return len(self._hidden)

    def add_later(self, update: Tensor) -> None:
        """Leaves aside what is to be added."""
        self._hidden, self._update = self.sum(), update

    def add_now(self, multiply: Callable[[Tensor, Tensor | None], object]) -> None:
        """Adds what a kernel computes, in the same pass if this rank has all of it.

        `multiply` takes where the result goes, and what it is added to: the same, or None.
        """
        if self._ranks.num_ranks == 1:
            hidden = self.sum()
            multiply(hidden, hidden)
        else:
            update = torch.empty_like(self._hidden)
            multiply(update, None)
            self.add_later(update)

    def board(self) -> Board | None:
        """Returns where a kernel can sum what all ranks left aside; None: there is no such sum."""
        return None if self._update is None else self._ranks.board(len(self._hidden))

    def own_parts(self) -> tuple[Tensor, Tensor]:
        """Returns the states, and of what the caller is to add to them, summed, this rank's part.

        For whoever got the `board` to sum it on.
        """
        update, self._update = self._update, None
        assert update is not None
        return self._hidden, update

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Returns the states, and what the caller is now to add to them in place."""
        update, self._update = self._update, None
        if update is not None and self._ranks.num_ranks > 1:
            update = self._ranks.sum(finished(update, self._hidden.dtype))
        return self._hidden, update

    def sum(self) -> Tensor:
        """Returns the states with all that was added; changes in place are changes to them."""
        hidden, update = self.parts()
        return hidden if update is None else hidden.add_(finished(update, hidden.dtype))

    def at(self, rows: Tensor) -> Residual:
        """Returns a copy of int64 [num_rows] rows."""
        update = None if self._update is None else self._update[..., rows, :]
        return Residual(self._hidden[rows], update, ranks=self._ranks)


def finished(update: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns [num_rows, size] of an update: partial sums are added up and rounded once."""
    return update if update.dim() == 2 else update.sum(0).to(dtype)


class Operations(Protocol):
    """Tensors are contiguous; activations, weights and angles are of one type.

    Those with a matmul are made of the others here, so an implementation that has
    nothing better inherits them.
    """

    name: str

    def begin_decode(
        self, slots: Tensor, ends: Tensor, tokens: Tensor, tables: Tensor, block_size: int
    ) -> DecodeRows:
        """Looks up where slots stand.

        Args:
            slots: int64 [num_rows].
            ends: int64 [num_slots] tokens that each slot has computed.
            tokens: int32 [num_slots, max_tokens] of each slot.
            tables: int32 [num_slots, max_slot_blocks] block table of each slot.
            block_size: Positions in a block.
        """

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
        """Appends what was drawn to the slots and moves their ends on; the idle slot's stays.

        Args:
            slots: As in `begin_decode`, like ends and tokens.
            positions: int64 [num_rows] of the tokens that were computed.
            drawn: int32 [num_rows].
            faulty: bool [num_rows] rows whose logits were not finite.
            ends: Changed in place.
            tokens: Changed in place.
            idle_slot: The one that is nobody's.

        Returns:
            int32 [num_rows] drawn tokens, FAULTY for faulty rows.
        """

    def norm(self, rows: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Returns [num_rows, size] rows over their root mean square, times [size] weight."""

    def add_norm(self, hidden: Tensor, update: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Adds update, as a `Residual` has it, to [num_rows, size] hidden in place.

        Returns:
            The norm of the sum, [num_rows, size].
        """

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
        """Normalizes and rotates queries and keys, and writes keys and values to the pool.

        Args:
            qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim].
            angles: [num_tokens, 2, head_dim / 2] cosines, sines.
            places: int64 [num_tokens] block * block_size + offset of each token.
            pages: The KV pool.
            layer: The one of it that is written to.
            norms: [head_dim] weights of the norms of queries and of keys, if it has them.
            eps: Of those norms.

        Returns:
            Queries [num_tokens, num_heads, head_dim].
        """

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Returns silu(gate) * up, [num_rows, size], for [num_rows, 2 * size] gate and up."""

    def norm_sum(self, residual: Residual, weight: Tensor, eps: float) -> Tensor:
        """Returns the norm of the rows with all that was added, [num_rows, size]."""
        hidden, update = residual.parts()
        if update is None:
            return self.norm(hidden, weight, eps)
        return self.add_norm(hidden, update, weight, eps)

    def norm_linear(
        self,
        residual: Residual,
        weight: Tensor,
        eps: float,
        linear: Linear,
        out: Tensor | None = None,
    ) -> Tensor:
        """Returns the matrix times the normalized rows, [num_rows, num_outputs], in `out` if given.

        Args:
            residual: [num_rows, num_inputs] rows.
            weight: [num_inputs] of the norm.
            eps: Of the norm.
            linear: The matrix.
            out: Where the result goes, if that matters.
        """
        return linear(self.norm_sum(residual, weight, eps), out)

    def norm_gate_up(
        self, residual: Residual, weight: Tensor, eps: float, linear: Linear
    ) -> Tensor:
        """Returns silu(gate) * up of the normalized rows, [num_rows, num_outputs / 2].

        The matrix is gate and up; others as in `norm_linear`.
        """
        return self.silu_mul(self.norm_linear(residual, weight, eps, linear))

    def add_linear(self, residual: Residual, rows: Tensor, linear: Linear) -> None:
        """Adds the matrix times [num_rows, num_inputs] rows to the residual."""
        residual.add_later(linear(rows))
