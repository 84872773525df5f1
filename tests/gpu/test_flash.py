"""flash-attn against its readable twin, over shapes and where blocks end; the choice on a GPU."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from tests.worker import kernel_cases
from tests.worker.attention_cases import SPANS, make_case
from tests.worker.kernel_cases import Heads
from tokenloom.worker.attention import Attention, choose_attention
from tokenloom.worker.attention.flash import (
    FlashAttention2,
    FlashAttention4,
    why_not_flash2,
    why_not_flash4,
)
from tokenloom.worker.attention.paged import PagedAttention
from tokenloom.worker.attention.widened import WidenedAttention

DEVICE = torch.device("cuda")
NO_FLASH4 = "needs a CUDA device"
NO_FLASH2 = "needs a CUDA device"
if torch.cuda.is_available():
    NO_FLASH4 = why_not_flash4(head_dim=128, dtype=torch.bfloat16, device=DEVICE) or ""
    NO_FLASH2 = why_not_flash2(head_dim=128, dtype=torch.bfloat16, device=DEVICE) or ""
needs_flash4 = pytest.mark.skipif(bool(NO_FLASH4), reason=NO_FLASH4)
needs_flash2 = pytest.mark.skipif(bool(NO_FLASH2), reason=NO_FLASH2)


def assert_agrees(attention: Attention, name: str, heads: Heads, window: int | None) -> None:
    case = make_case(
        SPANS[name],
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        block_size=attention.block_size,
        dtype=torch.bfloat16,
        device="cuda",
        rest=1e4,  # what lies behind a request's end must not matter
    )
    kernel_cases.assert_attends_like_its_twin(attention, case, window)


@needs_flash4
@pytest.mark.parametrize(
    ("head_dim", "group", "window"),
    [
        (32, 4, None),
        (64, 1, None),
        (64, 2, 100),
        (64, 7, None),
        (96, 3, None),
        (96, 4, 100),
        *((128, group, None) for group in range(1, 9)),
        (128, 2, 100),
        (128, 8, 1),
    ],
)
def test_flash4_agrees_with_its_twin(head_dim: int, group: int, window: int | None) -> None:
    heads = Heads(num_heads=2 * group, num_kv_heads=2, head_dim=head_dim)
    by_shape = choose_attention("auto", head_dim=head_dim, dtype=torch.bfloat16, device=DEVICE)
    for name in SPANS:
        for attention in (FlashAttention4(), by_shape):
            assert_agrees(attention, name, heads, window)


@needs_flash4
@pytest.mark.parametrize("num_widened", [600, 2048, 8192])
@pytest.mark.parametrize(
    ("head_dim", "group", "window"), [(64, 7, None), (96, 1, 100), (128, 4, None)]
)
def test_flash4_over_widened_codes_agrees_with_its_twin(
    num_widened: int, head_dim: int, group: int, window: int | None
) -> None:
    heads = Heads(num_heads=2 * group, num_kv_heads=2, head_dim=head_dim)
    attention = choose_attention(
        "auto", head_dim=head_dim, dtype=torch.bfloat16, device=DEVICE, num_widened=num_widened
    )
    assert attention.name == "flash4 on widened keys, triton for decodes"
    for name in SPANS:
        case = kernel_cases.attention_case(
            SPANS[name],
            heads,
            block_size=attention.block_size,
            dtype=torch.bfloat16,
            device="cuda",
            coded=True,
        )
        finite = replace(case, pages=kernel_cases.finite(case.pages))  # as the pool keeps blocks
        kernel_cases.assert_attends_like_its_twin(attention, finite, window)


@needs_flash4
def test_a_captured_prompt_over_widened_codes_stays_right_as_it_moves() -> None:
    heads = Heads(num_heads=8, num_kv_heads=2, head_dim=128)
    case = kernel_cases.attention_case(
        [(1500, 64), (300, 64)],
        heads,
        block_size=128,
        dtype=torch.bfloat16,
        device="cuda",
        coded=True,
    )
    case = replace(case, pages=kernel_cases.finite(case.pages))
    lengths = case.step.kv_lengths.clone()
    step = replace(case.step, kv_lengths=lengths)
    attention = WidenedAttention(FlashAttention4(), 1700)

    def attend() -> torch.Tensor:
        # A step's own spans, as each is: what is found out of them is for all of its layers.
        return attention.attend(case.pages, 0, case.queries, replace(step), None)

    attend()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mixed = attend()
    for first, second in ((1564, 364), (700, 300), (64, 64), (1564, 200)):
        lengths.copy_(torch.tensor([first, second], dtype=torch.int32))
        mixed.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        now = replace(step, kv_lengths=lengths.clone())
        same = PagedAttention(128).attend(case.pages, 0, case.queries, now, None)
        torch.testing.assert_close(mixed, same, rtol=1e-2, atol=1e-2)


@needs_flash2
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("group", range(1, 9))
def test_flash2_agrees_with_its_twin(head_dim: int, group: int, window: int | None) -> None:
    heads = Heads(num_heads=2 * group, num_kv_heads=2, head_dim=head_dim)
    for name in SPANS:
        assert_agrees(FlashAttention2(), name, heads, window)


@needs_flash4
def test_each_backend_is_chosen_for_what_it_can_do() -> None:
    def chosen(name: str, head_dim: int, dtype: torch.dtype) -> str:
        return choose_attention(name, head_dim=head_dim, dtype=dtype, device=DEVICE).name

    wide = "triton" if find_spec("flash_attn_2_cuda") is None else "flash2, triton for decodes"
    assert chosen("auto", 128, torch.bfloat16) == "flash4, triton for decodes"
    assert chosen("auto", 64, torch.float16) == "flash4, triton for decodes"
    assert chosen("auto", 128, torch.float32) == "triton"
    assert chosen("auto", 256, torch.bfloat16) == wide
    assert chosen("flash4", 128, torch.bfloat16) == "flash4"
    assert chosen("triton", 128, torch.bfloat16) == "triton"
    assert chosen("torch", 128, torch.bfloat16) == "torch"
