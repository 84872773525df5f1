"""Who is suspected of a crash, who fails, and when it was one too many."""

from __future__ import annotations

import numpy as np
import pytest

from tests.core.processes import submit
from tokenloom.scheduler.core import admission, applying, crashes, planning
from tokenloom.scheduler.core.state import Limits, ModelSpec, State
from tokenloom.scheduler.messages import Abort, FinishReason
from tokenloom.wire.messages import StepDone

NUM_REQUESTS = 4
SPEC = ModelSpec(
    epoch=1,
    vocab_size=97,
    max_model_tokens=256,
    max_step_tokens=64,
    block_size=16,
    num_blocks=100,
)


@pytest.fixture
def state() -> State:
    """Requests 0 to 3 run and have a token each."""
    state = State(
        Limits(
            max_num_requests=8,
            max_mixed_prompt_tokens=None,
            max_waiting_requests=100,
            max_waiting_tokens=10_000,
        )
    )
    admission.begin_epoch(state, SPEC)
    for stream in range(NUM_REQUESTS):
        admission.submit(state, 0, submit(stream, [3] * (10 + stream), 50), 0.0)
    step(state)
    return state


def step(state: State) -> list[int]:
    """Computes a step; returns the streams that were in it."""
    plan = planning.plan(state, 0.0)
    assert plan is not None
    assert state.slots is not None
    streams = sorted(state.slots.stream[plan.span_slots].tolist())
    done = StepDone(
        epoch=1,
        step_id=plan.step_id,
        tokens=np.full(int(plan.span_samples.sum()), 5, np.int32).tobytes(),
        logprobs=(),
        faulty_rows=b"",
        compute_s=0.0,
    )
    applying.apply(state, done, 0.0)
    assert state.check() == []
    return streams


def crash(state: State) -> list[int]:
    """Loses the group with a step in flight; returns the streams that were in it."""
    planning.plan(state, 0.0)
    assert state.slots is not None
    streams = sorted(state.slots.stream[state.in_flight[0].slots].tolist())
    crashes.lose_group(state)
    assert state.check() == []
    admission.begin_epoch(state, SPEC)
    return streams


def ends(state: State) -> dict[int, FinishReason]:
    return {end.stream: end.reason for end in state.take_outputs()[0].finished}


def test_after_one_crash_all_go_on_together(state: State) -> None:
    assert crash(state) == [0, 1, 2, 3]
    assert step(state) == [0, 1, 2, 3]
    assert ends(state) == {}


def test_after_two_crashes_each_runs_alone_until_it_is_past_where_it_was(state: State) -> None:
    crash(state)
    crash(state)
    # Each had 1 token and the second was being drawn: with the third it is acquitted.
    for stream in range(NUM_REQUESTS):
        assert [step(state) for _ in range(2)] == [[stream]] * 2
    assert step(state) == [0, 1, 2, 3]
    assert ends(state) == {}


def test_a_request_that_crashes_alone_fails_and_the_others_are_acquitted(state: State) -> None:
    crash(state)
    crash(state)
    assert [step(state), step(state)] == [[0], [0]]
    assert crash(state) == [1]
    assert ends(state) == {1: FinishReason.CRASH}
    assert step(state) == [0, 2, 3]
    # With no suspicion left it takes two more crashes to suspect anybody.
    crash(state)
    assert step(state) == [0, 2, 3]


def test_those_who_were_not_in_the_step_are_not_suspected(state: State) -> None:
    crash(state)
    admission.submit(state, 0, submit(9, [3] * 5, 50), 0.0)
    crash(state)
    for stream in range(NUM_REQUESTS):
        assert [step(state), step(state)] == [[stream]] * 2
    assert step(state) == [0, 1, 2, 3, 9]


def test_newcomers_wait_until_the_suspects_are_through(state: State) -> None:
    crash(state)
    crash(state)
    admission.submit(state, 0, submit(9, [3] * 5, 50), 0.0)
    order = [step(state) for _ in range(2 * NUM_REQUESTS + 1)]
    assert [9] not in order
    assert order[-1] == [0, 1, 2, 3, 9]


def test_a_suspect_whose_client_leaves_holds_nobody_up(state: State) -> None:
    crash(state)
    crash(state)
    step(state)
    for stream in (0, 2):
        admission.abort(state, 0, Abort(stream=stream))
    assert [step(state) for _ in range(5)] == [[1], [1], [3], [3], [1, 3]]


def test_a_crash_while_nothing_is_computed_makes_nobody_suspicious(state: State) -> None:
    for _ in range(3):
        crashes.lose_group(state)
        admission.begin_epoch(state, SPEC)
    assert step(state) == [0, 1, 2, 3]


def test_the_budget_counts_crashes_within_its_window() -> None:
    budget = crashes.CrashBudget(max_crashes=2, window_s=10.0)
    assert [budget.spend(now) for now in (0.0, 9.0, 10.5, 19.0)] == [False, False, False, True]


def test_a_budget_of_0_allows_no_crash() -> None:
    assert crashes.CrashBudget(max_crashes=0, window_s=10.0).spend(5.0)
