"""A whole scheduler core and a fake worker under virtual time, from one seed.

Everything random comes from the seed: sizes, arrivals, prompts (many share a
prefix), lengths, stops, aborts, faults, the worker's delays, its deaths, and requests that
kill it.
The world checks what design.md promises, and raises Broken with the seed.

    python -m tests.simulation SEED     replays a seed and prints its trace
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from tests.core.processes import sampling
from tokenloom.scheduler.core import admission, applying, crashes, planning, timeliness
from tokenloom.scheduler.core.state import FrontOutputs, Limits, ModelSpec, State
from tokenloom.scheduler.messages import Abort, FinishReason, RefusalReason, Stop, Submit
from tokenloom.scheduler.tenants import Tenant
from tokenloom.wire.messages import Configure, SamplingParams, Step
from tokenloom.worker.fake import FakeConfig, FakeCrash, FakeModel, expected_tokens

EOS = 1
FAULTY = 2
FATAL = 3
MAX_STEPS_IN_FLIGHT = 2
NUM_FRONTS = 2
NO_DURATIONS = (0.0, -1.0, math.inf, math.nan)


class Broken(AssertionError):
    """A promise did not hold in the run of a seed."""


@dataclass(kw_only=True)
class Caller:
    """One client: what it asked for, and what it has seen of the answer."""

    front: int
    stream: int
    prompt: list[int]
    max_tokens: int
    sampling: SamplingParams
    salt: str
    tenant: str
    priority: int
    leaves_after: int | None
    """Tokens after which it aborts; 0: while it waits or right after."""
    stops_after: int | None
    """Tokens after which its front sees a stop string."""
    deadline_s: float | None
    arrived_s: float
    expected: list[int]
    tokens: list[int] = field(default_factory=list)
    admitted: bool = False
    left: bool = False
    deaths: list[bool] = field(default_factory=list)
    """For each death of the worker with a step of it in flight: whether it was alone."""
    end: FinishReason | RefusalReason | None = None


class World:
    """One run. `run()` returns after every request has reached its end."""

    def __init__(self, seed: int, trace: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.trace = trace or (lambda _: None)
        draw = self.random
        block_size = draw.choice([1, 2, 4, 8, 16])
        max_num_requests = draw.choice([1, 2, 3, 8, 16])
        max_request_tokens = draw.randint(12, 60)
        min_blocks = -(-max_request_tokens // block_size)
        self.fake = FakeConfig(
            vocab_size=97,
            num_blocks=draw.choice([min_blocks, min_blocks + 3, 3 * min_blocks, 40 * min_blocks]),
            block_size=block_size,
            max_model_tokens=draw.choice([max_request_tokens, 4 * max_request_tokens]),
            max_step_tokens=max(max_num_requests, draw.choice([1, 5, 16, 64, 512])),
            eos_token_id=EOS,
            eos_period=draw.choice([8, 40]),
            faulty_token_id=FAULTY,
            fatal_token_id=FATAL,
            fatal_index=draw.choice([0, 0, 2]),
        )
        self.limits = Limits(
            max_num_requests=max_num_requests,
            max_mixed_prompt_tokens=draw.choice([None, 1, 4, 512]),
            max_waiting_requests=draw.choice([4, 1000]),
            max_waiting_tokens=draw.choice([100, 100_000]),
            max_waiting_bytes=draw.choice([10_000, 1_000_000]),
            prefix_cache=draw.random() < 0.8,
            deadline_admission=draw.random() < 0.8,
        )
        self.max_request_tokens = max_request_tokens
        self.tenants = [
            Tenant(name=name, weight=draw.choice([0.1, 1.0, 1.0, 7.0]))
            for name in "abc"[: draw.choice([1, 2, 3])]
        ]
        self.state = State(self.limits)
        self.state.set_tenants({tenant.name: tenant for tenant in self.tenants}, 0.0)
        self.worker = FakeModel(self.fake)
        self.epoch = 0
        self.now = 0.0
        self.worker_free_s = 0.0
        self.death_rate = draw.choice([0.0, 0.0, 0.01, 0.1])
        self.fatal_rate = draw.choice([0.0, 0.0, 0.1])
        self.is_dying = False
        """The worker computes a step that kills it."""
        self.callers: dict[tuple[int, int], Caller] = {}
        self.arrival_order: list[tuple[int, int]] = []
        self.admission_order: list[tuple[int, int]] = []
        self.num_steps = 0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.num_events = 0

    # Driving

    def run(self) -> None:
        """Runs to the end and checks that nothing is left over."""
        self._start_worker()
        self._schedule_arrivals()
        max_steps = 200 + 40 * sum(len(c.prompt) + c.max_tokens for c in self.callers.values())
        while self.events:
            self.now, _, event = heapq.heappop(self.events)
            event()
            self._advance()
            if self.num_steps > max_steps:
                self._fail(f"no end after {max_steps} steps: somebody starves")
        for key, caller in self.callers.items():
            if caller.end is None:
                self._fail(f"request {key} never ended")
        self._check()
        state = self.state
        if state.requests or state.waiting or state.num_running:
            self._fail("the core still holds requests")
        if state.pool is not None and state.pool.num_free != self.fake.num_blocks:
            self._fail(f"{state.pool.num_free} of {self.fake.num_blocks} blocks came back")
        self._judge_order()

    def _at(self, delay_s: float, event: Callable[[], None]) -> None:
        self.num_events += 1
        heapq.heappush(self.events, (self.now + delay_s, self.num_events, event))

    def _start_worker(self) -> None:
        """A worker that has loaded becomes ready in a new epoch."""
        self.epoch += 1
        ready = self.worker.configure(
            Configure(
                epoch=self.epoch,
                rank=0,
                world_size=1,
                rendezvous="",
                model="fake",
                dtype="auto",
                quantize="none",
                quantize_lm_head=False,
                int8_threshold=0.0,
                kv_cache="auto",
                max_model_tokens=None,
                max_num_requests=self.limits.max_num_requests,
                max_step_tokens=None,
            )
        )
        self.worker_free_s = self.now
        self.is_dying = False
        admission.begin_epoch(self.state, ModelSpec.of(ready))
        self.trace(f"{self.now:8.3f} epoch {self.epoch}")

    def _schedule_arrivals(self) -> None:
        draw = self.random
        prefixes = [self._tokens(draw.randint(0, 24)) for _ in range(3)]
        when = 0.0
        for stream in range(draw.randint(1, 24)):
            when += draw.choice([0.0, 0.0, 0.01, 0.5]) * draw.random()
            prompt = draw.choice([*prefixes, []]) + self._tokens(draw.randint(1, 12))
            prompt = prompt[: self.max_request_tokens - 2]
            caller = self._caller(stream, prompt, when)
            self.callers[caller.front, caller.stream] = caller
            self._at(when, lambda caller=caller: self._submit(caller))  # type: ignore[misc]
            if caller.deadline_s is not None:
                self._at(caller.deadline_s, lambda: None)  # it wakes the core
            if caller.leaves_after == 0:
                self._at(
                    when + draw.random() * 0.2,
                    lambda caller=caller: self._leave(caller),  # type: ignore[misc]
                )

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(4, self.fake.vocab_size) for _ in range(count)]

    def _caller(self, stream: int, prompt: list[int], arrived_s: float) -> Caller:
        draw = self.random
        room = self.max_request_tokens - len(prompt)
        max_tokens = draw.choice([1, 2, room, draw.randint(1, room)])
        if draw.random() < 0.05:
            max_tokens = self.fake.max_model_tokens  # more than anybody may have
        if draw.random() < 0.05:
            prompt = [*prompt[:-1], FAULTY]
        elif draw.random() < self.fatal_rate:
            prompt = [*prompt[:-1], FATAL]
        stop_ids = draw.choice([(), (EOS,), (EOS, 7, 9)])
        params = sampling(
            seed=draw.randrange(2**64),
            min_tokens=draw.choice([0, 0, min(3, max_tokens)]),
            stop_token_ids=stop_ids,
            num_top_logprobs=draw.choice([None, None, 0, 2]),
        )
        expected = expected_tokens(
            prompt,
            min(max_tokens, self.max_request_tokens),
            seed=params.seed,
            config=self.fake,
            min_tokens=params.min_tokens,
            stop_token_ids=stop_ids,
        )
        return Caller(
            front=draw.randrange(NUM_FRONTS),
            stream=stream,
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=params,
            salt=draw.choice(["", "", "other"]),
            tenant=draw.choice(self.tenants).name,
            priority=draw.choice([0, 0, 0, -1, 5]),
            leaves_after=draw.choice([None] * 6 + [0, 3]),
            stops_after=draw.choice([None] * 8 + [4]),
            deadline_s=draw.choice([None, None, None, arrived_s + 3 * draw.random()]),
            arrived_s=arrived_s,
            expected=expected,
            tokens=self._beginning(expected, stop_ids) if prompt[-1] != FAULTY else [],
        )

    def _beginning(self, expected: list[int], stop_ids: Sequence[int]) -> list[int]:
        """Returns what a caller has from another server: mostly nothing, never all."""
        stops = [index for index, token in enumerate(expected) if token in stop_ids]
        most = stops[0] if stops else len(expected) - 1
        return expected[: self.random.choice([0, 0, 0, self.random.randint(0, most)])]

    def _submit(self, caller: Caller) -> None:
        self.arrival_order.append((caller.front, caller.stream))
        admission.submit(
            self.state,
            caller.front,
            Submit(
                stream=caller.stream,
                tokens=np.array([*caller.prompt, *caller.tokens], np.int32).tobytes(),
                max_tokens=caller.max_tokens,
                sampling=caller.sampling,
                salt=caller.salt,
                num_completion_tokens=len(caller.tokens),
                timeout_s=None if caller.deadline_s is None else caller.deadline_s - self.now,
                tenant=caller.tenant,
                priority=caller.priority,
            ),
            self.now,
        )

    def _leave(self, caller: Caller) -> None:
        caller.left = True
        admission.abort(self.state, caller.front, Abort(stream=caller.stream))
        self._check()

    def _advance(self) -> None:
        timeliness.expire(self.state, self.now)
        if late := [key for key in self.state.requests if self._is_late(self.callers[key])]:
            self._fail(f"requests {late} live on after their deadline")
        while self.state.spec and len(self.state.in_flight) < MAX_STEPS_IN_FLIGHT:
            oldest = min(
                (r for r in self.state.requests.values() if r.slot is not None),
                key=lambda request: request.serial,
                default=None,
            )
            plan = planning.plan(self.state, self.now)
            if oldest is not None and oldest.slot is None and self._no_one_before(oldest.serial):
                self._fail("the oldest running request had to give way")
            if plan is None:
                break
            for slot in plan.span_slots.tolist():
                self._judge_span(slot)
            self.num_steps += 1
            if len(plan.span_slots) and plan.span_lengths.sum() > self.fake.max_step_tokens:
                self._fail(f"step {plan.step_id} is over its token budget")
            self._send(plan.to_wire(self.epoch))
        self._deliver()
        if self.random.random() < 0.2:
            self._check()

    def _no_one_before(self, serial: int) -> bool:
        running = (r.serial for r in self.state.requests.values() if r.slot is not None)
        return min(running, default=serial) >= serial

    def _send(self, step: Step) -> None:
        """The worker computes steps one after the other, each for a while."""
        self.trace(
            f"{self.now:8.3f} step {step.step_id}: "
            f"slots {np.frombuffer(step.span_slots, np.int32).tolist()} "
            f"lengths {np.frombuffer(step.span_lengths, np.int32).tolist()} "
            f"admits {[admit.slot for admit in step.admitted]}"
        )
        if self.is_dying:
            return
        epoch = self.epoch
        try:
            done = self.worker.step(step)
        except FakeCrash:
            self.is_dying = True

            def die() -> None:
                if epoch == self.epoch:
                    self._lose_group()

            self._at(max(self.now, self.worker_free_s) - self.now + 0.1, die)
            return
        begin = max(self.now, self.worker_free_s)
        compute_s = self.random.choice([0.001, 0.01, 0.1])
        self.worker_free_s = begin + compute_s
        # A worker's word need not be true, or even a duration.
        told_s = self.random.choice([compute_s, compute_s, *NO_DURATIONS])
        done = msgspec.structs.replace(done, compute_s=told_s)

        def arrive() -> None:
            if epoch == self.epoch:
                applying.apply(self.state, done, self.now)
                if self.random.random() < self.death_rate:
                    self._lose_group()

        self._at(self.worker_free_s - self.now, arrive)

    def _lose_group(self) -> None:
        """A worker died, for a reason of its own or by what it computed."""
        self.trace(f"{self.now:8.3f} the worker dies")
        self.epoch += 1
        in_step = self._in_flight()
        for caller in in_step:
            caller.deaths.append(len(in_step) == 1)
        crashes.lose_group(self.state)
        self._check()
        self._at(self.random.random(), self._start_worker)

    def _in_flight(self) -> list[Caller]:
        """Returns those whom the worker computes for."""
        slots, callers = self.state.slots, []
        for request in self.state.requests.values():
            tenure = None if slots is None or request.slot is None else slots.tenure[request.slot]
            if any(tenure in record.tenures for record in self.state.in_flight):
                callers.append(self.callers[request.front, request.stream])
        return callers

    # Judging

    def _deliver(self) -> None:
        for front, outputs in self.state.take_outputs().items():
            self._read(front, outputs)

    def _read(self, front: int, outputs: FrontOutputs) -> None:
        for refused in outputs.refused:
            caller = self._living(front, refused.stream)
            self._judge_refusal(caller, refused.reason)
            caller.end = refused.reason
        for admitted in outputs.admitted:
            caller = self._living(front, admitted.stream)
            if caller.admitted:
                self._fail(f"stream {caller.stream} is admitted twice")
            caller.admitted = True
            self.admission_order.append((front, caller.stream))
        rows = list(
            zip(
                np.concatenate([*outputs.streams, np.empty(0, np.int64)]).tolist(),
                np.concatenate([*outputs.tokens, np.empty(0, np.int32)]).tolist(),
                strict=True,
            )
        )
        for stream, token in rows:
            self._read_token(self._living(front, int(stream)), int(token))
        asked = {
            row
            for row, (stream, _) in enumerate(rows)
            if self.callers[front, int(stream)].sampling.num_top_logprobs is not None
        }
        if {entry.row for entry in outputs.logprobs} != asked:
            self._fail("log probabilities went to the wrong rows")
        for finished in outputs.finished:
            caller = self._living(front, finished.stream)
            caller.end = finished.reason
            self.trace(f"{self.now:8.3f} stream {finished.stream} ends: {finished.reason}")
            self._judge_end(caller, finished.stop_token_id, finished.num_completion_tokens)

    def _is_late(self, caller: Caller) -> bool:
        return caller.deadline_s is not None and caller.deadline_s <= self.now

    def _judge_span(self, slot: int) -> None:
        request = self.state.slots.requests[slot] if self.state.slots is not None else None
        if request is None or self._is_late(self.callers[request.front, request.stream]):
            self._fail(f"a step computes for slot {slot}, whose deadline has passed")

    def _judge_order(self) -> None:
        """Requests that nothing distinguishes are admitted in their order of arrival."""
        groups: dict[tuple[int, str, int], tuple[list[int], list[int]]] = {}
        for place, order in enumerate((self.arrival_order, self.admission_order)):
            for key in order:
                caller = self.callers[key]
                if caller.admitted:
                    group = caller.front, caller.tenant, caller.priority
                    groups.setdefault(group, ([], []))[place].append(caller.stream)
        for group, (arrived, admitted) in groups.items():
            if arrived != admitted:
                self._fail(f"requests of {group} were admitted out of their order of arrival")

    def _read_token(self, caller: Caller, token: int) -> None:
        if not caller.admitted:
            self._fail(f"stream {caller.stream} has a token before it is admitted")
        index = len(caller.tokens)
        if index >= len(caller.expected) or caller.expected[index] != token:
            self._fail(f"stream {caller.stream}: token {index} is {token}, not as expected")
        caller.tokens.append(token)
        if caller.leaves_after == len(caller.tokens):
            self._at(0.0, lambda: self._leave(caller))
        if caller.stops_after == len(caller.tokens):
            stop = Stop(stream=caller.stream, num_tokens=len(caller.tokens))
            self._at(0.0, lambda: admission.stop(self.state, caller.front, stop))

    def _judge_refusal(self, caller: Caller, reason: RefusalReason) -> None:
        total = len(caller.prompt) + caller.max_tokens
        fits = total <= min(self.fake.max_model_tokens, self.fake.num_blocks * self.fake.block_size)
        right = {
            RefusalReason.TOO_LONG: not fits,
            RefusalReason.QUEUE_FULL: fits,
            RefusalReason.NOT_READY: self.state.spec is None,
            RefusalReason.DEADLINE_UNREACHABLE: (
                caller.deadline_s is not None
                and not caller.admitted
                and self.limits.deadline_admission
            ),
        }
        if not right.get(reason, False):
            self._fail(f"stream {caller.stream} is refused for {reason}")

    def _judge_end(self, caller: Caller, stop_token_id: int | None, num_tokens: int) -> None:
        tokens, params = caller.tokens, caller.sampling
        stops = [index for index, token in enumerate(tokens) if token in params.stop_token_ids]
        match caller.end:
            case FinishReason.LENGTH:
                right = len(tokens) == caller.max_tokens == num_tokens and not stops
            case FinishReason.STOP_TOKEN:
                right = stops == [len(tokens) - 1] and stop_token_id == tokens[-1]
                right = right and len(tokens) > params.min_tokens and num_tokens == len(tokens)
            case FinishReason.STOP_STRING:
                right = num_tokens == caller.stops_after
            case FinishReason.CANCELLED:
                right = caller.left
            case FinishReason.DEADLINE:
                right = self._is_late(caller)
            case FinishReason.FAULT:
                right = caller.prompt[-1] == FAULTY and not tokens
            case FinishReason.CRASH:
                right = len(caller.deaths) > 2 and caller.deaths[-1]
                right = right and (self.death_rate > 0 or caller.prompt[-1] == FATAL)
            case _:
                right = False
        if not right:
            self._fail(f"stream {caller.stream} ends {caller.end} after {len(tokens)} tokens")

    def _living(self, front: int, stream: int) -> Caller:
        caller = self.callers[front, stream]
        if caller.end is not None:
            self._fail(f"stream {stream} hears something after its end ({caller.end})")
        return caller

    def _check(self) -> None:
        if wrong := self.state.check():
            self._fail("; ".join(wrong))

    def _fail(self, why: str) -> None:
        raise Broken(f"{why}\nreplay with: python -m tests.simulation {self.seed}")
