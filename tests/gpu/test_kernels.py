"""The fused operations against their torch twins, over shapes and types."""

from __future__ import annotations

import pytest
import torch

from tests.worker import kernel_cases
from tests.worker.kernel_cases import Heads
from tokenloom.worker.kernels import choose_operations
from tokenloom.worker.kernels.fused import FusedOperations

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "size"), [(1, 4096), (7, 64), (300, 1000), (33, 5120), (1, 16384)]
)
def test_norms_agree_with_their_twin(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, size: int, dtype: torch.dtype
) -> None:
    kernel_cases.poison_new_memory(monkeypatch)
    kernel_cases.assert_norms_like_its_twin(FusedOperations(), num_rows, size, dtype, "cuda")


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(32, 8, 128), (9, 3, 64), (16, 16, 96), (7, 1, 256), (16, 2, 24)],
)
def test_heads_are_placed_as_by_their_twin(
    monkeypatch: pytest.MonkeyPatch,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    normed: bool,
    coded: bool,
) -> None:
    kernel_cases.poison_new_memory(monkeypatch)
    heads = Heads(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    for num_tokens in (1, 130):
        kernel_cases.assert_places_heads_like_its_twin(
            FusedOperations(),
            heads,
            num_tokens=num_tokens,
            normed=normed,
            dtype=dtype,
            device="cuda",
            coded=coded,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "size"), [(1, 14336), (5, 24), (257, 1030)])
def test_silu_mul_agrees_with_its_twin(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, size: int, dtype: torch.dtype
) -> None:
    kernel_cases.poison_new_memory(monkeypatch)
    kernel_cases.assert_activates_like_its_twin(FusedOperations(), num_rows, size, dtype, "cuda")


def test_the_fused_operations_are_chosen_on_a_gpu_and_the_twins_on_a_cpu() -> None:
    assert choose_operations(torch.device("cuda")).name == "triton"
    assert choose_operations(torch.device("cpu")).name == "torch"
