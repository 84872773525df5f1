"""4-bit matmuls on the GPU, over the matrices of models that are served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.gpu.test_linear import Layers, assert_overlapping_changes_nothing
from tests.worker import kernel_cases
from tests.worker.four_bit_cases import (
    assert_as_exact_as_its_twin,
    four_bit_case,
    four_bit_linear,
)
from tokenloom.worker.errors import CudaError
from tokenloom.worker.kernels import Residual, four_bit
from tokenloom.worker.kernels.four_bit import (
    Few,
    Wide,
    choose_for,
    multiply_dense,
    multiply_four_bit,
)
from tokenloom.worker.kernels.fused import FusedOperations
from tokenloom.worker.memory import DENSE_BYTES
from tokenloom.worker.weights.linears import FourBitLinear
from tokenloom.worker.weights.rounding import load_bitsandbytes

BF16, FP16 = torch.bfloat16, torch.float16
NUM_ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 130, 256, 512)
MODELS = {
    # hidden size, intermediate size, outputs of qkv, heads times their size
    "llama-3-8b": (4096, 14336, 6144, 4096),
    "llama-3-70b": (8192, 28672, 10240, 8192),
    "qwen3-0.6b": (1024, 3072, 4096, 2048),
    "qwen3-8b": (4096, 12288, 6144, 4096),
    "qwen3-32b": (5120, 25600, 10240, 8192),
}

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and not four_bit._has_kernels(torch.device("cuda", 0)),
    reason="needs NVRTC and a GPU that multiplies bfloat16",
)


def matrices() -> list[tuple[int, int]]:
    """Returns (outputs, inputs) of all layers, by ranks that share them, once each."""
    found: dict[tuple[int, int], None] = {}
    for hidden_size, intermediate_size, num_all, num_q in MODELS.values():
        for ranks in (1, 2, 4):
            found[num_all // ranks, hidden_size] = None
            found[hidden_size, num_q // ranks] = None
            found[2 * intermediate_size // ranks, hidden_size] = None
            found[hidden_size, intermediate_size // ranks] = None
    return list(found)


def multiply(rows: Tensor, linear: FourBitLinear) -> Tensor:
    """Returns the product, in memory that held NaN."""
    out = torch.full((len(rows), linear.shape[0]), float("nan"), dtype=rows.dtype, device="cuda")
    way = choose_for(len(rows), linear)
    if way is None:
        return multiply_dense(rows, linear, out)
    return multiply_four_bit(way, rows, linear, out)


def multiply_by_bitsandbytes(rows: Tensor, linear: FourBitLinear, name: str) -> Tensor:
    load_bitsandbytes()
    product: Tensor = torch.ops.bitsandbytes.gemm_4bit(
        rows, linear.codes.view(-1, 1), list(linear.shape), linear.absmax.view(-1), 64, name
    )
    return product


def error(product: Tensor, right: Tensor) -> float:
    return float((product.double() - right).norm() / right.norm())


@pytest.mark.parametrize(("dtype", "name"), [(BF16, "nf4"), (BF16, "fp4"), (FP16, "nf4")])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), matrices())
def test_the_error_is_no_larger_than_that_of_bitsandbytes(
    num_outputs: int, num_inputs: int, name: str, dtype: torch.dtype
) -> None:
    linear = four_bit_linear(num_outputs, num_inputs, name=name)
    rows = torch.randn(max(NUM_ROWS), num_inputs, device="cuda").to(dtype)
    right = (rows.float() @ linear.dense(torch.float32).T).double()
    for num_rows in NUM_ROWS:
        some = rows[:num_rows]
        product = multiply(some, linear)
        theirs = multiply_by_bitsandbytes(some, linear, name)
        # Many rows are multiplied as bitsandbytes does it, but for the order of sums.
        assert error(product, right[:num_rows]) < 1.01 * error(theirs, right[:num_rows]), num_rows
        worst = (product.double() - right[:num_rows]).norm(dim=1) / right[:num_rows].norm(dim=1)
        assert float(worst.max()) < kernel_cases.ULP[dtype], num_rows
        assert torch.equal(product, multiply(some, linear)), num_rows


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("num_rows", [1, 2, 4, 7, 16, 20, 64, 90, 200])
@pytest.mark.parametrize(
    ("num_outputs", "num_inputs"),
    # Multiples of 64 inputs, odd ones among them; the operations need such outputs, too.
    [(3072, 1024), (64, 64), (192, 704), (1088, 2560), (4032, 4160)],
)
def test_norm_activation_residual_and_bias_are_as_exact_as_the_twins(
    monkeypatch: pytest.MonkeyPatch,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    dtype: torch.dtype,
) -> None:
    kernel_cases.poison_new_memory(monkeypatch)
    case = four_bit_case(num_rows, num_outputs, num_inputs, bias=True, dtype=dtype)
    assert_as_exact_as_its_twin(FusedOperations(), case)


@pytest.mark.parametrize("num_rows", [1, 2, 6, 30, 64, 150])
@pytest.mark.parametrize("num_outputs", [1, 7, 33, 130, 999])
def test_any_number_of_outputs(num_rows: int, num_outputs: int) -> None:
    linear = four_bit_linear(num_outputs, 704, bias=True)
    assert linear.bias is not None
    rows = torch.randn(num_rows, 704, device="cuda").to(BF16)
    weight = linear.dense(torch.float32).double()
    right = rows.double() @ weight.T + linear.bias.double()
    # One output may be a small difference of large sums: so errors are held against the terms.
    terms = (rows.double().square() @ weight.T.square()).sqrt()
    wrong = multiply(rows, linear).double() - right
    assert wrong.norm() < terms.norm() * kernel_cases.ULP[BF16] / 2


@pytest.mark.parametrize("num_rows", [2, 4, 8, 16, 32, 64, 100, 200])
def test_a_row_does_not_depend_on_the_others(num_rows: int) -> None:
    case = four_bit_case(num_rows, 3072, 1024, bias=True, dtype=BF16)
    first = case.apply(FusedOperations())
    case.hidden[1:] = 1000 * torch.randn_like(case.hidden[1:])
    for one, other in zip(first, case.apply(FusedOperations()), strict=True):
        assert torch.equal(one[0], other[0])
        assert not torch.equal(one[1], other[1])


@pytest.mark.parametrize("num_rows", [1, 2, 8, 24, 64, 100, 200])
@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size"), [(1024, 3072), (2048, 6144), (3072, 8192)]
)
def test_kernels_that_overlap_give_what_they_give_one_by_one(
    num_rows: int, hidden_size: int, intermediate_size: int
) -> None:
    torch.manual_seed(num_rows + hidden_size)
    layers = Layers(8, hidden_size, intermediate_size, four_bit_linear)
    assert_overlapping_changes_nothing(layers, num_rows)


def test_every_way_of_the_table_multiplies_rows_of_several_programs() -> None:
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    tuned = four_bit.tuned_for(name, capability)
    linear = four_bit_linear(2048, 4096)
    rows = torch.randn(300, 4096, device="cuda").to(BF16)
    right = (rows.float() @ linear.dense(torch.float32).T).double()
    for way in tuned.wide:
        for num_splits in (1, *dict(tuned.clusters)):
            split = replace(way, splits=num_splits)
            out = torch.full((300, 2048), float("nan"), dtype=BF16, device="cuda")
            product = multiply_four_bit(split, rows, linear, out)
            assert error(product, right) < 2.2e-3, split


def test_rows_that_are_not_aligned_are_refused() -> None:
    linear = four_bit_linear(128, 64)
    rows = torch.randn(20 * 64 + 1, device="cuda").to(BF16)[1:].view(20, 64)
    way = choose_for(20, linear)
    if isinstance(way, Wide):
        with pytest.raises(CudaError, match="INVALID_VALUE"):
            multiply_four_bit(way, rows, linear)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(4096, 4096), (999, 704), (1, 64)])
def test_a_matrix_made_dense_is_the_twins(
    monkeypatch: pytest.MonkeyPatch,
    num_outputs: int,
    num_inputs: int,
    dtype: torch.dtype,
    name: str,
) -> None:
    linear = four_bit_linear(num_outputs, num_inputs, name=name)
    expected = linear.dense(dtype)
    kernel_cases.poison_new_memory(monkeypatch)
    assert torch.equal(four_bit.make_dense(linear, dtype), expected)


def multiply_by_twin(rows: Tensor, linear: FourBitLinear, out: Tensor) -> Tensor:
    return linear(rows, out)


@pytest.mark.parametrize("multiply", [multiply_dense, multiply_by_twin])
@pytest.mark.parametrize("bias", [False, True])
def test_a_matrix_larger_than_what_is_made_dense_at_a_time(
    multiply: Callable[[Tensor, FourBitLinear, Tensor], Tensor], bias: bool
) -> None:
    linear = four_bit_linear(151_936, 1024, bias=bias)
    rows = torch.randn(100, 1024, device="cuda").to(BF16)
    out = torch.full((100, 151_936), float("nan"), dtype=BF16, device="cuda")
    product = multiply(rows, linear, out)
    assert product is out
    whole = functional.linear(rows, linear.dense(BF16), linear.bias)
    torch.testing.assert_close(product, whole, rtol=2**-7, atol=2**-5)
    del whole
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    multiply(rows, linear, out)
    beside = torch.cuda.max_memory_allocated() - before
    assert beside <= DENSE_BYTES + 2**22


def test_no_rows_are_multiplied_to_none() -> None:
    linear = four_bit_linear(300, 128)
    rows = torch.empty(0, 128, dtype=BF16, device="cuda")
    gain = torch.ones(128, dtype=BF16, device="cuda")
    product = FusedOperations().norm_linear(Residual(rows), gain, 1e-6, linear)
    assert product.shape == (0, 300)


@pytest.mark.parametrize("num_rows", [1, 20])
def test_other_block_sizes_are_multiplied_by_the_twin(num_rows: int) -> None:
    linear = four_bit_linear(192, 256, block_size=128)
    rows = torch.randn(num_rows, 256, device="cuda").to(BF16)
    residual = Residual(torch.zeros(num_rows, 192, dtype=BF16, device="cuda"))
    FusedOperations().add_linear(residual, rows, linear)
    assert torch.equal(residual.sum(), linear(rows))


def test_one_row_and_some_have_kernels_of_their_own() -> None:
    linear = four_bit_linear(4096, 4096)
    assert isinstance(choose_for(1, linear), Few)
    if torch.cuda.get_device_capability() == (9, 0):
        assert isinstance(choose_for(256, linear), Wide)
    assert choose_for(1000, linear) is None
