"""A decode whose inputs the device keeps is the decode that the host describes."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.worker.driver import Driver
from tokenloom.wire.messages import Ready, Step, StepDone
from tokenloom.worker.batch import Batch
from tokenloom.worker.drawing import Drawn
from tokenloom.worker.graphs import ladder
from tokenloom.worker.kernels import FAULTY
from tokenloom.worker.kernels.twin import TorchOperations
from tokenloom.worker.slots import Limits, Slots

LIMITS = Limits(
    num_slots=6,
    num_blocks=40,
    block_size=4,
    vocab_size=1000,
    max_model_tokens=30,
    max_step_tokens=64,
)


class Twins:
    """Answers steps with counted tokens and compares both ways to a decode's inputs."""

    def __init__(self) -> None:
        self.slots = Slots(LIMITS)
        self.batch = Batch(LIMITS, TorchOperations(), torch.device("cpu"))
        self.num_compared = 0
        self.next_token = 500

    def step(self, step: Step) -> StepDone:
        changes = self.slots.apply(step)
        self.batch.apply(changes)
        if changes.only_decodes:
            self.compare(changes.span_slots)
        inputs = self.batch.inputs(changes)
        num_rows = len(inputs.rows.host_slots)
        tokens = torch.arange(self.next_token, self.next_token + num_rows, dtype=torch.int32)
        self.next_token += num_rows
        self.batch.append(inputs.rows.slots, inputs.rows.ends, tokens)
        return StepDone(
            epoch=1,
            step_id=step.step_id,
            tokens=tokens.numpy().tobytes(),
            logprobs=(),
            faulty_rows=b"",
            compute_s=0.0,
        )

    def compare(self, slots: np.ndarray) -> None:
        idle = [self.batch.idle_slot] * 2
        device_slots = torch.tensor([*slots.tolist(), *idle])
        found = self.batch.decode_inputs(device_slots)
        starts = self.slots.num_computed[slots] - 1  # `Slots.apply` has moved them on
        tables = self.batch._tables[device_slots]
        for row, (slot, start) in enumerate(zip(slots.tolist(), starts.tolist(), strict=True)):
            assert found.positions[row] == start
            assert found.tokens[row] == self.batch.tokens[slot, start]
            assert found.spans.kv_lengths[row] == start + 1
            assert found.spans.places[row] == tables[row, start // 4] * 4 + start % 4
        assert found.spans.places[-2:].tolist() == [LIMITS.num_blocks * LIMITS.block_size] * 2
        assert torch.equal(found.spans.block_tables, tables)
        self.num_compared += 1


def driver_of(twins: Twins) -> Driver:
    ready = Ready(
        epoch=1,
        num_blocks=LIMITS.num_blocks,
        block_size=LIMITS.block_size,
        vocab_size=LIMITS.vocab_size,
        max_model_tokens=LIMITS.max_model_tokens,
        max_step_tokens=LIMITS.max_step_tokens,
        weights_bytes=0,
        kv_bytes=0,
    )
    return Driver(twins.step, ready)


def test_the_device_knows_where_each_slot_decodes_next() -> None:
    twins = Twins()
    driver = driver_of(twins)
    first = driver.add(range(7))
    driver.run({first: 1})
    second = driver.add(range(1))
    third = driver.add(range(12))
    driver.run({first: 9, second: 9, third: 9}, chunk=5)
    driver.release(second)
    fourth = driver.add(range(3))
    driver.run({first: 3, third: 2, fourth: 6})
    assert twins.num_compared > 10


def test_advancing_appends_and_leaves_the_idle_row_alone() -> None:
    twins = Twins()
    driver = driver_of(twins)
    slot = driver.add(range(3))
    driver.run({slot: 1})
    batch = twins.batch
    rows = torch.tensor([slot, batch.idle_slot])
    inputs = batch.decode_inputs(rows)
    drawn = Drawn(
        tokens=torch.tensor([77, 0], dtype=torch.int32), faulty=torch.tensor([False, True])
    )
    assert batch.advance(rows, inputs.positions, drawn).tolist() == [77, FAULTY]
    assert batch.tokens[slot, :5].tolist() == [0, 1, 2, 500, 77]
    assert batch.ends(rows).tolist() == [4, 0]
    following = batch.decode_inputs(rows)
    assert following.tokens[0] == 77
    assert following.positions.tolist() == [4, 0]


def test_only_single_last_tokens_make_a_decode_step() -> None:
    twins = Twins()
    driver = driver_of(twins)
    slots = [driver.add(range(5)), driver.add(range(5))]

    def is_decode(spans: dict[int, int]) -> bool:
        step = driver.plan(spans)
        changes = copy.deepcopy(twins.slots).apply(step)
        driver.finish(twins.step(step), spans)
        return changes.only_decodes

    assert not is_decode({slots[0]: 4})
    assert is_decode({slots[0]: 1})
    assert not is_decode({slots[0]: 1, slots[1]: 4})
    assert is_decode({slots[0]: 1, slots[1]: 1})
    released = driver.plan({})
    assert not copy.deepcopy(twins.slots).apply(released).only_decodes


@pytest.mark.parametrize("max_rows", [1, 3, 8, 100, 256, 1000])
def test_the_ladder_of_sizes_ascends_to_the_most_rows(max_rows: int) -> None:
    sizes = ladder(max_rows)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == max_rows
    for below, size in pairwise(sizes):
        assert size - below - 1 <= max(7, size // 5)
