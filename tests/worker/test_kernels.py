"""What of the kernels can be tested without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.worker import kernel_cases
from tokenloom.worker.kernels import Residual
from tokenloom.worker.kernels.twin import TorchOperations

ROOT = Path(__file__).resolve().parents[2]


def test_interpreted_kernels_agree_with_their_twins() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.worker.interpreted"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_added_later_is_added_once() -> None:
    hidden = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    residual = Residual(hidden)
    residual.add_later(torch.tensor([[10.0, 10.0], [20.0, 20.0]]))
    residual.add_later(torch.tensor([[100.0, 0.0], [0.0, 100.0]]))
    last = residual.at(torch.tensor([1]))
    assert last.sum().tolist() == [[23.0, 124.0]]
    assert residual.sum().tolist() == [[111.0, 12.0], [23.0, 124.0]]
    assert residual.sum().tolist() == [[111.0, 12.0], [23.0, 124.0]]


def test_partial_sums_are_added_up_before_they_are_rounded() -> None:
    # To bfloat16 256 + 1 is 256; the next number is 258.
    residual = Residual(torch.zeros(2, 1, dtype=torch.bfloat16))
    residual.add_later(torch.tensor([[[256.0], [1.0]], [[1.0], [2.0]], [[1.0], [3.0]]]))
    assert residual.at(torch.tensor([1])).sum().tolist() == [[6.0]]
    assert residual.sum().tolist() == [[258.0], [6.0]]


def test_operations_with_a_matmul_are_made_of_the_others() -> None:
    case = kernel_cases.linear_case(3, 8, 16, bias=True, dtype=torch.float32, device="cpu")
    operations = TorchOperations()
    product, gated, added = case.apply(operations)
    expected = case.wide(operations.norm(case.hidden, case.norm_weight, kernel_cases.EPS))
    assert torch.equal(product, expected)
    assert torch.equal(gated, operations.silu_mul(expected))
    assert torch.equal(added, case.hidden + case.narrow(expected[:, :8]))


def test_ranks_add_the_sum_of_their_parts_once() -> None:
    case = kernel_cases.linear_case(3, 8, 16, bias=True, dtype=torch.float32, device="cpu")
    product, _, added = case.apply(TorchOperations(), kernel_cases.Twins())
    assert torch.equal(added, case.hidden + 2 * case.narrow(product[:, :8]))


def test_ranks_sum_only_the_rows_that_are_left() -> None:
    residual = Residual(torch.zeros(3, 2), ranks=kernel_cases.Twins())
    residual.add_later(torch.ones(3, 2))
    assert residual.at(torch.tensor([2, 0])).sum().tolist() == [[2.0, 2.0], [2.0, 2.0]]
    residual.add_now(
        lambda out, before: out.copy_(torch.full((3, 2), 3.0 if before is None else 9))
    )
    assert residual.sum().tolist() == [[8.0, 8.0]] * 3
