"""Single requests and their deadlines: refused, taken, dropped, ended."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from tests.core.processes import CoreProcess, submit
from tokenloom.scheduler.core import admission, applying, planning, timeliness
from tokenloom.scheduler.core.state import FrontOutputs, Limits, ModelSpec, State
from tokenloom.scheduler.messages import Finished, FinishReason, RefusalReason, Submit
from tokenloom.wire.messages import StepDone

STEP_S = 0.01
NUM_BLOCKS = 400
LIMITS = Limits(
    max_num_requests=4,
    max_mixed_prompt_tokens=None,
    max_waiting_requests=100,
    max_waiting_tokens=10_000,
)
SPEC = ModelSpec(
    epoch=1,
    vocab_size=97,
    max_model_tokens=2000,
    max_step_tokens=512,
    block_size=16,
    num_blocks=NUM_BLOCKS,
)


def due(stream: int, timeout_s: float | None, *, num_prompt: int = 8, max_tokens: int) -> Submit:
    """Returns a request with a deadline."""
    message = submit(stream, [3] * num_prompt, max_tokens)
    return msgspec.structs.replace(message, timeout_s=timeout_s)


class Core:
    """A state with a worker whose every step takes as long as the other."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.state = State(limits)
        self.now = 0.0
        self.refused: dict[int, tuple[RefusalReason, float | None]] = {}
        self.finished: dict[int, Finished] = {}
        self.num_tokens: dict[int, int] = {}
        admission.begin_epoch(self.state, SPEC)

    def submit(self, *messages: Submit) -> None:
        for message in messages:
            admission.submit(self.state, 0, message, self.now)
        self._read()

    def step(self) -> list[int]:
        """Runs a step, if there is one; returns whose streams it computed for."""
        plan = planning.plan(self.state, self.now)
        self.now += STEP_S
        if plan is None:
            self._read()
            return []
        assert self.state.slots is not None
        streams: list[int] = self.state.slots.stream[plan.span_slots].tolist()
        done = StepDone(
            epoch=1,
            step_id=plan.step_id,
            tokens=np.full(int(plan.span_samples.sum()), 5, np.int32).tobytes(),
            logprobs=(),
            faulty_rows=b"",
            compute_s=STEP_S,
        )
        applying.apply(self.state, done, self.now)
        self._read()
        return streams

    def run(self) -> None:
        """Runs until nothing is left."""
        while self.state.requests:
            self.step()
        assert self.state.check() == []

    def _read(self) -> None:
        outputs = self.state.take_outputs().get(0, FrontOutputs())
        for refused in outputs.refused:
            self.refused[refused.stream] = refused.reason, refused.retry_after_s
        for streams in outputs.streams:
            for stream in streams.tolist():
                self.num_tokens[stream] = self.num_tokens.get(stream, 0) + 1
        for finished in outputs.finished:
            self.finished[finished.stream] = finished


@pytest.fixture
def core() -> Core:
    return Core()


@pytest.fixture
def busy() -> Core:
    """Returns a core that has learned, and runs a request that takes long."""
    core = Core()
    for stream in range(100, 104):
        core.submit(due(stream, None, max_tokens=100))
        core.run()
    core.submit(due(99, None, max_tokens=1000))
    core.step()
    return core


def test_a_running_request_ends_with_the_step_in_which_its_deadline_passes(core: Core) -> None:
    core.submit(due(1, 20.5 * STEP_S, max_tokens=100), due(2, None, max_tokens=40))
    for _ in range(20):
        assert core.step() == [1, 2]
    core.step()  # planned before the deadline; its end is after
    assert core.step() == [2]
    assert core.finished[1].reason is FinishReason.DEADLINE
    assert core.finished[1].num_completion_tokens == core.num_tokens[1] == 21
    core.run()
    assert core.state.pool is not None
    assert core.state.pool.num_free == NUM_BLOCKS


def test_a_step_that_begins_past_a_deadline_computes_nothing_for_it(core: Core) -> None:
    """While one step is in flight the next is planned, and begins only when that ends."""
    core.submit(due(1, 20.5 * STEP_S, max_tokens=100), due(2, None, max_tokens=100))
    for _ in range(20):
        core.step()
    first, second = planning.plan(core.state, core.now), planning.plan(core.state, core.now)
    assert first is not None
    assert second is not None
    assert (len(first.span_slots), len(second.span_slots)) == (2, 1)


def test_a_request_that_waits_past_its_deadline_ends_though_no_step_can_be_planned(
    core: Core,
) -> None:
    admission.end_epoch(core.state)
    admission.begin_epoch(core.state, SPEC)
    core.submit(due(1, 1.0, max_tokens=5))
    admission.end_epoch(core.state)
    assert core.state.deadlines.next_s == 1.0
    timeliness.expire(core.state, 0.999)
    assert core.state.requests
    timeliness.expire(core.state, 1.0)
    [finished] = core.state.take_outputs()[0].finished
    assert (finished.reason, finished.num_completion_tokens) == (FinishReason.DEADLINE, 0)
    assert core.state.deadlines.next_s == math.inf
    assert core.state.check() == []


def test_what_cannot_be_done_in_time_is_refused_at_once_and_the_rest_is_taken(busy: Core) -> None:
    busy.submit(
        due(1, 50 * STEP_S, max_tokens=100),
        due(2, 200 * STEP_S, max_tokens=100),
        due(3, None, max_tokens=100),
    )
    assert set(busy.refused) == {1}
    reason, retry_after_s = busy.refused[1]
    assert reason is RefusalReason.DEADLINE_UNREACHABLE
    assert retry_after_s == pytest.approx(50 * STEP_S, rel=0.2)  # by so much it is too late
    busy.run()
    assert {busy.finished[stream].reason for stream in (2, 3)} == {FinishReason.LENGTH}


