"""Our paged attention against its readable twin, over shapes, types and where blocks end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from tests.worker import kernel_cases
from tests.worker.kernel_cases import Heads
from tokenloom.worker.attention.paged import PagedAttention

SPANS: dict[str, Sequence[tuple[int, int]]] = {
    "one decode": [(4099, 1)],
    "decodes": [(0, 1), (1, 1), (15, 1), (16, 1), (127, 1), (128, 1), (255, 1), (256, 1), (999, 1)],
    "short spans": [(0, 2), (300, 3), (126, 4), (1500, 1)],
    "all kinds": [(0, 300), (700, 1), (64, 65), (1023, 1), (128, 1), (256, 256)],
}
GROUPS = [(8, 8), (8, 4), (6, 2), (16, 4), (5, 1), (12, 2), (14, 2), (16, 2)]
"""(num_heads, num_kv_heads): 1 to 8 query heads a KV head."""


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize(
    ("head_dim", "group", "block_size", "dtype", "window"),
    [
        (64, 0, 16, torch.bfloat16, None),
        (64, 7, 128, torch.float16, 100),
        (64, 2, 256, torch.float32, None),
        (96, 1, 128, torch.bfloat16, 100),
        (96, 3, 16, torch.float32, 100),
        (96, 6, 256, torch.float16, None),
        (128, 3, 128, torch.bfloat16, None),
        (128, 3, 128, torch.bfloat16, 100),
        (128, 3, 16, torch.bfloat16, None),
        (128, 4, 64, torch.float16, 1),
        (128, 7, 256, torch.bfloat16, 1000),
        (128, 0, 16, torch.float32, None),
        (256, 1, 128, torch.bfloat16, None),
        (256, 5, 16, torch.bfloat16, 100),
        (256, 7, 256, torch.float16, None),
        (256, 3, 128, torch.float32, 100),
        (24, 3, 16, torch.bfloat16, None),
    ],
)
def test_paged_agrees_with_its_twin(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    head_dim: int,
    group: int,
    block_size: int,
    dtype: torch.dtype,
    window: int | None,
) -> None:
    num_heads, num_kv_heads = GROUPS[group]
    heads = Heads(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    case = kernel_cases.attention_case(
        SPANS[name], heads, block_size=block_size, dtype=dtype, device="cuda"
    )
    kernel_cases.poison_new_memory(monkeypatch)
    attention = PagedAttention(block_size)
    kernel_cases.assert_attends_like_its_twin(attention, case, window)


@pytest.mark.parametrize("programs", [1, 2, 16, 1000])
def test_every_number_of_splits_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, programs: int
) -> None:
    heads = Heads(num_heads=8, num_kv_heads=2, head_dim=128)
    case = kernel_cases.attention_case(
        SPANS["decodes"], heads, block_size=128, dtype=torch.bfloat16, device="cuda"
    )
    kernel_cases.poison_new_memory(monkeypatch)
    kernel_cases.assert_attends_like_its_twin(PagedAttention(128, programs), case, None)


def test_a_captured_decode_stays_right_as_requests_grow() -> None:
    heads = Heads(num_heads=32, num_kv_heads=8, head_dim=128)
    # One block table holds the longest request; others begin short.
    ends = [2000, 130, 40, 512]
    case = kernel_cases.attention_case(
        [(end - 1, 1) for end in ends], heads, block_size=128, dtype=torch.bfloat16, device="cuda"
    )
    # All tables lead to written blocks as far as they reach.
    tables = case.step.block_tables[:1].expand(4, -1).contiguous()
    lengths = torch.tensor([200, 17, 1, 129], dtype=torch.int32, device="cuda")
    case = replace(case, step=replace(case.step, block_tables=tables, kv_lengths=lengths))
    attention = PagedAttention(128)

    def attend() -> torch.Tensor:
        return attention.attend(case.pages, 0, case.queries, case.step, None)

    attend()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mixed = attend()
    for more in (0, 1, 127, 1800):
        lengths.add_(more).clamp_(max=2000)
        host = lengths.cpu().numpy()
        mixed.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        grown = replace(case.step, host_starts=host - 1, host_lengths=case.step.host_lengths)
        same = PagedAttention(128, 1).attend(case.pages, 0, case.queries, grown, None)
        assert mixed.isfinite().all()
        torch.testing.assert_close(mixed, same, rtol=1e-2, atol=1e-2)
        kernel_cases.assert_attends_like_its_twin(attention, replace(case, step=grown), None)
