"""The core's state: requests that wait, requests that run in slots, steps in flight.

What is touched in each step lies in arrays with a row a slot, so a step costs
a few array operations and not a loop over requests:

    tokens       │ prompt … │ completion … │ being sampled │
                 0          num_prompt     num_tokens      num_planned
    KV positions │ computed or planned …                │
                 0                                      num_scheduled

A slot has something to compute while num_scheduled < num_planned < max_total
or the prompt is not yet in: `num_planned - num_scheduled` tokens, 1 of them in
steady decode. A span that reaches num_planned samples the next token.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokenloom.scheduler.core.accounting import Totals
from tokenloom.scheduler.core.blocks import BlockPool, Int32Array, root_digest
from tokenloom.scheduler.core.costs import StepCosts
from tokenloom.scheduler.core.deadlines import Deadlines
from tokenloom.scheduler.core.forecast import Forecast
from tokenloom.scheduler.core.queue import Line, Queue
from tokenloom.scheduler.core.request import Request
from tokenloom.scheduler.messages import (
    Admitted,
    Finished,
    FinishReason,
    Outputs,
    RefusalReason,
    Refused,
    Submit,
)
from tokenloom.scheduler.tenants import Tenant
from tokenloom.wire.messages import Ready, TokenLogprobs

Int64Array = npt.NDArray[np.int64]

NO_TOKEN = -1
"""Pads rows of stop tokens; no token has this id."""

TELLING_ENDS = {
    FinishReason.LENGTH,
    FinishReason.STOP_TOKEN,
    FinishReason.STOP_STRING,
    FinishReason.DEADLINE,
}
"""Of completions whose length tells something about that of others, if they have one."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of the core that hold in every epoch."""

    max_num_requests: int
    max_mixed_prompt_tokens: int | None
    """Of a step with decoding requests, unless many wait; None: by what steps cost."""
    max_waiting_requests: int
    max_waiting_tokens: int
    max_waiting_bytes: int = 256 * 1024 * 1024
    prefix_cache: bool = True
    deadline_admission: bool = True
    """Whether requests are refused that would not be done by their deadline."""
    tenant_stretch: float = 1.2
    """What those who ask for much may add to the steps of those who ask for little, as a factor
    of these."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a group of workers offers in one epoch."""

    epoch: int
    vocab_size: int
    max_model_tokens: int
    max_step_tokens: int
    block_size: int
    num_blocks: int
    phases: tuple[tuple[str, float], ...] = ()
    """What it took to get ready, in seconds."""
    fingerprint: str = ""
    """Names the weights and how they are computed with."""
    num_ranks: int = 1
    """Workers of the group, each with a GPU."""

    @classmethod
    def of(cls, ready: Ready, *, num_ranks: int = 1) -> ModelSpec:
        """Returns what a group of workers says of itself when it is ready."""
        return cls(
            num_ranks=num_ranks,
            epoch=ready.epoch,
            vocab_size=ready.vocab_size,
            max_model_tokens=ready.max_model_tokens,
            max_step_tokens=ready.max_step_tokens,
            block_size=ready.block_size,
            num_blocks=ready.num_blocks,
            phases=ready.phases,
            fingerprint=ready.fingerprint,
        )

    @property
    def max_request_tokens(self) -> int:
        """Longest prompt + completion: the context, or the whole pool if that is smaller."""
        return min(self.max_model_tokens, self.num_blocks * self.block_size)


@dataclass(frozen=True, slots=True, eq=False)
class StepRecord:
    """What is remembered of a step until its result comes."""

    step_id: int
    slots: Int64Array
    """[num_spans]"""
    tenures: Int64Array
    """[num_spans] whose spans they were: a slot may have changed hands since"""
    lengths: Int64Array
    """[num_spans]"""
    ends: Int64Array
    """[num_spans] positions computed once the step is done"""
    sampled: Int64Array
    """[num_sampled] indices of the spans that sample"""
    num_decoding: int
    """Leading spans that are those of requests in steady decode."""
    num_prompt_tokens: int
    """Of the others."""
    planned_s: float


@dataclass(slots=True)
class FrontOutputs:
    """What has come up for one front since its last Outputs message."""

    refused: list[Refused] = field(default_factory=list)
    admitted: list[Admitted] = field(default_factory=list)
    streams: list[Int64Array] = field(default_factory=list)
    tokens: list[Int32Array] = field(default_factory=list)
    num_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)

    def packed(self) -> Outputs:
        """Returns the message that tells the front all of it."""
        return Outputs(
            refused=tuple(self.refused),
            admitted=tuple(self.admitted),
            streams=b"".join(part.tobytes() for part in self.streams),
            tokens=b"".join(part.tobytes() for part in self.tokens),
            logprobs=tuple(self.logprobs),
            finished=tuple(self.finished),
            preempted=tuple(self.preempted),
        )


