"""The readable backend against attention written out position by position."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.worker.attention_cases import AttentionCase, make_case
from tokenloom.worker.attention.reference import ReferenceAttention


def written_out(case: AttentionCase, window: int | None) -> Tensor:
    """Returns what each query should see, from the case's own dense keys and values."""
    num_heads, num_kv_heads = case.queries.shape[1], case.keys[0].shape[1]
    rows = []
    token = 0
    for span, (start, length) in enumerate(case.spans):
        for position in range(start, start + length):
            first = 0 if window is None else max(0, position + 1 - window)
            heads = []
            for head in range(num_heads):
                group = head // (num_heads // num_kv_heads)
                keys = case.keys[span][first : position + 1, group].double()
                values = case.values[span][first : position + 1, group].double()
                scores = keys @ case.queries[token, head].double()
                heads.append((scores / math.sqrt(keys.shape[1])).softmax(0) @ values)
            rows.append(torch.stack(heads))
            token += 1
    return torch.stack(rows)


SPANS: dict[str, Sequence[tuple[int, int]]] = {
    "one decode": [(12, 1)],
    "the very first token": [(0, 1)],
    "decodes of many lengths": [(0, 1), (3, 1), (4, 1), (5, 1), (31, 1), (64, 1), (200, 1)],
    "prefills": [(0, 5), (0, 16), (0, 17)],
    "chunks in the middle": [(7, 9), (16, 16), (33, 3)],
    "all kinds": [(0, 40), (21, 1), (8, 7), (100, 1), (0, 2), (22, 1), (50, 33)],
}


@pytest.mark.parametrize("window", [None, 1, 5, 300])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", SPANS)
def test_every_token_sees_its_positions(name: str, num_kv_heads: int, window: int | None) -> None:
    attention = ReferenceAttention(block_size=8)
    case = make_case(SPANS[name], num_heads=4, num_kv_heads=num_kv_heads, head_dim=8, block_size=8)
    mixed = attention.attend(case.pages, 0, case.queries, case.step, window)
    torch.testing.assert_close(mixed.double(), written_out(case, window), atol=1e-5, rtol=1e-5)


def test_a_request_does_not_see_what_lies_behind_its_end() -> None:
    attention = ReferenceAttention(block_size=8)
    spans = SPANS["all kinds"]
    case = make_case(spans, num_heads=2, num_kv_heads=1, head_dim=8, block_size=8, rest=0.0)
    other = make_case(spans, num_heads=2, num_kv_heads=1, head_dim=8, block_size=8, rest=1e4)
    one = attention.attend(case.pages, 0, case.queries, case.step, None)
    two = attention.attend(other.pages, 0, other.queries, other.step, None)
    torch.testing.assert_close(one, two)
