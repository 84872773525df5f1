"""Steps in fixed shapes, computed without being captured, are the steps as they come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.worker import kernel_cases
from tests.worker.checkpoints import generate, make_checkpoint
from tests.worker.driver import Driver, configuration, ints
from tests.worker.random_load import MAX_STEP_TOKENS, NUM_SLOTS, RandomLoad
from tests.worker.test_parity import clear_prompt
from tokenloom.wire.messages import Step, StepDone
from tokenloom.worker.options import WorkerOptions
from tokenloom.worker.runner import ModelRunner
from tokenloom.worker.steps.batch import StepShape
from tokenloom.worker.steps.graphs import StepGraphs
from tokenloom.worker.steps.shapes import Computed, FixedSteps, ladder, mixed_ladder
from tokenloom.worker.steps.slots import Changes


class Uncaptured(StepGraphs):
    """Computes what was placed where a graph would be replayed."""

    def __init__(self, steps: FixedSteps) -> None:
        super().__init__(steps, torch.device("cpu"))
        self.shapes: Counter[StepShape | None] = Counter()

    def place(self, changes: Changes) -> Callable[[], Computed] | None:
        compute = super().place(changes)
        if compute is None:
            self.shapes[None] += 1
        return compute

    def _replay(self, shape: StepShape, num_rows: int) -> Computed:
        self.shapes[shape] += 1
        return self._steps.compute(shape).first(num_rows)


class Machine:
    """A runner on a CPU, with steps in fixed shapes or as they come."""

    def __init__(self, folder: Path, *, fixed: bool) -> None:
        torch.set_num_threads(1)
        self.runner = ModelRunner(WorkerOptions(device="cpu", kv_cache_bytes=4 * 1024 * 1024))
        configure = configuration(
            str(folder), max_num_requests=NUM_SLOTS, max_step_tokens=MAX_STEP_TOKENS
        )
        self.ready = self.runner.configure(configure, lambda *_: None)
        self.driver = Driver(self.step, self.ready)
        if fixed:
            rows, loaded = self.runner._rows, self.runner._loaded
            assert rows is not None
            assert loaded is not None
            with torch.inference_mode():
                self.steps = FixedSteps(loaded, rows.batch, rows.sampler, rows.limits)
            self.fixed = Uncaptured(self.steps)
            self.runner._rows = replace(rows, graphs=self.fixed)

    def step(self, step: Step) -> StepDone:
        return self.runner.launch(step).result()

    def slot_tokens(self) -> list[torch.Tensor]:
        """Returns of each slot the tokens that are known, the device's own."""
        rows, slots = self.runner._rows, self.runner._slots
        assert rows is not None
        assert slots is not None
        return [
            rows.batch.tokens[slot, : slots.lengths[slot]].clone()
            for slot in np.flatnonzero(slots.occupied).tolist()
        ]

    def idle_end(self) -> int:
        assert self.runner._rows is not None
        batch = self.runner._rows.batch
        return int(batch._ends[batch.idle_slot])


@pytest.mark.parametrize("edits", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window"])
def test_fixed_shapes_give_the_tokens_of_steps_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, *, edits: bool
) -> None:
    make_checkpoint(tmp_path, name)
    kernel_cases.poison_new_memory(monkeypatch)  # tokens in no span leave NaN, which harms nobody
    plain, fixed = Machine(tmp_path, fixed=False), Machine(tmp_path, fixed=True)
    expected = RandomLoad(plain.driver, len(name), edits=edits).run(75)
    assert RandomLoad(fixed.driver, len(name), edits=edits).run(75) == expected
    assert len(expected) > 50
    for found, tokens in zip(fixed.slot_tokens(), plain.slot_tokens(), strict=True):
        assert torch.equal(found, tokens)
    assert fixed.idle_end() == 0
    kinds = Counter(map(kind, fixed.fixed.shapes.elements()))
    assert kinds["decodes"] > 3
    assert kinds["prompts alone"] > 0
    assert kinds["mixed"] > 10
    assert kinds["none"] > 0  # more prompts than a shape holds


def kind(shape: StepShape | None) -> str:
    if shape is None:
        return "none"
    if not shape.num_decodes:
        return "prompts alone"
    return "decodes" if shape.num_decodes == shape.num_spans else "mixed"


def test_a_prompt_ends_and_goes_on_before_the_host_knows_its_token(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama")
    machine = Machine(tmp_path, fixed=True)
    driver, prompts = machine.driver, [clear_prompt(model, length) for length in (17, 40)]
    slots = [driver.add(prompt) for prompt in prompts]
    found: list[list[int]] = [[], []]

    def step(spans: dict[int, int]) -> None:
        sampling_slots = []
        done = machine.step(driver.plan(spans))
        for slot, length in spans.items():
            state = driver.slots[slot]
            state.num_computed += length
            if state.num_computed == len(state.tokens):
                state.tokens.append(0)  # what it is only the device knows
                sampling_slots.append(slot)
        for slot, token in zip(sampling_slots, ints(done.tokens), strict=True):
            found[slots.index(slot)].append(token)

    first, second = slots
    step({first: 17})
    step({first: 1, second: 30})
    step({first: 1, second: 9})
    step({first: 1, second: 1})
    for _ in range(8):
        step({second: 1, first: 1})
    expected = [generate(model, prompt, 12) for prompt in prompts]
    assert found == [expected[0], expected[1][:9]]


def test_a_step_of_nobody_changes_nothing_of_a_slot(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama")
    machine = Machine(tmp_path, fixed=True)
    prompt = clear_prompt(model, 20)
    slot = machine.driver.add(prompt)
    machine.driver.run({slot: 5})
    with torch.inference_mode():
        for shape in machine.steps.shapes:
            machine.steps.clear(shape)
            machine.steps.compute(shape)
    machine.driver.run({slot: 10})
    assert machine.driver.slots[slot].completion == generate(model, prompt, 10)


@pytest.mark.parametrize("max_rows", [1, 3, 8, 100, 256, 1000])
def test_the_ladder_of_sizes_ascends_to_the_most_rows(max_rows: int) -> None:
    sizes = ladder(max_rows)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == max_rows
    for below, size in pairwise(sizes):
        assert size - below - 1 <= max(7, size // 5)


@pytest.mark.parametrize("max_tokens", [1, 300, 1024, 8192])
def test_the_ladder_of_mixed_steps_ascends_as_far_as_steps_go(max_tokens: int) -> None:
    sizes = mixed_ladder(max_tokens)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] >= min(max_tokens, 2048)
    for below, size in pairwise(sizes):
        assert below < max_tokens
        assert size - below <= max(64, size // 4)
