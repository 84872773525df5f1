"""Matrices of 8 bits, as far as a CPU can tell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.worker import eight_bit_cases, kernel_cases
from tokenloom.worker.kernels import Residual
from tokenloom.worker.weights.linears import EightBitLinear
from tokenloom.worker.weights.merged import outline

ROOT = Path(__file__).resolve().parents[2]


def test_interpreted_kernels_agree_with_their_twins() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         "tests/worker/interpreted_eight_bit.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def with_outliers(num_rows: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(num_rows, 160, generator=rng).clamp(-5, 5)
    rows[0, 3], rows[-1, 100] = 30.0, -8.0
    return rows


def linear(threshold: float, *, bias: bool = False) -> EightBitLinear:
    made = kernel_cases.eight_bit_linear(48, 160, bias=bias, dtype=torch.float32, device="cpu")
    return EightBitLinear(codes=made.codes, scales=made.scales, bias=made.bias, threshold=threshold)


@pytest.mark.parametrize("num_rows", [1, 7])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threshold", [6.0, 40.0])
def test_outliers_are_multiplied_as_by_bitsandbytes(
    num_rows: int, bias: bool, threshold: float
) -> None:
    pytest.importorskip("bitsandbytes")
    ops, matrix, rows = (
        torch.ops.bitsandbytes,
        linear(threshold, bias=bias),
        with_outliers(num_rows),
    )
    codes, largest, columns = ops.int8_vectorwise_quant(rows.clone(), threshold)
    assert columns.tolist() == ([3, 100] if threshold == 6 else [])
    theirs, _ = ops.int8_mixed_scaled_mm(
        rows, codes, matrix.codes, largest, matrix.scales * 127, columns, matrix.bias
    )
    torch.testing.assert_close(matrix(rows), theirs, rtol=1e-4, atol=1e-4)
    out = torch.full((num_rows, 48), float("nan"))
    assert matrix(rows, out) is out
    assert torch.equal(out, matrix(rows))


def test_outliers_kept_apart_do_not_coarsen_the_rest() -> None:
    rows = with_outliers(7)
    right = eight_bit_cases.exact(rows, linear(0))

    def error(threshold: float) -> float:
        return float((linear(threshold)(rows) - right).norm() / right.norm())

    assert error(6.0) < 0.3 * error(1000.0)


def test_zeros_are_quantized_to_zeros() -> None:
    assert torch.equal(linear(6.0)(torch.zeros(2, 160)), torch.zeros(2, 48))


def test_steps_of_all_sizes_share_a_few_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from tokenloom.worker.kernels.fused import FusedOperations
    from tokenloom.worker.steps.ahead import recorded_launches

    monkeypatch.setattr(driver, "_active", object())  # There may be no GPU to ask for.
    matrix = outline(linear(0))
    gain = torch.empty(160, dtype=torch.bfloat16, device="meta")
    with recorded_launches(GPUTarget("cuda", 90, 32)) as launches:
        for num_rows in range(2, 2000, 7):
            residual = Residual(gain.expand(num_rows, 160).contiguous())
            FusedOperations().norm_linear(residual, gain, 1e-5, matrix)
            FusedOperations().norm_gate_up(residual, gain, 1e-5, matrix)
    names = [launch.kernel.fn.__name__ for launch in launches]
    assert names.count("_quantize") == 2  # of one byte and of two
    assert names.count("_multiply_codes") <= 2 * 6
