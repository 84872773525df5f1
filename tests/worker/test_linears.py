"""Matrices of codes as plain torch multiplies them: in rooms whose size is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.worker.four_bit_cases import four_bit_linear
from tests.worker.kernel_cases import eight_bit_linear
from tokenloom.worker.memory import MAX_WEIGHT_BYTES
from tokenloom.worker.weights import linears
from tokenloom.worker.weights.linears import EightBitLinear, FourBitLinear

SHAPE = (130, 256)


def made(kind: str, *, bias: bool) -> FourBitLinear | EightBitLinear:
    if kind == "nf4":
        return four_bit_linear(*SHAPE, bias=bias, dtype=torch.bfloat16, device="cpu")
    whole = eight_bit_linear(*SHAPE, bias=bias, dtype=torch.bfloat16, device="cpu")
    return replace(whole, threshold=2.5 if kind == "outliers" else 0.0)


@pytest.mark.parametrize("kind", ["nf4", "int8", "outliers"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("at_once", [130, 64, 5])
def test_no_more_than_a_room_is_made_dense_at_a_time(
    monkeypatch: pytest.MonkeyPatch, kind: str, at_once: int, given: bool, bias: bool
) -> None:
    matrix = made(kind, bias=bias)
    rows = torch.randn(7, 256, generator=torch.Generator().manual_seed(7)).bfloat16()
    whole = matrix(rows)
    dense, sizes = type(matrix).dense, []

    def counted(part: FourBitLinear | EightBitLinear, dtype: torch.dtype) -> Tensor:
        values: Tensor = dense(part, dtype)  # type: ignore[arg-type]
        sizes.append(len(values))
        return values

    monkeypatch.setattr(type(matrix), "dense", counted)
    monkeypatch.setattr(linears, "DENSE_BYTES", at_once * 256 * MAX_WEIGHT_BYTES)
    out = torch.full((7, 130), float("nan"), dtype=torch.bfloat16) if given else None
    product = matrix(rows, out)
    torch.testing.assert_close(product, whole, rtol=2**-7, atol=2**-7)
    assert (product is out) == given
    assert max(sizes) == at_once
    assert sum(sizes) == 130


def test_rows_are_left_as_they_are_when_outliers_are_parted() -> None:
    matrix = made("outliers", bias=False)
    rows = torch.randn(7, 256)
    before = rows.clone()
    matrix(rows)
    assert torch.equal(rows, before)
