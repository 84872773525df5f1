"""A decode whose inputs the device keeps is the decode that the host describes."""

from __future__ import annotations

import copy

import numpy as np
import torch

from tests.worker.driver import Driver
from tokenloom.wire.messages import Ready, Step, StepDone
from tokenloom.worker.drawing import Drawn
from tokenloom.worker.kernels import FAULTY
from tokenloom.worker.kernels.twin import TorchOperations
from tokenloom.worker.steps.batch import Batch, StepShape
from tokenloom.worker.steps.slots import Limits, Slots

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
        num_rows = len(changes.sample_slots)
        tokens = torch.arange(self.next_token, self.next_token + num_rows, dtype=torch.int32)
        self.next_token += num_rows
        self.batch.append(inputs.row_slots, inputs.row_ends, tokens)
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


def test_a_step_lies_in_a_larger_shape_with_the_idle_slot_around_it() -> None:
    twins = Twins()
    driver = driver_of(twins)
    decodes = [driver.add(range(length)) for length in (7, 3)]
    driver.run(dict.fromkeys(decodes, 1))
    chunk, prompt = driver.add(range(12)), driver.add(range(5))
    step = driver.plan({decodes[1]: 1, decodes[0]: 1, chunk: 6, prompt: 5})
    changes = twins.slots.apply(step)
    twins.batch.apply(changes)
    exact = twins.batch.inputs(changes)
    shape = StepShape(
        num_tokens=20, num_spans=9, num_decodes=4, num_rows=6, max_length=20, max_kv_length=30
    )
    columns = [torch.from_numpy(column) for column in twins.batch.columns(changes, shape)]
    inputs = twins.batch.look_up(columns, shape)

    assert torch.equal(inputs.tokens[:13], exact.tokens)
    assert torch.equal(inputs.positions[:13], exact.positions)
    assert torch.equal(inputs.spans.places[:13], exact.spans.places)
    assert set(inputs.spans.places[13:].tolist()) == {LIMITS.num_blocks * LIMITS.block_size}
    assert inputs.spans.offsets.tolist() == [0, 1, 2, 2, 2, 8, 13, 13, 13, 13]
    assert inputs.spans.kv_lengths.tolist() == [4, 8, 0, 0, 6, 5, 0, 0, 0]
    width = exact.spans.block_tables.shape[1]
    tables = inputs.spans.block_tables[[0, 1, 4, 5], :width]
    assert torch.equal(tables, exact.spans.block_tables)
    idle = twins.batch.idle_slot
    assert inputs.last_tokens[:3].tolist() == exact.last_tokens.tolist() == [0, 1, 12]
    assert inputs.row_slots.tolist() == [decodes[1], decodes[0], prompt, idle, idle, idle]
    assert inputs.row_ends[:3].tolist() == exact.row_ends.tolist() == [4, 8, 5]