def test_a_core_that_knows_nothing_refuses_nobody(core: Core) -> None:
    core.submit(*(due(stream, 1e-3, max_tokens=1000) for stream in range(3)))
    assert core.refused == {}


def test_a_request_that_finds_nobody_is_never_refused(busy: Core) -> None:
    busy.run()
    busy.submit(due(1, 50 * STEP_S, max_tokens=100))
    assert busy.refused == {}
    busy.run()
    assert busy.finished[1].reason is FinishReason.DEADLINE


def test_a_request_that_the_queue_has_made_hopeless_leaves_it_before_it_runs(busy: Core) -> None:
    blocked = Core()
    blocked.state.forecast, blocked.state.costs = busy.state.forecast, busy.state.costs
    blocked.submit(*(due(stream, None, max_tokens=100 + stream) for stream in range(4)))
    blocked.step()
    blocked.state.forecast.interval_s = 0.0  # nothing tells it how slow the queue is
    blocked.submit(due(9, 150 * STEP_S, max_tokens=100))
    assert blocked.refused == {}
    blocked.run()
    assert blocked.refused[9][0] is RefusalReason.DEADLINE_UNREACHABLE
    assert 9 not in blocked.num_tokens


def test_a_newcomer_that_would_make_others_late_is_refused(busy: Core) -> None:
    """Each brings a prompt that holds up those who run, and they have no time to lose."""
    busy.state.forecast.num_prompt_tokens = 0.4 * busy.state.forecast.num_drawn_tokens
    busy.submit(due(1, 113 * STEP_S, max_tokens=100), due(2, 113 * STEP_S, max_tokens=100))
    assert busy.refused == {}
    busy.step()
    busy.state.costs.prompt_token_s = STEP_S / 8  # as before the two came together
    busy.submit(due(3, 900 * STEP_S, max_tokens=100))
    assert set(busy.refused) == {3}


def test_one_with_no_time_to_lose_does_not_keep_others_out(busy: Core) -> None:
    busy.state.forecast.num_prompt_tokens = 0.4 * busy.state.forecast.num_drawn_tokens
    busy.submit(due(1, 109 * STEP_S, max_tokens=100))
    busy.step()
    busy.submit(due(2, 900 * STEP_S, max_tokens=100))
    assert busy.refused == {}


def test_a_prompt_that_is_cached_is_not_refused_for_the_time_it_would_have_taken(
    busy: Core,
) -> None:
    busy.state.costs.prompt_token_s = STEP_S
    cached = due(1, 100 * STEP_S, num_prompt=200, max_tokens=1)
    busy.submit(cached)
    assert set(busy.refused) == {1}
    busy.state.costs.prompt_token_s = None
    busy.submit(due(2, None, num_prompt=200, max_tokens=1))
    busy.step()
    busy.step()
    busy.state.costs.prompt_token_s = STEP_S
    busy.submit(msgspec.structs.replace(cached, stream=3))
    assert set(busy.refused) == {1}


def test_without_deadline_admission_nobody_is_refused_and_deadlines_hold() -> None:
    core = Core(replace(LIMITS, deadline_admission=False))
    core.submit(due(98, None, max_tokens=100))
    core.run()
    core.submit(due(99, None, max_tokens=300), due(1, 50 * STEP_S, max_tokens=100))
    core.run()
    assert core.refused == {}
    assert core.finished[1].reason is FinishReason.DEADLINE


def test_deadlines_of_requests_that_have_ended_are_forgotten(core: Core) -> None:
    for stream in range(1000):
        core.submit(due(stream, 3600.0, max_tokens=1))
        core.run()
    assert len(core.state.deadlines._heap) <= 65


@pytest.mark.parametrize("timeout_s", [math.nan, math.inf, -math.inf])
def test_a_time_out_that_is_no_number_is_refused(core: Core, timeout_s: float) -> None:
    core.submit(due(1, timeout_s, max_tokens=5))
    assert core.refused[1][0] is RefusalReason.INVALID


def test_requests_with_much_beside_their_tokens_are_bounded_by_their_bytes() -> None:
    core = Core(replace(LIMITS, max_waiting_bytes=100_000))
    biased = submit(1, [3], 5, logit_bias=tuple((token, 1.0) for token in range(96)))
    for stream in range(20):
        core.submit(msgspec.structs.replace(biased, stream=stream))
    num_taken = len(core.state.requests)
    assert 1 < num_taken < 20
    assert {reason for reason, _ in core.refused.values()} == {RefusalReason.QUEUE_FULL}
    assert core.state.check() == []
    core.run()
    assert core.state.waiting.num_bytes == 0


def test_the_core_ends_a_request_that_waits_for_a_worker_when_its_deadline_passes() -> None:
    """Nothing else happens then that could wake it."""
    with CoreProcess() as core:
        worker = core.start_worker()
        front = core.ready_front()
        front.send(due(1, None, max_tokens=1))
        front.until(lambda: 1 in front.finished)
        front.send(due(2, 2.0, max_tokens=4000))
        front.until(lambda: 2 in front.tokens)
        worker.kill()
        front.until(lambda: front.num_lost == 1)
        front.until(lambda: 2 in front.finished)
        assert front.finished[2].reason is FinishReason.DEADLINE
        assert front.inspect().violations == ()
