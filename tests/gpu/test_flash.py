"""flash-attn-4 against its readable twin, over shapes and where blocks end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.worker.attention_cases import make_case
from tokenloom.worker.attention import choose_attention
from tokenloom.worker.attention.flash import FlashAttention
from tokenloom.worker.attention.reference import ReferenceAttention

DEVICE = torch.device("cuda")

SPANS: dict[str, Sequence[tuple[int, int]]] = {
    "decodes": [(0, 1), (1, 1), (126, 1), (127, 1), (128, 1), (129, 1), (500, 1), (2047, 1)],
    "prefills": [(0, 1), (0, 127), (0, 128), (0, 129), (0, 700)],
    "chunks": [(128, 128), (1, 127), (127, 2), (300, 513)],
    "all kinds": [(0, 300), (700, 1), (64, 65), (1023, 1), (128, 1), (256, 256)],
}


@pytest.fixture(scope="module")
def flash() -> FlashAttention:
    return FlashAttention()


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize(
    ("head_dim", "num_heads", "num_kv_heads", "window"),
    [
        (32, 8, 2, None),
        (64, 8, 4, None),
        (64, 8, 4, 100),
        (96, 8, 2, None),
        (128, 8, 8, None),
        (128, 16, 2, None),
        (128, 16, 2, 100),
    ],
)
def test_flash_agrees_with_its_twin(
    flash: FlashAttention,
    name: str,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    window: int | None,
) -> None:
    case = make_case(
        SPANS[name],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=flash.block_size,
        dtype=torch.bfloat16,
        device="cuda",
        rest=1e4,  # what lies behind a request's end must not matter
    )
    twin = ReferenceAttention(block_size=flash.block_size)
    wide = type(case.pages)(keys=case.pages.keys.float(), values=case.pages.values.float())
    exact = twin.attend(wide, 0, case.queries.float(), case.step, window).double()
    mixed = flash.attend(case.pages, 0, case.queries, case.step, window)
    assert mixed.isfinite().all()
    assert relative_error(mixed, exact) < 6e-3  # bfloat16's own


def test_each_backend_is_chosen_for_what_it_can_do() -> None:
    def chosen(name: str, head_dim: int, dtype: torch.dtype) -> str:
        return choose_attention(name, head_dim=head_dim, dtype=dtype, device=DEVICE).name

    assert chosen("auto", 128, torch.bfloat16) == "flash, triton for decodes"
    assert chosen("auto", 64, torch.float16) == "flash, triton for decodes"
    assert chosen("auto", 128, torch.float32) == "triton"
    assert chosen("auto", 256, torch.bfloat16) == "triton"
    assert chosen("flash", 128, torch.bfloat16) == "flash"
    assert chosen("torch", 128, torch.bfloat16) == "torch"


@pytest.mark.parametrize("name", SPANS)
def test_the_choice_by_shape_agrees_with_the_twin(name: str) -> None:
    attention = choose_attention("auto", head_dim=128, dtype=torch.bfloat16, device=DEVICE)
    case = make_case(
        SPANS[name],
        num_heads=16,
        num_kv_heads=2,
        head_dim=128,
        block_size=attention.block_size,
        dtype=torch.bfloat16,
        device="cuda",
        rest=1e4,
    )
    twin = ReferenceAttention(block_size=attention.block_size)
    wide = type(case.pages)(keys=case.pages.keys.float(), values=case.pages.values.float())
    exact = twin.attend(wide, 0, case.queries.float(), case.step, None).double()
    mixed = attention.attend(case.pages, 0, case.queries, case.step, None)
    assert relative_error(mixed, exact) < 6e-3  # bfloat16's own
