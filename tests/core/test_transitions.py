"""Single transitions of the core's state: what the random runs cannot show."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from tests.core.processes import submit
from tokenloom.scheduler.core import admission, applying, planning
from tokenloom.scheduler.core.state import Limits, ModelSpec, State
from tokenloom.scheduler.messages import Abort, FinishReason, RefusalReason, Submit
from tokenloom.wire.messages import StepDone

BLOCK_SIZE = 16


def spec(num_blocks: int) -> ModelSpec:
    return ModelSpec(
        epoch=1,
        vocab_size=97,
        max_model_tokens=256,
        max_step_tokens=2 * BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
    )


def ready_state(*, prefix_cache: bool = True) -> State:
    """Returns a state whose prompts are computed in chunks of two blocks."""
    limits = Limits(
        max_num_requests=2,
        max_mixed_prompt_tokens=2 * BLOCK_SIZE,
        max_waiting_requests=100,
        max_waiting_tokens=10_000,
        prefix_cache=prefix_cache,
    )
    state = State(limits)
    admission.begin_epoch(state, spec(num_blocks=40))
    return state


def run(state: State, *, faulty: bool) -> None:
    """Runs steps until nothing is to be computed; each sampled row is `faulty` or token 5."""
    while (plan := planning.plan(state, 0.0)) is not None:
        num_rows = int(plan.span_samples.sum())
        done = StepDone(
            epoch=1,
            step_id=plan.step_id,
            tokens=np.full(num_rows, 5, np.int32).tobytes(),
            logprobs=(),
            faulty_rows=np.arange(num_rows if faulty else 0, dtype=np.int32).tobytes(),
            compute_s=0.0,
        )
        applying.apply(state, done, 0.0)


def test_blocks_of_a_faulty_request_are_not_found_again() -> None:
    """A prompt's first chunks are cached before a fault shows; the next request must not read
    them, or one bad number in a prefix would fail all that share it.
    """
    state = ready_state()
    assert state.pool is not None
    admission.submit(state, 0, submit(1, [3] * 70, 5), 0.0)
    run(state, faulty=True)
    assert state.pool.num_cached == 0
    admission.submit(state, 0, submit(2, [3] * 70, 5), 0.0)
    run(state, faulty=False)
    assert state.take_outputs()[0].admitted[-1].num_cached_tokens == 0
    assert state.pool.num_cached > 0
    assert state.check() == []


def test_a_beginning_counts_as_completion_and_a_cached_one_not_as_prompt() -> None:
    state = ready_state()
    admission.submit(state, 0, submit(1, [3] * 30 + [5] * 18, 2), 0.0)
    run(state, faulty=False)
    begun = msgspec.structs.replace(submit(2, [3] * 30 + [5] * 18, 20), num_completion_tokens=18)
    admission.submit(state, 0, begun, 0.0)
    (request,) = state.requests.values()
    assert (request.num_prompt, request.max_total) == (30, 50)
    run(state, faulty=False)
    outputs = state.take_outputs()[0]
    assert [admitted.num_cached_tokens for admitted in outputs.admitted] == [0, 30]
    assert [end.num_completion_tokens for end in outputs.finished] == [2, 20]
    assert outputs.num_tokens == 2 + 2


def test_an_idle_night_does_not_make_refused_clients_wait() -> None:
    state = ready_state()
    hour_s = 3600.0
    for stream in range(10):
        admission.submit(state, 0, submit(stream, [3] * 5, 1), stream * hour_s)
        planning.plan(state, stream * hour_s + 0.001)
        admission.abort(state, 0, Abort(stream=stream))
    for stream in range(100, 202):
        admission.submit(state, 0, submit(stream, [3] * 5, 1), 10 * hour_s)
    [refused] = [r for r in state.take_outputs()[0].refused if r.stream == 200]
    assert refused.retry_after_s == admission.MIN_RETRY_S


@pytest.mark.parametrize(
    "message",
    [
        msgspec.structs.replace(submit(1, [3], 5), tokens=b"abc"),
        submit(2**63, [3], 5),
        submit(-1, [3], 5),
        submit(1, [3], 5, -1),
        submit(1, [3], 5, stop_token_ids=(2**31,)),
        submit(1, [3], 5, logit_bias=((97, 1.0),)),
        msgspec.structs.replace(submit(1, [3] * 9, 5), num_completion_tokens=5),
        msgspec.structs.replace(submit(1, [3], 5), num_completion_tokens=1),
        msgspec.structs.replace(submit(1, [3], 5), num_completion_tokens=-1),
    ],
)
def test_a_submit_that_no_array_can_hold_is_refused_and_ends_nobody(message: Submit) -> None:
    state = ready_state()
    admission.submit(state, 0, message, 0.0)
    [refused] = state.take_outputs()[0].refused
    assert (refused.stream, refused.reason) == (message.stream, RefusalReason.INVALID)
    assert state.requests == {}


def test_a_request_that_the_next_worker_cannot_hold_ends_and_the_others_go_on() -> None:
    state = ready_state()
    admission.submit(state, 0, submit(1, [3] * 8, 8), 0.0)
    admission.submit(state, 0, submit(2, [3] * 30, 30), 0.0)
    assert planning.plan(state, 0.0) is not None
    admission.end_epoch(state)
    admission.begin_epoch(state, spec(num_blocks=2))
    outputs = state.take_outputs()[0]
    assert [(end.stream, end.reason) for end in outputs.finished] == [(2, FinishReason.NO_ROOM)]
    assert [request.stream for request in state.waiting] == [1]
    assert state.check() == []


def test_without_a_prefix_cache_nothing_is_hashed() -> None:
    state = ready_state(prefix_cache=False)
    admission.submit(state, 0, submit(1, [3] * 40, 8), 0.0)
    assert planning.plan(state, 0.0) is not None
    (request,) = state.requests.values()
    assert len(request.digests) == 1
