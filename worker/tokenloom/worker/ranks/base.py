"""The seam between a rank and the others that hold the rest of its model.

    sum      each rank has a part of every number      ─▶  all have the sums
    spread   each has all rows, for its tokens alone   ─▶  each has its own rows, for all tokens
    gather   each has what came of its own rows        ─▶  all have what came of all rows

    logits of 3 rows, 2 ranks        drawn there             known to both
    rank 0  a0 b0 c0                 a0 a1   b0 b1           a b c
    rank 1  a1 b1 c1       spread    c0 c1         gather    a b c

So a row's token is drawn by one rank, from the logits of the whole vocabulary, as one GPU
draws it, whatever restricts or changes it; and each rank has as many logits as before.
All ranks call the same methods in the same order, with tensors of the same sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    import torch

    from tokenloom.worker.ranks.board import Board


class Ranks(Protocol):
    """The group, as one of its ranks sees it. On torch's meta device nothing is sent."""

    rank: int
    num_ranks: int

    def sum(self, parts: Tensor) -> Tensor:
        """Returns the sum of what all ranks have, in the memory of `parts`, which is contiguous."""

    def prepare(self, max_rows: int, size: int, dtype: torch.dtype) -> None:
        """Makes ready to sum so many rows of a size in kernels, where that pays and can be.

        To be called once at most, before steps are recorded or captured.
        """

    def board(self, num_rows: int) -> Board | None:
        """Returns where kernels sum so many rows of that size; None: `sum` is for them."""

    def own(self, num_rows: int) -> slice:
        """Returns which of so many rows are this rank's to draw; for the last ranks maybe none."""

    def spread(self, columns: Tensor, num_columns: int) -> Tensor:
        """Returns its own rows with the columns of all ranks.

        Args:
            columns: [num_rows, size], contiguous: this rank's columns of all rows.
            num_columns: How many all ranks have; what is more is the last ranks' and left out.

        Returns:
            [num_own, num_columns], contiguous.
        """

    def gather(self, own: Tensor, num_rows: int) -> Tensor:
        """Returns [num_rows, …] of all ranks for [num_own, …] of each."""

    def smallest(self, number: int) -> int:
        """Returns the smallest of the ranks' numbers; waits for all of them."""


class Alone(Ranks):
    """A rank that is the whole group."""

    rank = 0
    num_ranks = 1

    def sum(self, parts: Tensor) -> Tensor:
        """Returns the parts, which are whole."""
        return parts

    def prepare(self, max_rows: int, size: int, dtype: torch.dtype) -> None:
        """There is nothing to sum."""

    def board(self, num_rows: int) -> Board | None:  # noqa: ARG002 - none is large enough
        """There is none."""
        return None

    def own(self, num_rows: int) -> slice:
        """Returns all of the rows."""
        return slice(0, num_rows)

    def spread(self, columns: Tensor, num_columns: int) -> Tensor:
        """Returns the rows as they are."""
        assert columns.shape[1] == num_columns
        return columns

    def gather(self, own: Tensor, num_rows: int) -> Tensor:
        """Returns the rows as they are."""
        assert len(own) == num_rows
        return own

    def smallest(self, number: int) -> int:
        """Returns the number."""
        return number


ALONE = Alone()
