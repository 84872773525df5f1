"""What a request is told that it cost, and how busy the core says that it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from tests.core.processes import submit
from tokenloom.scheduler.core import admission, applying, planning
from tokenloom.scheduler.core.load import MAX_INTERVAL_S, MIN_INTERVAL_S, LoadPace, load_of
from tokenloom.scheduler.core.metering import samples_of
from tokenloom.scheduler.core.planning import StepPlan
from tokenloom.scheduler.core.state import Limits, ModelSpec, State
from tokenloom.scheduler.messages import Abort, Finished
from tokenloom.wire.messages import StepDone

BLOCK_SIZE = 4


def ready_state(*, num_blocks: int = 100, num_ranks: int = 1, max_step_tokens: int = 64) -> State:
    state = State(
        Limits(
            max_num_requests=8,
            max_mixed_prompt_tokens=64,
            max_waiting_requests=10,
            max_waiting_tokens=1000,
        )
    )
    admission.begin_epoch(state, spec(num_blocks, num_ranks, max_step_tokens))
    return state


def spec(num_blocks: int = 100, num_ranks: int = 1, max_step_tokens: int = 64) -> ModelSpec:
    return ModelSpec(
        epoch=1,
        vocab_size=97,
        max_model_tokens=256,
        max_step_tokens=max_step_tokens,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        num_ranks=num_ranks,
    )


def answer(state: State, plan: StepPlan, now: float, compute_s: float) -> None:
    """Enters that the step drew token 5 for each of its rows."""
    num_rows = int(plan.span_samples.sum())
    applying.apply(
        state,
        StepDone(
            epoch=1,
            step_id=plan.step_id,
            tokens=np.full(num_rows, 5, np.int32).tobytes(),
            logprobs=(),
            faulty_rows=b"",
            compute_s=compute_s,
        ),
        now,
    )


class Run:
    """Steps one after the other, each of a second on the clock and `compute_s` on the device."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.now = 100.0
        self.held_block_s = 0.0
        """Blocks that anybody held, times how long."""

    def step(self, compute_s: float = 0.5) -> bool:
        plan = planning.plan(self.state, self.now)
        if plan is None:
            return False
        assert self.state.pool is not None
        self.held_block_s += self.state.pool.num_blocks - self.state.pool.num_free
        self.now += 1.0
        answer(self.state, plan, self.now, compute_s)
        return True

    def to_the_end(self, durations: Sequence[float] = (0.5,)) -> dict[int, Finished]:
        """Steps until nothing is left to compute; returns what each stream was told."""
        count = 0
        while self.step(durations[count % len(durations)]):
            count += 1
        return ends(self.state)


def ends(state: State) -> dict[int, Finished]:
    return {end.stream: end for end in state.take_outputs()[0].finished}


def test_the_shares_of_requests_add_up_to_what_all_gpus_took() -> None:
    state = ready_state(num_ranks=2, max_step_tokens=16)
    for stream in range(5):
        admission.submit(state, 0, submit(stream, [3] * (5 + 7 * stream), 3 + 4 * stream), 0.0)
    finished = Run(state).to_the_end([0.5, 0.25, 0.125])
    assert len(finished) == 5
    assert sum(end.gpu_s for end in finished.values()) == pytest.approx(state.totals.gpu_s)
    assert state.totals.gpu_s == pytest.approx(
        2 * sum([0.5, 0.25, 0.125][step % 3] for step in range(state.totals.num_steps))
    )


def test_in_a_step_with_prompts_each_pays_what_such_tokens_have_cost() -> None:
    """Two decode in 0.2 s, a prompt token takes 0.01 s: two of 0.1 s stand beside 30 of 0.01 s."""
    state = ready_state()
    run = Run(state)
    for stream in range(2):
        admission.submit(state, 0, submit(stream, [3] * 10, 40), 0.0)
    run.step(20 * 0.01)
    run.step(0.2)
    assert state.slots is not None
    before = state.slots.gpu_s[:].copy()
    admission.submit(state, 0, submit(2, [4] * 30, 2), 0.0)
    run.step(1.0)
    spent = sorted((state.slots.gpu_s - before).tolist())[-3:]
    assert spent == pytest.approx([0.2, 0.2, 0.6])


@pytest.mark.parametrize("compute_s", [0.0, -1.0, math.inf, math.nan])
def test_a_worker_whose_word_is_no_duration_costs_nobody_anything(compute_s: float) -> None:
    state = ready_state()
    admission.submit(state, 0, submit(1, [3] * 9, 4), 0.0)
    (end,) = Run(state).to_the_end([compute_s]).values()
    assert end.gpu_s == state.totals.gpu_s == 0.0


def test_who_left_during_a_step_is_not_paid_for_by_the_others() -> None:
    state = ready_state()
    run = Run(state)
    for stream in range(2):
        admission.submit(state, 0, submit(stream, [3] * 5, 10), 0.0)
    run.step(0.0)
    plan = planning.plan(state, run.now)
    assert plan is not None
    admission.abort(state, 0, Abort(stream=0))
    answer(state, plan, run.now + 1, 0.8)
    assert state.slots is not None
    assert state.slots.gpu_s.sum() == pytest.approx(0.4)
    assert state.totals.gpu_s == 0.8


