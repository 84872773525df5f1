"""Our Triton attention in Triton's interpreter; `test_attention.py` starts a process for it.

bfloat16 is left to the GPU: the interpreter cuts it off instead of rounding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from tests.worker import kernel_cases
from tests.worker.attention_cases import make_case
from tests.worker.kernel_cases import Heads
from tokenloom.worker.attention.choose import SplitAttention
from tokenloom.worker.attention.decode import PagedDecoding, Tiling
from tokenloom.worker.attention.paged import PagedAttention
from tokenloom.worker.attention.reference import ReferenceAttention
from tokenloom.worker.attention.widened import WidenedAttention

SPANS = [(0, 1), (15, 1), (16, 1), (130, 1), (299, 1), (0, 20), (3, 1), (30, 3)]


@pytest.fixture(autouse=True)
def loops_over_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 takes an array of one number for an integer, which numpy 2.4 no longer does."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:  # noqa: ANN401 - Triton's own, without types
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.mark.parametrize("tile_bytes", [1024, 4096, 16384])
@pytest.mark.parametrize(
    ("head_dim", "num_heads", "num_kv_heads", "block_size", "dtype", "window"),
    [
        (64, 4, 2, 16, torch.float32, None),
        (96, 3, 1, 32, torch.float16, 40),
        (128, 8, 1, 128, torch.float16, None),
        (24, 7, 1, 16, torch.float32, 5),
    ],
)
def test_triton_agrees_with_its_twin(
    monkeypatch: pytest.MonkeyPatch,
    tile_bytes: int,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    dtype: torch.dtype,
    window: int | None,
) -> None:
    kernel_cases.poison_new_memory(monkeypatch)
    heads = Heads(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    decoding = PagedDecoding(Tiling(tile_bytes=tile_bytes))
    for coded in (False, True):
        case = kernel_cases.attention_case(
            SPANS, heads, block_size=block_size, dtype=dtype, device="cpu", coded=coded
        )
        for attention in (
            SplitAttention(decoding, PagedAttention(block_size)),
            PagedAttention(block_size),
        ):
            kernel_cases.assert_attends_like_its_twin(attention, case, window)


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 1), (130, 1), (299, 1), (0, 0), (0, 0), (0, 20), (30, 3), (0, 0)],
        [(0, 0), (0, 0), (30, 3)],
        [(0, 0), (0, 0), (30, 3), (0, 0), (0, 20)],
    ],
)
def test_empty_spans_take_and_write_nothing(
    monkeypatch: pytest.MonkeyPatch, spans: list[tuple[int, int]]
) -> None:
    kernel_cases.poison_new_memory(monkeypatch)
    heads = Heads(num_heads=4, num_kv_heads=2, head_dim=24)
    case = kernel_cases.attention_case(
        spans, heads, block_size=16, dtype=torch.float32, device="cpu"
    )
    for attention in (SplitAttention(PagedDecoding(), PagedAttention(16)), PagedAttention(16)):
        kernel_cases.assert_attends_like_its_twin(attention, case, 40)


@pytest.mark.parametrize("num_positions", [16, 300, 900, 5000])
@pytest.mark.parametrize("spans", [[(299, 1), (0, 20), (30, 3), (260, 40)], [(0, 0), (17, 30)]])
def test_codes_are_widened_for_a_backend_and_read_in_place_where_there_is_no_room(
    spans: list[tuple[int, int]], num_positions: int
) -> None:
    heads = Heads(num_heads=4, num_kv_heads=2, head_dim=24)
    case = kernel_cases.attention_case(
        spans, heads, block_size=16, dtype=torch.float32, device="cpu", coded=True
    )
    finite = replace(case, pages=kernel_cases.finite(case.pages))  # as the pool keeps blocks
    attention = WidenedAttention(ReferenceAttention(block_size=16), num_positions)
    for window in (None, 40):
        kernel_cases.assert_attends_like_its_twin(attention, finite, window)


def test_workers_leave_their_counts_at_zero() -> None:
    case = make_case([(299, 1)] * 3, num_heads=2, num_kv_heads=1, head_dim=16, block_size=16)
    decoding = PagedDecoding()
    attention = SplitAttention(decoding, PagedAttention(16))
    first = attention.attend(case.pages, 0, case.queries, case.step, None)
    assert all(not space.counts.any() for space in decoding._workspaces.values())
    assert torch.equal(first, attention.attend(case.pages, 0, case.queries, case.step, None))
