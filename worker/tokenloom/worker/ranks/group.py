"""A group over torch.distributed: NCCL between GPUs, gloo between CPUs.

Small sums between the GPUs of one machine are for kernels of ours to do (`board`).

Whatever is called here may be captured in a CUDA graph, but for `smallest`. A rank that is lost
leaves the others waiting; it is the core that notices and ends them.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, distributed

from tokenloom.worker.ranks.base import Ranks
from tokenloom.worker.ranks.board import (
    Board,
    board_shape,
    machine,
    most_rows,
    open_board,
    outlined_board,
)

_log = logging.getLogger(__name__)


class Group(Ranks):
    """The default group of torch.distributed."""

    def __init__(self, *, rank: int, num_ranks: int, device: torch.device) -> None:
        """Takes what this process has joined it as; on the meta device there need be none."""
        self.rank = rank
        self.num_ranks = num_ranks
        self._device = device
        self._board: Board | None = None

    def sum(self, parts: Tensor) -> Tensor:
        """Returns the sum of what all ranks have, in the memory of `parts`."""
        if not parts.is_meta:
            distributed.all_reduce(parts)
        return parts

    def prepare(self, max_rows: int, size: int, dtype: torch.dtype) -> None:
        """Opens the ranks' boards, if all can reach each other's."""
        num_rows = min(max_rows, most_rows(size, dtype.itemsize, self.num_ranks))
        shape = board_shape(num_rows, size, self.num_ranks)
        if num_rows == 0 or self._device.type == "cpu":
            return
        if self._device.type == "meta":
            self._board = outlined_board(self.rank, shape, dtype, self._device)
        elif self._on_one_machine():
            board = None
            try:
                board = open_board(self.rank, shape, dtype, self._device)
            except RuntimeError as error:
                _log.warning("all sums are the library's: %s", error)
            # Nobody writes before all have emptied theirs.
            self._board = board if self.smallest(int(board is not None)) else None

    def board(self, num_rows: int) -> Board | None:
        """Returns where kernels sum so many rows; None: `sum` is for them."""
        board = self._board
        return board if board is not None and num_rows <= board.num_rows else None

    def own(self, num_rows: int) -> slice:
        """Returns a run of rows: as many for each rank, while there are any."""
        counts = self._counts(num_rows)
        first = sum(counts[: self.rank])
        return slice(first, first + counts[self.rank])

    def spread(self, columns: Tensor, num_columns: int) -> Tensor:
        """Returns [num_own, num_columns] for [num_rows, size] columns of each rank."""
        num_rows, size = columns.shape
        counts = self._counts(num_rows)
        num_own = counts[self.rank]
        received = columns.new_empty((self.num_ranks, num_own, size))
        if not columns.is_meta:
            distributed.all_to_all_single(
                received.view(-1, size), columns, [num_own] * self.num_ranks, counts
            )
        rows = received.transpose(0, 1).reshape(num_own, self.num_ranks * size)
        return rows[:, :num_columns].contiguous()

    def gather(self, own: Tensor, num_rows: int) -> Tensor:
        """Returns [num_rows, …] of all ranks for [num_own, …] of each."""
        gathered = own.new_empty((num_rows, *own.shape[1:]))
        if not own.is_meta:
            copies = own.repeat(self.num_ranks, *(1 for _ in own.shape[1:]))
            distributed.all_to_all_single(
                gathered, copies, self._counts(num_rows), [len(own)] * self.num_ranks
            )
        return gathered

    def smallest(self, number: int) -> int:
        """Returns the smallest of the ranks' numbers."""
        held = torch.tensor(number, device=self._device)
        distributed.all_reduce(held, distributed.ReduceOp.MIN)
        return int(held)

    def _on_one_machine(self) -> bool:
        own = machine()
        return self.smallest(own) == -self.smallest(-own)

    def _counts(self, num_rows: int) -> list[int]:
        """Returns how many rows each rank draws: an even number, while there are any.

        So int64 slots of a rank's rows begin at a multiple of 16 bytes, as those of all rows
        do: kernels are compiled anew for tensors that do not.
        """
        num_each = -(-num_rows // (2 * self.num_ranks)) * 2
        return [min(max(num_rows - rank * num_each, 0), num_each) for rank in range(self.num_ranks)]
