"""flash-attn against its readable twin, over shapes and where blocks end; the choice on a GPU."""

from __future__ import annotations

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
