"""8-bit matmuls in Triton's interpreter; `test_eight_bit.py` starts a process for it.

bfloat16 is left to the GPU: the interpreter cuts it off instead of rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from tests.worker import kernel_cases
from tests.worker.eight_bit_cases import assert_multiplies_like_its_twin
from tokenloom.worker.kernels import eight_bit
from tokenloom.worker.kernels.fused import FusedOperations

FP16 = torch.float16


@pytest.fixture(autouse=True)
def loops_over_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 takes an array of one number for an integer, which numpy 2.4 no longer does."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:  # noqa: ANN401 - Triton's own, without types
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "num_inputs", "bias"),
    [(1, 13, 40, False), (1, 5, 2100, True), (2, 37, 96, True), (19, 70, 300, False)],
)
def test_few_rows_lose_nothing_by_whole_numbers(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, num_outputs: int, num_inputs: int, bias: bool
) -> None:
    kernel_cases.poison_new_memory(monkeypatch)
    case = kernel_cases.eight_bit_case(
        num_rows, num_outputs, num_inputs, bias=bias, dtype=FP16, device="cpu"
    )
    assert_multiplies_like_its_twin(FusedOperations(), case)


@pytest.mark.parametrize(("num_rows", "num_outputs"), [(33, 40), (70, 130), (150, 30)])
def test_more_rows_are_quantized_to_one_byte(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, num_outputs: int
) -> None:
    kernel_cases.poison_new_memory(monkeypatch)
    case = kernel_cases.eight_bit_case(
        num_rows, num_outputs, 136, bias=True, dtype=FP16, device="cpu"
    )
    assert_multiplies_like_its_twin(FusedOperations(), case)


def test_rows_are_quantized_as_by_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")
    rows = (3 * torch.randn(7, 200, generator=torch.Generator().manual_seed(0))).half()
    codes, largest, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(rows.float(), 0.0)
    mine = eight_bit.quantize(rows, num_bytes=1)
    # One instruction multiplies and rounds, so what lies between two codes may be either.
    differences = (mine.codes[:, 0].int() - codes.int()).abs()
    assert differences.max() <= 1
    assert differences.sum() <= 7
    torch.testing.assert_close(mine.scales, largest / 127)


def test_two_bytes_say_a_number_to_the_16th_bit() -> None:
    rows = 5 * torch.randn(4, 100, generator=torch.Generator().manual_seed(1))
    rows[2] = 0
    mine = eight_bit.quantize(rows, num_bytes=2)
    upper, lower = mine.codes.float().unbind(1)
    error = (upper * 256 + lower) * mine.scales[:, None] - rows
    assert (error.abs().amax(1) <= rows.abs().amax(1) * 2**-15.9).all()
    assert torch.equal(mine.codes[2], torch.zeros(2, 100, dtype=torch.int8))


@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_faulty_row_stays_faulty_and_alone(num_rows: int, fault: float) -> None:
    case = kernel_cases.eight_bit_case(num_rows, 40, 64, bias=False, dtype=FP16, device="cpu")
    whole = case.apply(FusedOperations())
    case.hidden[0, 5] = fault
    for before, after in zip(whole, case.apply(FusedOperations()), strict=True):
        assert not after[0].isfinite().any()
        assert torch.equal(after[1:], before[1:])


def test_no_rows_are_no_work() -> None:
    case = kernel_cases.eight_bit_case(0, 40, 64, bias=True, dtype=FP16, device="cpu")
    assert [len(result) for result in case.apply(FusedOperations())] == [0, 0, 0]
