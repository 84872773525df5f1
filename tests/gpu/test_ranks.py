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
def test_log_probabilities_differ_by_rounding(group: Group, tmp_path: Path, quantize: str) -> None:
    make_checkpoint(tmp_path, "llama", head_dim=64, intermediate_size=256, vocab_size=97)
    alone, together = (
        first_logprobs(driver(group, tmp_path, num_ranks, dtype="bfloat16", quantize=quantize))
        for num_ranks in (1, 2)
    )
    for expected, found in zip(alone, together, strict=True):
        both = expected.keys() & found.keys()
        assert len(both) >= 15
        assert max(abs(expected[token] - found[token]) for token in both) < 0.25


def first_logprobs(driver: Driver) -> list[dict[int, float]]:
    """Returns the 20 likeliest tokens behind prompts, of steps of 1, 5 and 16 requests."""
    likeliest = []
    for num_rows in (1, 5, 16):
        prompts = [[(7 * row + at) % 97 for at in range(30)] for row in range(num_rows)]
        slots = [driver.add(prompt, sampling(num_top_logprobs=20)) for prompt in prompts]
        driver.step(dict.fromkeys(slots, 29))
        driver.step(dict.fromkeys(slots, 1))  # like decode: a graph
        assert driver.last is not None
        assert len(driver.last.logprobs) == num_rows
        for each in driver.last.logprobs:
            ids = np.frombuffer(each.top_ids, "<i4").tolist()
            values = np.frombuffer(each.top_logprobs, "<f4").tolist()
            likeliest.append(dict(zip(ids, values, strict=True)))
        for slot in slots:
            driver.release(slot)
    return likeliest


def test_many_steps_in_a_row_stay_in_step(group: Group) -> None:
    """Two thousand rounds over the boards, with prompts between: no part is taken for another."""
    params = [sampling(temperature=0.8, seed=row) for row in range(12)]
    prompts = [[1, *range(300 + row, 340 + 7 * row)] for row in range(12)]
    said = []
    for num_ranks in (1, 2):
        each = driver(group, POCKET, num_ranks, dtype="float32", quantize="none")
        said.append(each.generate(prompts, 160, params, chunk=17))
    assert said[1] == said[0]
