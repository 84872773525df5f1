"""Up to 128 rows times a matrix: our kernels against their twins, and as parts of a chain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.worker import kernel_cases
from tokenloom.worker.attention import Pages
from tokenloom.worker.kernels import Residual
from tokenloom.worker.kernels.fused import FusedOperations
from tokenloom.worker.kernels.streamed import choose_tiling
from tokenloom.worker.weights.linears import DenseLinear, Linear

BF16 = torch.bfloat16
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 16, 8, 128
NUM_STARTS = 12
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="matrices are streamed on Hopper alone",
)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 9, 16, 17, 33, 64, 65, 128, 129])
@pytest.mark.parametrize(
    ("num_outputs", "num_inputs", "bias", "dtype"),
    [
        (3072, 1024, False, BF16),
        (3072, 1024, False, torch.float16),
        (2432, 896, True, BF16),
        (1000, 2560, True, torch.float16),
        (2048, 2048, False, BF16),
        (33, 72, True, BF16),
        (7, 100, False, torch.float16),
        (1, 3000, True, BF16),
        (1000, 1032, True, BF16),
        (968, 904, False, torch.float16),
        (3072, 1024, True, torch.float32),
    ],
)
def test_rows_are_multiplied_as_by_the_twin(
    monkeypatch: pytest.MonkeyPatch,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    bias: bool,
    dtype: torch.dtype,
) -> None:
    kernel_cases.poison_new_memory(monkeypatch)
    case = kernel_cases.linear_case(
        num_rows, num_outputs, num_inputs, bias=bias, dtype=dtype, device="cuda"
    )
    kernel_cases.assert_multiplies_like_its_twin(FusedOperations(), case)


@pytest.mark.parametrize(
    ("num_outputs", "num_inputs"), [(14336, 4096), (6144, 4096), (18944, 3584), (64128, 4096)]
)
def test_one_row_is_multiplied_as_by_the_twin_with_a_large_matrix(
    monkeypatch: pytest.MonkeyPatch, num_outputs: int, num_inputs: int
) -> None:
    kernel_cases.poison_new_memory(monkeypatch)
    case = kernel_cases.linear_case(
        1, num_outputs, num_inputs, bias=False, dtype=BF16, device="cuda"
    )
    kernel_cases.assert_multiplies_like_its_twin(FusedOperations(), case)


@pytest.mark.parametrize("num_rows", [2, 11, 32, 64, 100, 128])
@pytest.mark.parametrize(("num_outputs", "bias"), [(14336, False), (8480, True)])
def test_several_rows_are_multiplied_as_by_the_twin_with_a_large_matrix(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, num_outputs: int, bias: bool
) -> None:
    kernel_cases.poison_new_memory(monkeypatch)
    case = kernel_cases.linear_case(
        num_rows, num_outputs, 4096, bias=bias, dtype=BF16, device="cuda"
    )
    kernel_cases.assert_multiplies_like_its_twin(FusedOperations(), case)


@needs_hopper
def test_a_streamed_row_is_the_same_however_many_there_are() -> None:
    case = kernel_cases.linear_case(64, 8704, 4096, bias=True, dtype=BF16, device="cuda")

    def normed_sum(num_rows: int) -> tuple[Tensor, Tensor]:
        """Gate and up are 128 lines a program, and the other matrix is split."""
        ops, residual = FusedOperations(), Residual(case.hidden[:num_rows].clone())
        gated = ops.norm_gate_up(residual, case.norm_weight, kernel_cases.EPS, case.wide)
        ops.add_linear(residual, gated, case.narrow)
        return gated, ops.norm_sum(residual, case.norm_weight, kernel_cases.EPS)

    for linear, gated in ((case.wide, True), (case.narrow, False)):
        assert isinstance(linear, DenseLinear)
        assert choose_tiling(64, linear, gated=gated) is not None
    all_rows = normed_sum(64)
    for num_rows in (2, 7, 16, 24, 33, 63):
        for one, other in zip(normed_sum(num_rows), all_rows, strict=True):
            assert torch.equal(one, other[:num_rows])


@pytest.mark.parametrize("num_rows", [2, 8, 16, 64])
def test_a_row_does_not_depend_on_the_others(num_rows: int) -> None:
    case = kernel_cases.linear_case(num_rows, 3072, 1024, bias=False, dtype=BF16, device="cuda")
    first = case.apply(FusedOperations())
    case.hidden[1:] = 1000 * torch.randn_like(case.hidden[1:])
    for one, other in zip(first, case.apply(FusedOperations()), strict=True):
        assert torch.equal(one[0], other[0])
        assert not torch.equal(one[1], other[1])


def dense_linear(num_outputs: int, num_inputs: int) -> DenseLinear:
    weight = torch.randn(num_outputs, num_inputs, device="cuda") * num_inputs**-0.5
    return DenseLinear(weight=weight.to(BF16), bias=None)


class Layers:
    """Some layers whose attention is the queries themselves."""

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        intermediate_size: int,
        linear: Callable[[int, int], Linear] = dense_linear,
    ) -> None:
        num_q, num_all = NUM_HEADS * HEAD_DIM, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
        self.layers = [
            (
                linear(num_all, hidden_size),
                linear(hidden_size, num_q),
                linear(2 * intermediate_size, hidden_size),
                linear(hidden_size, intermediate_size),
            )
            for _ in range(num_layers)
        ]
        self.head = linear(5000, hidden_size)
        self.gain = (1 + 0.1 * torch.randn(hidden_size, device="cuda")).to(BF16)
        self.head_gain = (1 + 0.1 * torch.randn(HEAD_DIM, device="cuda")).to(BF16)

    def run(self, start: Tensor, angles: Tensor, places: Tensor, *, stopping: bool) -> Tensor:
        """Returns logits; with `stopping`, each kernel ends before the next is launched."""
        ops, eps = FusedOperations(), 1e-6
        residual = Residual(start.clone())
        shape = (1, len(places), 1, NUM_KV_HEADS, HEAD_DIM)
        keys, values = (torch.zeros(shape, dtype=BF16, device="cuda") for _ in range(2))
        pages = Pages(keys=keys, values=values)

        def stop() -> None:
            if stopping:
                torch.cuda.synchronize()

        stop()
        norms = (self.head_gain, self.head_gain)
        for qkv, output, gate_up, down in self.layers:
            heads = ops.norm_linear(residual, self.gain, eps, qkv)
            stop()
            queries = ops.place_heads(heads, angles, places, pages, 0, norms, eps)
            stop()
            ops.add_linear(residual, queries.flatten(1), output)
            stop()
            activated = ops.norm_gate_up(residual, self.gain, eps, gate_up)
            stop()
            ops.add_linear(residual, activated, down)
            stop()
        logits = ops.norm_linear(residual, self.gain, eps, self.head)
        stop()
        return torch.cat((logits, keys[0].flatten(1), values[0].flatten(1)), dim=1)


@pytest.mark.parametrize("num_rows", [1, 5, 16, 24, 64, 100, 128])
@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size"),
    # All are small; qkv and the output projection are; only the latter is.
    [(1024, 3072), (2048, 6144), (3072, 8192)],
)
def test_kernels_that_overlap_give_what_they_give_one_by_one(
    num_rows: int, hidden_size: int, intermediate_size: int
) -> None:
    torch.manual_seed(num_rows + hidden_size)
    assert_overlapping_changes_nothing(Layers(8, hidden_size, intermediate_size), num_rows)


def assert_overlapping_changes_nothing(layers: Layers, num_rows: int) -> None:
    hidden_size = len(layers.gain)
    places = torch.randperm(num_rows, device="cuda")
    angles = torch.rand(num_rows, 2, HEAD_DIM // 2, device="cuda").to(BF16)
    starts = torch.randn(NUM_STARTS, num_rows, hidden_size, device="cuda").to(BF16)
    one_by_one = [layers.run(start, angles, places, stopping=True) for start in starts]
    for start, expected in zip(starts, one_by_one, strict=True):
        assert torch.equal(layers.run(start, angles, places, stopping=False), expected)

    static = starts[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = layers.run(static, angles, places, stopping=False)
    # Each replay has another start: what a kernel reads too early is the last replay's.
    for _ in range(10):
        for start, expected in zip(starts, one_by_one, strict=True):
            static.copy_(start)
            graph.replay()
            assert torch.equal(result, expected)
