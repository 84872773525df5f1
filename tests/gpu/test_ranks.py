"""A model on two GPUs: what one says, with collectives and boards in CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.worker.checkpoints import make_checkpoint
from tests.worker.driver import Driver, configuration, sampling
from tests.worker.group import Group

POCKET = Path(__file__).parents[2] / "models" / "pocket"
NUM_TOKENS = 40
PROMPTS = [[1, *range(300, 340)], [1, 17, 230, 512], [1, *range(600, 900, 3)]]

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    with Group(2, kind="cuda") as started:
        yield started


def driver(group: Group, folder: Path, num_ranks: int, *, dtype: str, quantize: str) -> Driver:
    configure = configuration(str(folder), dtype=dtype, quantize=quantize, max_num_requests=16)
    return Driver(group.step, group.configure(configure, num_ranks)[0])


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_in_float32_the_pocket_model_says_the_same_on_two(group: Group, quantize: str) -> None:
    params = [sampling(), sampling(temperature=0.9, top_p=0.95, seed=11), sampling()]
    said = [
        driver(group, POCKET, num_ranks, dtype="float32", quantize=quantize).generate(
            PROMPTS, NUM_TOKENS, params, chunk=64
        )
        for num_ranks in (1, 2)
    ]
    assert said[1] == said[0]


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
@pytest.mark.parametrize("num_rows", [1, 5, 16])
def test_log_probabilities_differ_by_rounding(
    group: Group, tmp_path: Path, num_rows: int, quantize: str
) -> None:
    make_checkpoint(tmp_path, "llama", head_dim=64, intermediate_size=256, vocab_size=97)
    wanted = sampling(num_top_logprobs=20)
    found = []
    for num_ranks in (1, 2):
        each = driver(group, tmp_path, num_ranks, dtype="bfloat16", quantize=quantize)
        slots = [
            each.add([(7 * row + at) % 97 for at in range(30)], wanted) for row in range(num_rows)
        ]
        each.step(dict.fromkeys(slots, 29))
        each.step(dict.fromkeys(slots, 1))  # like decode: a graph
        assert each.last is not None
        found.append(each.last.logprobs)
    assert len(found[0]) == len(found[1]) == num_rows
    for alone, together in zip(*found, strict=True):
        assert alone.row == together.row
        ids, others = (np.frombuffer(each.top_ids, "<i4") for each in (alone, together))
        values, their = (np.frombuffer(each.top_logprobs, "<f4") for each in (alone, together))
        expected = dict(zip(ids.tolist(), values.tolist(), strict=True))
        both = [
            (expected[each], value)
            for each, value in zip(others.tolist(), their.tolist(), strict=True)
            if each in expected
        ]
        assert len(both) >= 15
        assert max(abs(one - other) for one, other in both) < 0.25


def test_many_steps_in_a_row_stay_in_step(group: Group) -> None:
    """Two thousand rounds over the boards, with prompts between: no part is taken for another."""
    params = [sampling(temperature=0.8, seed=row) for row in range(12)]
    prompts = [[1, *range(300 + row, 340 + 7 * row)] for row in range(12)]
    said = []
    for num_ranks in (1, 2):
        each = driver(group, POCKET, num_ranks, dtype="float32", quantize="none")
        said.append(each.generate(prompts, 160, params, chunk=17))
    assert said[1] == said[0]
