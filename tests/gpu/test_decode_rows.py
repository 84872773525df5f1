"""The kernels around a captured decode step do what their twins do."""

from __future__ import annotations

import pytest
import torch

from tokenloom.worker.kernels import FAULTY
from tokenloom.worker.kernels.fused import FusedOperations
from tokenloom.worker.kernels.twin import TorchOperations

NUM_SLOTS, MAX_TOKENS, BLOCK_SIZE = 300, 777, 16
IDLE = NUM_SLOTS


def make_state(num_entries: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns ends, tokens and tables of slots and the idle one."""
    longest = min(MAX_TOKENS - 1, num_entries * BLOCK_SIZE - 1)
    ends = torch.randint(0, longest, (NUM_SLOTS + 1,), device="cuda")
    ends[IDLE] = 0
    tokens = torch.randint(0, 1000, (NUM_SLOTS + 1, MAX_TOKENS), dtype=torch.int32, device="cuda")
    tables = torch.randint(
        0, 1 << 20, (NUM_SLOTS + 1, num_entries), dtype=torch.int32, device="cuda"
    )
    return ends, tokens, tables


@pytest.mark.parametrize("num_entries", [1, 49, 2500])
@pytest.mark.parametrize("num_rows", [1, 7, 256])
def test_rows_begin_where_the_twin_says(num_rows: int, num_entries: int) -> None:
    ends, tokens, tables = make_state(num_entries)
    slots = torch.randperm(NUM_SLOTS, device="cuda")[:num_rows]
    slots[num_rows // 2 + 1 :] = IDLE
    found = FusedOperations().begin_decode(slots, ends, tokens, tables, BLOCK_SIZE)
    expected = TorchOperations().begin_decode(slots, ends, tokens, tables, BLOCK_SIZE)
    for name in ("positions", "tokens", "kv_lengths", "places", "block_tables"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name


def test_rows_end_one_token_on_and_the_idle_one_stays() -> None:
    ends, tokens, _ = make_state(100)
    slots = torch.randperm(NUM_SLOTS, device="cuda")[:200]
    slots[150:] = IDLE
    positions = ends[slots]
    drawn = torch.arange(5000, 5200, dtype=torch.int32, device="cuda")
    faulty = torch.rand(200, device="cuda") < 0.1
    results = FusedOperations().end_decode(slots, positions, drawn, faulty, ends, tokens, IDLE)
    assert torch.equal(results, drawn.masked_fill(faulty, FAULTY))
    assert torch.equal(ends[slots[:150]], positions[:150] + 1)
    assert torch.equal(tokens[slots[:150], positions[:150] + 1], drawn[:150])
    assert ends[IDLE] == 0
