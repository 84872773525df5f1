"""Ranks that sum over boards, in Triton's interpreter; started by a test, in a process of its own.

    TRITON_INTERPRET=1 python -m tests.worker.interpreted_boards

Each rank is a process and its board is memory that all of them map: they wait for each other as
GPUs do. Sums are those of the library on two ranks, beside the twin's norm, or a product of it.
"""

from __future__ import annotations

import multiprocessing
import random
import sys
import time

import torch
from torch import Tensor

from tests.worker.kernel_cases import EPS, ULP
from tokenloom.worker.kernels import Residual
from tokenloom.worker.kernels.fused import FusedOperations
from tokenloom.worker.kernels.norms import sum_norm
from tokenloom.worker.kernels.twin import TorchOperations
from tokenloom.worker.ranks import Alone
from tokenloom.worker.ranks.board import Board, board_shape, empty_bits, word_of
from tokenloom.worker.weights.linears import DenseLinear

NUM_ROWS, SIZE = 3, 100
NUM_STEPS = 12
TIMEOUT_S = 60.0


def step_of(index: int, num_ranks: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
    """Returns rows, each rank's update, and a norm's weight; each other update is partial sums."""
    rng = torch.Generator().manual_seed(index)
    num_rows = rng.initial_seed() % NUM_ROWS + 1
    rows = torch.randn(num_rows, SIZE, generator=rng).to(dtype)
    shape = (2, num_rows, SIZE) if index % 2 else (num_rows, SIZE)
    updates = [torch.randn(*shape, generator=rng) for _ in range(num_ranks)]
    for update in updates:
        update[..., 0] = -0.0  # what a cell without a part holds
    updates[index % num_ranks][..., 0, 7] = float("nan") if index == 5 else -0.0
    if index % 2 == 0:
        updates = [update.to(dtype) for update in updates]
    return rows, updates, (1 + 0.2 * torch.randn(SIZE, generator=rng)).to(dtype)


class Boarded(Alone):
    """Ranks that have a board."""

    def __init__(self, board: Board) -> None:
        self.num_ranks = board.num_ranks
        self._board = board

    def board(self, num_rows: int) -> Board:
        assert num_rows <= self._board.num_rows
        return self._board


def matrix(dtype: torch.dtype) -> DenseLinear:
    rng = torch.Generator().manual_seed(1)
    weight = (0.1 * torch.randn(SIZE, SIZE, generator=rng)).to(dtype)
    return DenseLinear(weight=weight, bias=None)


def run(rank: int, boards: list[Tensor], results: Tensor, dtype: torch.dtype) -> None:
    """Sums as a rank, faster or slower than the others; writes what came of it."""
    pace = random.Random(rank)
    num_ranks = len(boards)
    turns = torch.zeros(NUM_ROWS, dtype=torch.int32)
    board = Board(rank=rank, cells=tuple(boards), turns=turns)
    for index in range(NUM_STEPS):
        rows, updates, weight = step_of(index, num_ranks, dtype)
        time.sleep(pace.choice([0, 0, 0.05]))
        if index % 4 < 2:
            result = sum_norm(board, rows, updates[rank], weight, EPS)
        else:
            residual = Residual(rows, updates[rank], ranks=Boarded(board))
            result = FusedOperations().norm_linear(residual, weight, EPS, matrix(dtype))
        results[rank, index, 0, : len(rows)] = rows
        results[rank, index, 1, : len(rows)] = result


def expect(results: Tensor, num_ranks: int, dtype: torch.dtype) -> None:
    twin = TorchOperations()
    for index in range(NUM_STEPS):
        rows, updates, weight = step_of(index, num_ranks, dtype)
        parts = [(each.sum(0) if each.dim() == 3 else each).to(dtype) for each in updates]
        total = torch.zeros(rows.shape)
        for part in parts:
            total += part.float()
        expected = twin.add_norm(rows, total.to(dtype), weight, EPS)
        if index % 4 >= 2:
            expected = matrix(dtype)(expected)
        for rank in range(num_ranks):
            found = results[rank, index, :, : len(rows)]
            assert torch.equal(found.nan_to_num(), results[0, index, :, : len(rows)].nan_to_num())
            torch.testing.assert_close(found[0], rows, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(
                found[1], expected, rtol=2 * ULP[dtype], atol=ULP[dtype], equal_nan=True
            )


def main() -> None:
    context = multiprocessing.get_context("fork")
    for num_ranks, dtype in ((2, torch.float16), (3, torch.float32)):
        shape = board_shape(NUM_ROWS, SIZE, num_ranks)
        word = word_of(dtype)
        boards = [
            torch.full(shape, empty_bits(word), dtype=word).share_memory_()  # type: ignore[no-untyped-call]
            for _ in range(num_ranks)
        ]
        results = torch.zeros(num_ranks, NUM_STEPS, 2, NUM_ROWS, SIZE, dtype=dtype).share_memory_()  # type: ignore[no-untyped-call]
        ranks = [
            context.Process(target=run, args=(rank, boards, results, dtype), daemon=True)
            for rank in range(num_ranks)
        ]
        for each in ranks:
            each.start()
        deadline = time.monotonic() + TIMEOUT_S
        for each in ranks:
            each.join(max(0.0, deadline - time.monotonic()))
        if codes := [each.exitcode for each in ranks if each.exitcode != 0]:
            sys.exit(f"of {num_ranks} ranks these did not end well: {codes}; None: not at all")
        expect(results, num_ranks, dtype)
        assert all((each == empty_bits(word)).all() for each in boards)


if __name__ == "__main__":
    main()
