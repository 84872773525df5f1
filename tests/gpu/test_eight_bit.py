"""8-bit matmuls on the GPU, over the matrices of models that are served."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.worker import kernel_cases
from tests.worker.eight_bit_cases import EightBitTwin, assert_multiplies_like_its_twin, exact
from tokenloom.worker.kernels import Residual, eight_bit
from tokenloom.worker.kernels.fused import FusedOperations
from tokenloom.worker.weights.linears import EightBitLinear

BF16, FP16 = torch.bfloat16, torch.float16
EPS = kernel_cases.EPS
NUM_ROWS = (1, 2, 8, 9, 16, 32, 33, 64, 65, 128, 200, 512)
MODELS = {
    # hidden size, intermediate size, outputs of qkv, heads times their size
    "llama-3-8b": (4096, 14336, 6144, 4096),
    "llama-3-70b": (8192, 28672, 10240, 8192),
    "qwen3-0.6b": (1024, 3072, 4096, 2048),
    "qwen3-8b": (4096, 12288, 6144, 4096),
    "qwen3-32b": (5120, 25600, 10240, 8192),
}


def matrices() -> list[tuple[str, int, int]]:
    """Returns (operation, outputs, inputs) of all layers, by ranks that share them, once each."""
    found: dict[tuple[str, int, int], None] = {}
    for hidden_size, intermediate_size, num_all, num_q in MODELS.values():
        for ranks in (1, 2, 4):
            found["norm_linear", num_all // ranks, hidden_size] = None
            found["add_linear", hidden_size, num_q // ranks] = None
            found["norm_gate_up", 2 * intermediate_size // ranks, hidden_size] = None
            found["add_linear", hidden_size, intermediate_size // ranks] = None
    return list(found)


def apply(
    operations: FusedOperations | EightBitTwin,
    operation: str,
    rows: Tensor,
    gain: Tensor,
    linear: EightBitLinear,
) -> Tensor:
    if operation == "norm_linear":
        return operations.norm_linear(Residual(rows), gain, EPS, linear)
    if operation == "norm_gate_up":
        return operations.norm_gate_up(Residual(rows), gain, EPS, linear)
    before = torch.linspace(-2, 2, len(rows) * len(linear.codes), device="cuda")
    residual = Residual(before.view(len(rows), -1).to(rows.dtype))
    operations.add_linear(residual, rows, linear)
    return residual.sum()


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("operation", "num_outputs", "num_inputs"), matrices())
def test_matrices_of_models_are_multiplied_as_by_the_twin(
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    num_outputs: int,
    num_inputs: int,
    dtype: torch.dtype,
) -> None:
    kernel_cases.poison_new_memory(monkeypatch)
    linear = kernel_cases.eight_bit_linear(
        num_outputs, num_inputs, bias=False, dtype=dtype, device="cuda"
    )
    rows = torch.randn(max(NUM_ROWS), num_inputs, device="cuda").to(dtype)
    gain = (1 + 0.2 * torch.randn(num_inputs, device="cuda")).to(dtype)
    for num_rows in NUM_ROWS:
        some = rows[-num_rows:].contiguous()
        mine = apply(FusedOperations(), operation, some, gain, linear)
        twin = EightBitTwin(quantizes=num_rows > 32)
        expected = apply(twin, operation, some, gain, linear)
        wrong = (mine.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)
        # Silu(gate) * up is rounded four times, not once.
        rounding = kernel_cases.ULP[dtype] / (1 if operation == "norm_gate_up" else 2)
        # A number between two codes may become either, and the largest may be rounded to another:
        # few rows are then off by as much as they lose by being quantized.
        assert float(wrong.max()) < rounding + (3e-2 if num_rows > 32 else 0), num_rows
        assert float(wrong.median()) < rounding + (1e-3 if num_rows > 32 else 0), num_rows


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("num_rows", [1, 2, 16, 32, 33, 64, 128, 256, 512])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(4096, 4096), (3072, 1024), (4096, 14336)])
def test_the_error_is_no_larger_than_that_of_bitsandbytes(
    num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype
) -> None:
    pytest.importorskip("bitsandbytes")
    linear = kernel_cases.eight_bit_linear(
        num_outputs, num_inputs, bias=False, dtype=dtype, device="cuda"
    )
    rows = torch.randn(num_rows, num_inputs, device="cuda").to(dtype)
    rows[:, ::97] *= 8
    right = exact(rows, linear)
    codes, largest, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(rows.half(), 0.0)
    theirs = torch.ops.bitsandbytes.int8_scaled_mm(
        codes, linear.codes, largest, linear.scales * 127, dtype=dtype
    )
    mine = torch.full_like(theirs, float("nan"))
    eight_bit.multiply_eight_bit(rows, linear, mine)
    mine_wrong, their_wrong = ((each.double() - right).norm() for each in (mine, theirs))
    assert float(mine_wrong) < float(their_wrong) * (1.01 if num_rows > 32 else 0.2)


@pytest.mark.parametrize("num_rows", [1, 3, 40, 300])
@pytest.mark.parametrize(
    ("num_outputs", "num_inputs"), [(1000, 2560), (33, 72), (7, 104), (130, 3000), (1, 1000)]
)
def test_odd_sizes_and_biases(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, num_outputs: int, num_inputs: int
) -> None:
    kernel_cases.poison_new_memory(monkeypatch)
    case = kernel_cases.eight_bit_case(
        num_rows, num_outputs, num_inputs, bias=True, dtype=BF16, device="cuda"
    )
    assert_multiplies_like_its_twin(FusedOperations(), case)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("counts", [(2, 5, 9, 20, 32), (33, 64, 65, 128, 200, 512)])
def test_a_row_depends_on_no_other_row(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    case = kernel_cases.eight_bit_case(
        counts[-1], 3072, 1024, bias=True, dtype=dtype, device="cuda"
    )
    whole = case.apply(FusedOperations())
    for again, before in zip(case.apply(FusedOperations()), whole, strict=True):
        assert torch.equal(again, before)
    for count in counts:
        other = 100 * torch.randn_like(case.hidden[:count])
        other[1] = case.hidden[1]
        fewer = replace(case, hidden=other)
        for result, before in zip(fewer.apply(FusedOperations()), whole, strict=True):
            assert torch.equal(result[1], before[1])


@pytest.mark.parametrize("num_rows", [1, 4, 32, 64, 200])
def test_a_captured_layer_follows_its_input(num_rows: int) -> None:
    operations = FusedOperations()
    case = kernel_cases.eight_bit_case(num_rows, 6144, 2048, bias=False, dtype=BF16, device="cuda")
    starts = torch.randn(5, num_rows, 2048, device="cuda").to(BF16)
    expected = []
    for start in starts:
        case.hidden.copy_(start)
        expected.append(tuple(each.clone() for each in case.apply(operations)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case.apply(operations)
    for _ in range(10):
        for start, wanted in zip(starts, expected, strict=True):
            case.hidden.copy_(start)
            graph.replay()
            for result, each in zip(results, wanted, strict=True):
                assert torch.equal(result, each)


def test_a_threshold_is_left_to_the_twin() -> None:
    case = kernel_cases.eight_bit_case(3, 64, 128, bias=False, dtype=BF16, device="cuda")
    assert isinstance(case.narrow, EightBitLinear)
    linear = replace(case.narrow, threshold=3.0)
    residual = Residual(torch.zeros(3, 128, dtype=BF16, device="cuda"))
    rows = torch.randn(3, 64, device="cuda").to(BF16)
    FusedOperations().add_linear(residual, rows, linear)
    assert torch.equal(residual.sum(), linear(rows))
