"""How many prompt tokens a step takes: alone, beside decoding requests, and in a burst."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.core.processes import submit
from tokenloom.scheduler.core import admission, applying, planning
from tokenloom.scheduler.core.costs import MAX_STALL, UNKNOWN_PROMPT_TOKENS
from tokenloom.scheduler.core.planning import LONG_QUEUE
from tokenloom.scheduler.core.state import Limits, ModelSpec, State
from tokenloom.wire.messages import StepDone

STEP_TOKENS = 4000
SPEC = ModelSpec(
    epoch=1,
    vocab_size=97,
    max_model_tokens=20_000,
    max_step_tokens=STEP_TOKENS,
    block_size=16,
    num_blocks=10_000,
)
DECODE_S = 2**-7
PROMPT_TOKEN_S = 2**-16


def ready_state(*, fixed: int | None = None) -> State:
    """Returns a state in which nothing runs and nothing is known."""
    state = State(
        Limits(
            max_num_requests=64,
            max_mixed_prompt_tokens=fixed,
            max_waiting_requests=1000,
            max_waiting_tokens=10**9,
            prefix_cache=False,
        )
    )
    admission.begin_epoch(state, SPEC)
    return state


def step(state: State) -> int:
    """Plans a step and enters its result; returns how many prompt tokens it took."""
    plan = planning.plan(state, 0.0)
    assert plan is not None
    num_prompt_tokens = int(plan.span_lengths[plan.span_lengths > 1].sum())
    num_sampled = int(plan.span_samples.sum())
    compute_s = DECODE_S if num_prompt_tokens == 0 else num_prompt_tokens * PROMPT_TOKEN_S
    done = StepDone(
        epoch=1,
        step_id=plan.step_id,
        tokens=np.full(num_sampled, 5, np.int32).tobytes(),
        logprobs=(),
        faulty_rows=b"",
        compute_s=compute_s,
    )
    applying.apply(state, done, 0.0)
    return num_prompt_tokens


def come(state: State, lengths: Sequence[int]) -> None:
    """Submits prompts of these lengths."""
    for length in lengths:
        admission.submit(state, 0, submit(state.next_serial, [3] * length, 500), 0.0)


def test_a_prompt_alone_takes_whole_steps() -> None:
    state = ready_state()
    come(state, [10_000])
    assert [step(state) for _ in range(4)] == [STEP_TOKENS, STEP_TOKENS, 2000, 0]


def test_beside_a_decoding_request_prompts_take_what_the_costs_allow() -> None:
    state = ready_state()
    come(state, [100])
    assert [step(state), step(state)] == [100, 0]
    come(state, [10_000])
    assert step(state) == (MAX_STALL - 1) * DECODE_S / PROMPT_TOKEN_S


def test_a_configured_budget_holds_whatever_steps_cost() -> None:
    state = ready_state(fixed=77)
    come(state, [100])
    assert [step(state), step(state)] == [100, 0]
    come(state, [10_000])
    assert step(state) == 77


def test_a_burst_is_computed_in_whole_steps_to_its_last_prompt() -> None:
    state = ready_state(fixed=77)
    come(state, [100])
    step(state)
    come(state, [1000] * (LONG_QUEUE + 1))
    room = STEP_TOKENS - 1
    assert step(state) == room
    assert step(state) == room - 4  # of them the first step left but a token, or nothing
    assert step(state) == 9 * 1000 - room - 1 - (room - 4)
    come(state, [1000] * LONG_QUEUE)
    assert step(state) == 77


def test_another_worker_is_measured_anew() -> None:
    state = ready_state()
    come(state, [100])
    step(state)
    step(state)
    admission.begin_epoch(state, SPEC)
    step(state)
    come(state, [10_000])
    assert step(state) == UNKNOWN_PROMPT_TOKENS