def test_block_seconds_of_all_requests_are_those_that_blocks_were_held() -> None:
    state = ready_state()
    run = Run(state)
    shared = [3] * 20
    admission.submit(state, 0, submit(0, shared, 12), 0.0)
    for _ in range(3):
        run.step()
    for stream in range(1, 4):
        admission.submit(state, 0, submit(stream, [*shared, stream + 5], 3 * stream), 0.0)
    finished = run.to_the_end()
    assert len(finished) == 4
    assert sum(end.kv_block_s for end in finished.values()) == pytest.approx(run.held_block_s)
    # The three that came later share five blocks with the first, and with each other.
    assert finished[1].kv_block_s < finished[2].kv_block_s < finished[3].kv_block_s


def test_a_lonely_request_pays_for_its_blocks_from_the_plan_to_the_end() -> None:
    state = ready_state()
    admission.submit(state, 0, submit(0, [3] * 4, 4), 0.0)
    (end,) = Run(state).to_the_end().values()
    assert end.kv_block_s == pytest.approx(1 + 2 + 2 + 2)  # the first token is position 4


def test_what_is_computed_again_after_a_preemption_is_told_and_nothing_else() -> None:
    state = ready_state(num_blocks=6)
    for stream in range(2):
        admission.submit(state, 0, submit(stream, [3 + stream] * 8, 12), 0.0)
    finished = Run(state).to_the_end()
    assert finished[0].num_preemptions == finished[0].num_recomputed_tokens == 0
    assert finished[1].num_preemptions == state.totals.num_preemptions == 1
    # Of its 8 + n positions the full blocks that nobody took since are found again.
    assert 0 < finished[1].num_recomputed_tokens < 20
    assert state.totals.num_recomputed_tokens == finished[1].num_recomputed_tokens


def test_after_the_loss_of_a_group_all_that_was_computed_is_computed_again() -> None:
    state = ready_state()
    run = Run(state)
    admission.submit(state, 0, submit(0, [3] * 10, 8), 0.0)
    for _ in range(4):
        run.step()
    state.totals.lose_group(run.now)
    admission.end_epoch(state)
    admission.begin_epoch(state, spec())
    state.totals.begin_epoch(run.now + 5)
    (end,) = run.to_the_end().values()
    assert end.num_recomputed_tokens == 13
    assert end.num_preemptions == 0
    assert load_of(state).num_recoveries == 1


def test_load_counts_what_happened() -> None:
    state = ready_state()
    run = Run(state)
    assert load_of(state).utilization == 0.0
    for stream in range(12):
        admission.submit(state, 0, submit(stream, [3] * 9, 4), 0.0)
    load = load_of(state)
    assert (load.num_waiting, load.num_waiting_tokens, load.num_refused) == (10, 90, 2)
    assert load.queue_fraction == load.utilization == 1.0
    run.step()
    load = load_of(state)
    assert load.num_running + load.num_waiting == 10
    assert load.num_used_blocks > 0
    run.to_the_end()
    load = load_of(state)
    assert (load.num_finished, load.num_running, load.num_used_blocks) == (10, 0, 0)
    assert load.num_prompt_tokens == 90
    assert load.num_generated_tokens == 40
    assert 0 < load.num_cached_prompt_tokens < 90
    assert load.busy_s == pytest.approx(run.now - 100)
    assert load.step_s == pytest.approx(1.0)


def test_the_cores_samples_are_its_counts_and_tenants_are_told_apart() -> None:
    state = ready_state()
    for stream, tenant in enumerate(["", "search", "batch", "search"]):
        message = msgspec.structs.replace(submit(stream, [3] * 9, 4), tenant=tenant)
        admission.submit(state, 0, message, 0.0)
    finished = Run(state).to_the_end()
    samples = list(samples_of(state, ()))
    assert len({(sample.name, sample.labels) for sample in samples}) == len(samples)
    told = {(sample.name, *sample.labels): sample.value for sample in samples}
    assert told["tokenloom_requests_finished", "length"] == 4
    assert told["tokenloom_steps",] == state.totals.num_steps
    for tenant, streams in {"search": (1, 3), "batch": (2,)}.items():
        costs = [finished[stream] for stream in streams]
        assert told["tokenloom_tenant_generation_tokens", tenant] == 4 * len(streams)
        gpu_s = sum(cost.gpu_s for cost in costs)
        assert told["tokenloom_tenant_gpu_seconds", tenant] == pytest.approx(gpu_s)
    assert {labels[0] for _, *labels in told if labels} == {"length", "search", "batch"}


def test_gaps_between_tokens_are_those_of_each_request() -> None:
    state = ready_state()
    run = Run(state)
    admission.submit(state, 0, submit(0, [3] * 9, 4), 0.0)
    run.step()
    admission.submit(state, 0, submit(1, [4] * 9, 3), 0.0)
    run.to_the_end()
    gaps = state.totals.token_gaps
    assert gaps.counts.sum() == 3 + 2
    assert gaps.total == pytest.approx(5.0)


def test_the_fullest_bound_of_the_queue_is_told() -> None:
    state = ready_state()
    admission.submit(state, 0, submit(0, [3] * 200, 4), 0.0)
    limits = state.limits
    assert load_of(state).queue_fraction == pytest.approx(200 / limits.max_waiting_tokens)
    few_bytes = dataclasses.replace(limits, max_waiting_bytes=2 * state.waiting.num_bytes)
    state.limits = few_bytes
    assert load_of(state).queue_fraction == 0.5


def test_load_is_told_soon_after_news_and_each_second_without() -> None:
    pace = LoadPace()
    pace.tell(50.0)
    assert pace.due_s == 50.0 + MAX_INTERVAL_S
    pace.note()
    assert pace.due_s == 50.0 + MIN_INTERVAL_S
    pace.tell(50.2)
    assert pace.due_s == 50.2 + MAX_INTERVAL_S
