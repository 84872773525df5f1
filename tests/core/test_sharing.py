"""Whose turn it is, who gives way, and what a tenant may not have."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from tests.core.processes import submit
from tokenloom.scheduler.core import admission, applying, planning
from tokenloom.scheduler.core.bucket import TokenBucket
from tokenloom.scheduler.core.sharing import MAX_TURNS
from tokenloom.scheduler.core.state import Limits, ModelSpec, State
from tokenloom.scheduler.messages import Abort, RefusalReason
from tokenloom.scheduler.tenants import Tenant
from tokenloom.wire.messages import StepDone

SPEC = ModelSpec(
    epoch=1,
    vocab_size=97,
    max_model_tokens=1000,
    max_step_tokens=256,
    block_size=16,
    num_blocks=1000,
)


def ready_state(*tenants: Tenant, num_slots: int = 4, queue: int = 100) -> State:
    state = State(
        Limits(
            max_num_requests=num_slots,
            max_mixed_prompt_tokens=None,
            max_waiting_requests=queue,
            max_waiting_tokens=100_000,
        )
    )
    state.set_tenants({tenant.name: tenant for tenant in tenants}, 0.0)
    admission.begin_epoch(state, SPEC)
    return state


def come(
    state: State, tenant: str, stream: int, *, length: int = 10, priority: int = 0, now: float = 0.0
) -> RefusalReason | None:
    """Submits a request; returns why it was refused."""
    message = submit(stream, [3] * length, 500)
    message = msgspec.structs.replace(message, tenant=tenant, priority=priority)
    admission.submit(state, 0, message, now)
    refused = state.outputs_of(0).refused
    return refused.pop().reason if refused else None


def step(state: State, now: float = 0.0, *, row_s: float = 0.0) -> list[int]:
    """Computes a step; returns the streams that were in it."""
    plan = planning.plan(state, now)
    assert plan is not None
    assert state.slots is not None
    streams = sorted(state.slots.stream[plan.span_slots].tolist())
    num_prompt_tokens = int(plan.span_lengths[plan.span_lengths > 1].sum())
    done = StepDone(
        epoch=1,
        step_id=plan.step_id,
        tokens=np.full(int(plan.span_samples.sum()), 5, np.int32).tobytes(),
        logprobs=(),
        faulty_rows=b"",
        compute_s=0.01 + 1e-4 * num_prompt_tokens + row_s * len(streams),
    )
    applying.apply(state, done, now)
    assert state.check() == []
    return streams


def test_who_was_served_least_is_next_and_of_its_requests_the_one_that_matters_most() -> None:
    state = ready_state(num_slots=1)
    for stream, priority in enumerate((0, 0, 5)):
        come(state, "a", stream, priority=priority)
    come(state, "b", 10)
    assert step(state) == [10]  # asks for least
    admission.abort(state, 0, Abort(stream=10))
    come(state, "b", 11)
    assert step(state) == [2]
    admission.abort(state, 0, Abort(stream=2))
    assert step(state) in ([11], [0])


def test_an_idle_tenant_saves_nothing_up() -> None:
    state = ready_state(num_slots=4)
    for stream in range(6):
        come(state, "busy", stream, length=100)
    for _ in range(50):
        step(state)
    come(state, "back", 10)
    lines = state.waiting.lines
    assert lines["back"].served == lines["busy"].served > 100


def test_weights_divide_what_is_served() -> None:
    state = ready_state(Tenant(name="a", weight=4.0), Tenant(name="b"))
    for tenant in ("a", "b"):
        line = state.waiting.line(tenant, 0.0)
        line.serve(100)
    assert state.waiting.lines["a"].served == 25
    assert state.waiting.lines["b"].served == 100


def test_the_youngest_of_the_largest_share_gives_way_and_nobody_back_and_forth() -> None:
    state = ready_state(num_slots=4)
    for stream in range(8):
        come(state, "a", stream)
    assert step(state) == [0, 1, 2, 3]
    come(state, "b", 10)
    come(state, "b", 11)
    come(state, "b", 12)
    seen = [step(state) for _ in range(20)]
    assert seen[0][:2] == [0, 1]
    assert seen[-1] == [0, 1, 10, 11]
    assert state.totals.num_preemptions == 2


def test_the_oldest_that_runs_gives_way_to_nobody() -> None:
    state = ready_state(Tenant(name="a", weight=0.001), Tenant(name="b"), num_slots=1)
    come(state, "a", 0)
    step(state)
    come(state, "b", 10)
    assert [step(state) for _ in range(5)] == [[0]] * 5


def test_requests_of_a_flood_take_turns_beside_those_who_ask_for_little() -> None:
    state = ready_state(num_slots=64)
    come(state, "flood", 0)
    step(state, row_s=0.001)
    step(state, row_s=0.001)
    for stream in range(1, 40):
        come(state, "flood", stream)
    for _ in range(30):
        step(state, row_s=0.001)
    come(state, "little", 100, now=1.5)
    seen = [step(state, 1.5 + 0.01 * i, row_s=0.001) for i in range(4 * MAX_TURNS)]
    assert all(100 in streams for streams in seen)
    assert max(len(streams) for streams in seen[1:]) < 20
    for stream in range(40):
        turns = [i for i, streams in enumerate(seen) if stream in streams]
        assert max(np.diff(turns)) <= MAX_TURNS


def test_a_flood_alone_decodes_in_each_step() -> None:
    state = ready_state(num_slots=64)
    for stream in range(40):
        come(state, "flood", stream)
    step(state)
    step(state)
    assert [len(step(state, row_s=0.001)) for _ in range(20)] == [40] * 20


def test_a_tenant_has_no_more_requests_than_it_may() -> None:
    tenant = Tenant(name="a", max_requests=3, max_waiting_requests=2)
    state = ready_state(tenant, num_slots=1)
    assert [come(state, "a", stream) for stream in range(3)] == [
        None,
        None,
        RefusalReason.TENANT_LIMIT,
    ]
    step(state)
    assert come(state, "a", 3) is None
    assert come(state, "a", 4) is RefusalReason.TENANT_LIMIT
    assert come(state, "b", 5) is None
    admission.abort(state, 0, Abort(stream=0))
    assert come(state, "a", 6) is RefusalReason.TENANT_LIMIT
    state.set_tenants({"a": Tenant(name="a")}, 0.0)
    assert come(state, "a", 7) is None


def test_tokens_a_minute_count_prompts_and_completions_and_come_back_with_time() -> None:
    state = ready_state(Tenant(name="a", tokens_per_minute=60))
    assert come(state, "a", 0, length=50) is None
    for _ in range(31):
        step(state)
    assert come(state, "a", 1) is RefusalReason.TENANT_LIMIT
    line = state.waiting.lines["a"]
    assert line.bucket is not None
    assert line.bucket.level == pytest.approx(60 - 50 - 30)
    assert come(state, "a", 1, now=20.0) is RefusalReason.TENANT_LIMIT
    assert come(state, "a", 1, now=22.0) is None


def test_an_idle_hour_fills_a_bucket_no_further_than_a_minute() -> None:
    bucket = TokenBucket.of(60, 0.0, old=None)
    assert bucket is not None
    bucket.take(100)
    assert bucket.wait_s() == 41
    bucket.refill(3600.0)
    assert bucket.level == 60


def test_one_tenant_cannot_fill_the_queue() -> None:
    state = ready_state(Tenant(name="a"), Tenant(name="b"), num_slots=1, queue=100)
    refused = [come(state, "a", stream) for stream in range(100)]
    assert refused.count(None) == 50
    assert set(refused[50:]) == {RefusalReason.QUEUE_FULL}
    assert come(state, "b", 1000) is None