class Slots:
    """The rows of the requests that run. All arrays have one row a slot."""

    def __init__(self, num_slots: int, spec: ModelSpec) -> None:
        max_tokens = spec.max_request_tokens
        max_blocks = -(-max_tokens // spec.block_size)
        self.num_slots = num_slots
        self.block_size = spec.block_size
        self.vocab_size = spec.vocab_size
        # Untouched pages of the two large arrays take no memory.
        self.tokens = np.zeros((num_slots, max_tokens), np.int32)
        self.block_table = np.zeros((num_slots, max_blocks), np.int32)
        self.serial = np.zeros(num_slots, np.int64)
        """Of the request in the slot; 0: the slot is free."""
        self.tenure = np.zeros(num_slots, np.int64)
        """Unique for each time that a request holds a slot; 0: the slot is free."""
        self.num_tokens = np.zeros(num_slots, np.int64)
        self.num_planned = np.zeros(num_slots, np.int64)
        self.num_scheduled = np.zeros(num_slots, np.int64)
        self.num_computed = np.zeros(num_slots, np.int64)
        """KV positions that a finished step computed."""
        self.max_total = np.zeros(num_slots, np.int64)
        self.num_blocks = np.zeros(num_slots, np.int64)
        self.num_hashed = np.zeros(num_slots, np.int64)
        """Leading blocks whose digest was registered."""
        self.first_token_s = np.full(num_slots, np.nan)
        self.last_token_s = np.full(num_slots, np.nan)
        self.gpu_s = np.zeros(num_slots)
        self.deadline_s = np.full(num_slots, np.inf)
        self.goal = np.zeros(num_slots, np.int64)
        """Tokens, of prompt and completion, by which the request is taken to be done."""
        self.line = np.zeros(num_slots, np.int64)
        """Index of the tenant's line."""
        self.priority = np.zeros(num_slots, np.int64)
        self.num_charged = np.zeros(num_slots, np.int64)
        """Positions that are in the tenant's account; at most num_scheduled between plans."""
        self.front = np.zeros(num_slots, np.int32)
        self.stream = np.zeros(num_slots, np.int64)
        self.stop_ids = np.full((num_slots, 1), NO_TOKEN, np.int32)
        self.requests: list[Request | None] = [None] * num_slots
        self.free = list(range(num_slots - 1, -1, -1))

    def blocks(self, slot: int) -> list[int]:
        """Returns the block table of a slot."""
        table: list[int] = self.block_table[slot, : self.num_blocks[slot]].tolist()
        return table

    def set_stop_ids(self, slot: int, ids: tuple[int, ...]) -> None:
        """Sets the tokens that end the request of a slot, widening the rows if they are many."""
        width = self.stop_ids.shape[1]
        if len(ids) > width:
            pad = np.full((self.num_slots, len(ids) - width), NO_TOKEN, np.int32)
            self.stop_ids = np.hstack((self.stop_ids, pad))
        self.stop_ids[slot] = NO_TOKEN
        self.stop_ids[slot, : len(ids)] = ids


class State:
    """All that the core knows. `admission`, `planning` and `applying` are its transitions."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.spec: ModelSpec | None = None
        self.slots: Slots | None = None
        self.pool: BlockPool | None = None
        self.waiting = Queue()
        self.requests: dict[tuple[int, int], Request] = {}
        """Every live request by (front, stream)."""
        self.suspects: dict[int, Request] = {}
        """By serial, in order: while there are any, the first of them runs, alone."""
        self.in_flight: deque[StepRecord] = deque()
        self.released: list[int] = []
        """Slots given up since the last step; the next one tells the worker."""
        self.costs = StepCosts()
        self.next_turn = 0
        """The slot from which on those are chosen who decode, where not all may."""
        self.in_burst = False
        """Many waited, and not all that may run has been taken into a step since."""
        self.next_step_id = 1
        self.next_serial = 1
        self.next_tenure = 1
        self.totals = Totals()
        self.is_draining = False
        """Whether an operator wants no new requests any more."""
        self.forecast = Forecast()
        self.deadlines = Deadlines()
        self.last_result_s = -math.inf
        self.outputs: dict[int, FrontOutputs] = {}

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return 0 if self.slots is None else self.slots.num_slots - len(self.slots.free)

    def outputs_of(self, front: int) -> FrontOutputs:
        """Returns what is collected for a front."""
        outputs = self.outputs.get(front)
        if outputs is None:
            outputs = self.outputs[front] = FrontOutputs()
        return outputs

    def take_outputs(self) -> dict[int, FrontOutputs]:
        """Returns what is collected for all fronts and begins anew."""
        outputs, self.outputs = self.outputs, {}
        return outputs

    def new_request(self, front: int, message: Submit, tokens: Int32Array, now: float) -> Request:
        """Enters a request into the queue; the last of its `tokens` may be completion."""
        num_prompt = len(tokens) - message.num_completion_tokens
        request = Request(
            serial=self.next_serial,
            front=front,
            stream=message.stream,
            tenant=message.tenant,
            priority=message.priority,
            tokens=tokens,
            num_prompt=num_prompt,
            num_given=message.num_completion_tokens,
            max_total=num_prompt + message.max_tokens,
            sampling=message.sampling,
            digests=[root_digest(message.salt)],
            arrived_s=now,
            request_id=message.request_id,
            deadline_s=math.inf if message.timeout_s is None else now + message.timeout_s,
        )
        self.next_serial += 1
        self.requests[front, message.stream] = request
        line = self.waiting.line(message.tenant, now)
        if self.waiting.num_active > (line.num_requests > 0):
            self.settle()  # a tenant that comes back begins where the others are
        self.waiting.arrive(request)
        if request.deadline_s < math.inf:
            self.deadlines.compact(self.requests)
            self.deadlines.add(request.deadline_s, (front, message.stream))
        return request

    def vacate(self, request: Request, *, keep_blocks: bool = True) -> None:
        """Takes a running request out of its slot and returns its blocks, to be found or not.

        Steps in flight may still write to those blocks. That is harmless: workers
        run steps in order, so whoever gets a block writes it later, and a block
        that is kept for its content was full before those steps.
        """
        assert self.slots is not None
        assert self.pool is not None
        assert request.slot is not None
        slots, slot = self.slots, request.slot
        blocks = slots.blocks(slot)
        request.kv_block_s += self.pool.meters_s(blocks)
        self.pool.release(blocks, keep=keep_blocks)
        request.gpu_s = float(slots.gpu_s[slot])
        self.totals.num_recomputed_tokens += request.leave_slot(int(slots.num_computed[slot]))
        request.first_token_s = _time(slots.first_token_s[slot])
        request.last_token_s = _time(slots.last_token_s[slot])
        request.tokens = slots.tokens[slot, : slots.num_tokens[slot]].copy()
        request.slot = None
        line = self.waiting.by_index[slots.line[slot]]
        self.charge_decoded(line, int(slots.num_scheduled[slot] - slots.num_charged[slot]))
        slots.serial[slot] = slots.tenure[slot] = 0
        slots.num_blocks[slot] = 0
        slots.requests[slot] = None
        slots.free.append(slot)
        self.released.append(slot)

    def preempt(self, request: Request) -> None:
        """Makes a running request give way; it is recomputed later."""
        request.num_preemptions += 1
        self.totals.num_preemptions += 1
        self.outputs_of(request.front).preempted.append(request.stream)
        self.requeue(request)

    def requeue(self, request: Request) -> None:
        """Moves a running request back to its place in the queue."""
        self.vacate(request)
        request.estimate = None  # it was for a request that is left to run
        self.waiting.enter(request)

    def refuse(
        self, request: Request, reason: RefusalReason, detail: str, retry_after_s: float | None
    ) -> None:
        """Takes a request that has never run out of the queue, and tells its front why."""
        self.waiting.leave(request)
        self.waiting.depart(request)
        del self.requests[request.front, request.stream]
        self.totals.num_refused += 1
        self.outputs_of(request.front).refused.append(
            Refused(
                stream=request.stream, reason=reason, detail=detail, retry_after_s=retry_after_s
            )
        )

    def set_tenants(self, tenants: Mapping[str, Tenant], now: float) -> None:
        """Takes over the tenants' weights and limits; requests that are there already stay."""
        self.settle()
        self.waiting.set_tenants(tenants, now)

    def settle(self) -> None:
        """Enters into the tenants' accounts what was computed for those that decode.

        Prompts are entered as they are planned. Decoding is entered only when somebody asks for
        the accounts: a step that has nobody to choose from pays nothing for them.
        """
        if self.slots is None:
            return
        slots, lines = self.slots, self.waiting.by_index
        due = np.where(slots.serial != 0, slots.num_scheduled - slots.num_charged, 0)
        slots.num_charged += due
        sums = np.bincount(slots.line, due, minlength=len(lines))
        for index in np.flatnonzero(sums).tolist():
            self.charge_decoded(lines[index], int(sums[index]))

    def charge_decoded(self, line: Line, num_tokens: int) -> None:
        """Enters tokens that were computed for completions of a tenant into its account."""
        line.serve(num_tokens * self.costs.completion_weight)
        if line.bucket is not None:
            line.bucket.take(num_tokens)

    def finish(
        self,
        request: Request,
        reason: FinishReason,
        *,
        stop_token_id: int | None = None,
        num_completion_tokens: int | None = None,
    ) -> None:
        """Ends a request wherever it is, returns all it holds and tells its front."""
        if request.slot is None:
            self.waiting.leave(request)
        else:
            # What is not finite may lie in the request's own KV: whoever shared it would fail too.
            self.vacate(request, keep_blocks=reason is not FinishReason.FAULT)
        self.waiting.depart(request)
        del self.requests[request.front, request.stream]
        self.suspects.pop(request.serial, None)
        num_tokens = len(request.tokens) - request.num_prompt
        if num_completion_tokens is None:
            num_completion_tokens = num_tokens
        self._learn(request, reason, num_completion_tokens)
        finished = Finished(
            stream=request.stream,
            reason=reason,
            stop_token_id=stop_token_id,
            num_completion_tokens=num_completion_tokens,
            queue_s=_span(request.arrived_s, request.planned_s),
            prefill_s=_span(request.planned_s, request.first_token_s),
            decode_s=_span(request.first_token_s, request.last_token_s),
            gpu_s=request.gpu_s,
            kv_block_s=max(0.0, request.kv_block_s),
            num_recomputed_tokens=request.num_recomputed,
            num_preemptions=request.num_preemptions,
        )
        self.totals.finish(
            finished,
            tenant=request.tenant,
            num_generated_tokens=num_tokens - request.num_given,
        )
        self.outputs_of(request.front).finished.append(finished)

    def _learn(self, request: Request, reason: FinishReason, num_tokens: int) -> None:
        """Tells the forecast what a request was like that has ended with `num_tokens`."""
        forecast = self.forecast
        if reason in TELLING_ENDS and num_tokens:
            max_tokens = request.max_total - request.num_prompt
            forecast.note_length(max_tokens=max_tokens, num_tokens=num_tokens)
        num_drawn = len(request.tokens) - request.num_prompt - request.num_given
        if request.num_prefilled:
            forecast.note_work(num_prompt_tokens=request.num_prefilled, num_drawn_tokens=num_drawn)
        elapsed_s = _span(request.planned_s, request.last_token_s)
        if request.estimate is not None and elapsed_s is not None and num_drawn:
            forecast.note_error(request.estimate, num_tokens=num_drawn, elapsed_s=elapsed_s)

    def check(self) -> list[str]:
        """Returns what is wrong with the state; empty is right."""
        running = {r.slot: r for r in self.requests.values() if r.slot is not None}
        wrong = self._check_queue(list(running.values()))
        if self.slots is None or self.pool is None:
            if running:
                wrong.append("requests run without a model")
            return wrong
        slots, pool = self.slots, self.pool
        for slot, request in running.items():
            if slots.requests[slot] is not request or slots.serial[slot] != request.serial:
                wrong.append(f"slot {slot} does not hold the request that says so")
            computed, scheduled, known, planned = (
                int(a[slot])
                for a in (
                    slots.num_computed,
                    slots.num_scheduled,
                    slots.num_tokens,
                    slots.num_planned,
                )
            )
            if not computed <= scheduled <= planned or not known <= planned <= request.max_total:
                wrong.append(
                    f"slot {slot}: computed {computed}, scheduled {scheduled}, known {known}, "
                    f"planned {planned}, limit {request.max_total}"
                )
            if not slots.num_charged[slot] <= scheduled:
                wrong.append(f"slot {slot}: {slots.num_charged[slot]} positions are charged")
            if slots.num_blocks[slot] * pool.block_size < scheduled:
                wrong.append(f"slot {slot}: {scheduled} positions lie beyond its blocks")
        if len(running) + len(set(slots.free)) != slots.num_slots:
            wrong.append(f"{len(running)} running and {len(slots.free)} free slots are not all")
        return wrong + pool.check(slots.blocks(slot) for slot in range(slots.num_slots))

    def _check_queue(self, running: list[Request]) -> list[str]:
        """Returns what is wrong with the queue beside those that run."""
        queued = {r.serial for r in self.requests.values() if r.slot is None}
        wrong = self.waiting.check()
        if queued != {request.serial for request in self.waiting}:
            wrong.append("the queue and the requests without a slot differ")
        if self.suspects:
            serials = [request.serial for request in running]
            if serials not in ([], list(self.suspects)[:1]):
                wrong.append(f"{serials} run while {list(self.suspects)} are suspects")
            return wrong
        youngest: dict[tuple[str, int], int] = {}
        for request in running:
            group = request.tenant, request.priority
            youngest[group] = max(youngest.get(group, 0), request.serial)
        for request in self.waiting:
            if request.serial < youngest.get((request.tenant, request.priority), 0):
                wrong.append(f"request {request.serial} waits while one like it, but younger, runs")
        return wrong


def _time(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)


def _span(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else max(0.0, end - begin)
