"""What of sums over boards can be tested without GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokenloom.worker.kernels import Residual
from tokenloom.worker.ranks import ALONE
from tokenloom.worker.ranks.board import empty_bits, machine, most_rows, word_of
from tokenloom.worker.ranks.group import Group

ROOT = Path(__file__).resolve().parents[2]
META = torch.device("meta")


def test_ranks_that_wait_for_each_other_have_the_same_sums() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.worker.interpreted_boards"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("size", "item_bytes", "num_ranks", "num_rows"),
    [
        (1024, 2, 2, 2048),
        (4096, 2, 2, 2048),
        (8192, 2, 2, 1024),
        (8192, 2, 4, 341),
        (4096, 2, 8, 292),
        (8192, 4, 2, 512),
        (1 << 24, 2, 8, 0),
    ],
)
def test_a_rank_sends_what_is_sooner_there_than_by_the_library(
    size: int, item_bytes: int, num_ranks: int, num_rows: int
) -> None:
    assert most_rows(size, item_bytes, num_ranks) == num_rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_empty_cell_says_minus_zero(dtype: torch.dtype) -> None:
    bits = torch.tensor([-0.0], dtype=dtype).view(word_of(dtype))
    assert bits.tolist() == [empty_bits(word_of(dtype))]


def group(num_ranks: int = 2, *, max_rows: int = 8192, size: int = 4096) -> Group:
    ranks = Group(rank=1, num_ranks=num_ranks, device=META)
    ranks.prepare(max_rows, size, torch.bfloat16)
    return ranks


def test_sums_of_more_rows_than_a_board_has_are_the_librarys() -> None:
    assert group().board(2048) is not None
    assert group().board(2049) is None
    assert group(max_rows=5).board(6) is None
    assert group(num_ranks=8, size=1 << 24).board(1) is None
    assert ALONE.board(1) is None


def test_only_what_ranks_left_aside_goes_over_boards() -> None:
    hidden = torch.zeros(3, 4096, dtype=torch.bfloat16, device=META)
    residual = Residual(hidden, ranks=group())
    assert residual.board() is None
    update = torch.empty_like(hidden)
    residual.add_later(update)
    assert residual.board() is not None
    states, part = residual.own_parts()
    assert states is hidden
    assert part is update
    assert residual.board() is None


def test_processes_of_one_machine_know_each_other() -> None:
    program = "from tokenloom.worker.ranks.board import machine; print(machine())"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert int(told.stdout) == machine()
