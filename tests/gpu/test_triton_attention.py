"""Our Triton attention against its readable twin, over shapes, types and where blocks end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.worker import kernel_cases
from tests.worker.attention_cases import SPANS, AttentionCase
from tests.worker.kernel_cases import Heads
from tokenloom.worker.attention import Attention
from tokenloom.worker.attention.choose import SplitAttention
from tokenloom.worker.attention.decode import PagedDecoding, Tiling
from tokenloom.worker.attention.paged import PagedAttention


def composed(block_size: int, tiling: Tiling | None = None) -> Attention:
    return SplitAttention(PagedDecoding(tiling), PagedAttention(block_size))


def decodes(
    ends: list[int],
    *,
    num_heads: int = 8,
    num_kv_heads: int = 2,
    head_dim: int = 128,
    coded: bool = False,
) -> AttentionCase:
    heads = Heads(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    spans = [(end - 1, 1) for end in ends]
    return kernel_cases.attention_case(
        spans, heads, block_size=128, dtype=torch.bfloat16, device="cuda", coded=coded
    )


def assert_both_agree(
    name: str, heads: Heads, block_size: int, dtype: torch.dtype, window: int | None
) -> None:
    """Compares both kernels with their twin, over numbers and over codes."""
    for coded in (False, True):
        case = kernel_cases.attention_case(
            SPANS[name], heads, block_size=block_size, dtype=dtype, device="cuda", coded=coded
        )
        for attention in (composed(block_size), PagedAttention(block_size)):
            kernel_cases.assert_attends_like_its_twin(attention, case, window)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("group", range(1, 9))
def test_triton_agrees_with_its_twin_for_every_group(
    monkeypatch: pytest.MonkeyPatch, group: int, head_dim: int
) -> None:
    kernel_cases.poison_new_memory(monkeypatch)
    heads = Heads(num_heads=2 * group, num_kv_heads=2, head_dim=head_dim)
    window = 100 if (group + head_dim // 32) % 2 else None
    for name in SPANS:
        assert_both_agree(name, heads, 128, torch.bfloat16, window)


@pytest.mark.parametrize(
    ("head_dim", "num_heads", "num_kv_heads", "block_size", "dtype", "window"),
    [
        (64, 8, 8, 16, torch.bfloat16, None),
        (64, 32, 8, 256, torch.float32, None),
        (64, 14, 2, 64, torch.float16, 100),
        (96, 16, 4, 16, torch.float32, 100),
        (96, 14, 2, 256, torch.float16, None),
        (128, 32, 8, 64, torch.bfloat16, 1000),
        (128, 12, 1, 64, torch.float16, 1),
        (128, 16, 2, 16, torch.bfloat16, None),
        (128, 8, 8, 32, torch.float32, None),
        (256, 16, 16, 16, torch.bfloat16, 100),
        (256, 16, 2, 256, torch.float16, None),
        (256, 16, 4, 128, torch.float32, 100),
        (24, 16, 4, 16, torch.bfloat16, None),
    ],
)
def test_triton_agrees_with_its_twin_for_every_type_and_block_size(
    monkeypatch: pytest.MonkeyPatch,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    dtype: torch.dtype,
    window: int | None,
) -> None:
    kernel_cases.poison_new_memory(monkeypatch)
    heads = Heads(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    for name in SPANS:
        assert_both_agree(name, heads, block_size, dtype, window)


@pytest.mark.parametrize("window", [None, 333])
@pytest.mark.parametrize("min_share", [1, 5])
@pytest.mark.parametrize("programs_per_processor", [1, 2, 5])
def test_every_way_to_share_the_keys_out_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, programs_per_processor: int, min_share: int, window: int | None
) -> None:
    kernel_cases.poison_new_memory(monkeypatch)
    tiling = Tiling(programs_per_processor=programs_per_processor, min_share=min_share)
    for ends in ([1], [64], [65], [20000], [1] * 40, [3000, 1, 64, 65, 128, 700, 1, 1], [999] * 77):
        kernel_cases.assert_attends_like_its_twin(composed(128, tiling), decodes(ends), window)


@pytest.mark.parametrize("num_spans", [16, 17, 128, 129, 1300])
def test_many_requests_of_all_lengths_decode_together(num_spans: int) -> None:
    ends = [1 + 37 * each % 411 for each in range(num_spans)]
    for coded in (False, True):
        case = decodes(ends, num_heads=4, num_kv_heads=1, head_dim=64, coded=coded)
        kernel_cases.assert_attends_like_its_twin(composed(128), case, None)


@pytest.mark.parametrize("coded", [False, True])
def test_a_result_does_not_depend_on_which_worker_comes_last(coded: bool) -> None:
    case = decodes([30000, 5, 12000, 700], coded=coded)
    attention = composed(128)
    first = attention.attend(case.pages, 0, case.queries, case.step, None)
    for _ in range(200):
        again = attention.attend(case.pages, 0, case.queries, case.step, None)
        assert torch.equal(first, again)


@pytest.mark.parametrize("coded", [False, True])
def test_a_captured_decode_stays_right_as_requests_grow_and_end(coded: bool) -> None:
    # One block table holds the longest request; others begin short.
    case = decodes([2000, 130, 40, 512], num_heads=32, num_kv_heads=8, coded=coded)
    # All tables lead to written blocks as far as they reach, and are far wider than that.
    width = 1000
    tables = torch.full((4, width), 10**6, dtype=torch.int32, device="cuda")
    tables[:, : case.step.block_tables.shape[1]] = case.step.block_tables[:1]
    lengths = torch.tensor([200, 17, 1, 129], dtype=torch.int32, device="cuda")
    step = replace(case.step, block_tables=tables, kv_lengths=lengths, max_kv_length=128 * width)
    attention = composed(128)

    def attend() -> torch.Tensor:
        # Two layers' calls share the memory for parts.
        attention.attend(case.pages, 1, case.queries, step, None)
        return attention.attend(case.pages, 0, case.queries, step, None)

    attend()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mixed = attend()
    for more in (0, 1, 127, -100, 1800, 0, -1990):
        lengths.add_(more).clamp_(min=1, max=2000)
        mixed.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert mixed.isfinite().all()
        # A step of its own, since a twin remembers what it found out of one.
        now = replace(step, kv_lengths=lengths.clone())
        same = PagedAttention(128).attend(case.pages, 0, case.queries, now, None)
        torch.testing.assert_close(mixed, same, rtol=1e-2, atol=1e-2)
        kernel_cases.assert_attends_like_its_twin(attention, replace(case, step=now), None)
