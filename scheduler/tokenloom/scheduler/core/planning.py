"""`plan`: what the next step computes.

The order of claims on a step's token budget is: one token for every request in
steady decode, then the prompts that are being computed, oldest first, then
new requests from the queue, in its order and never past one that does not fit.
A running request only ever lacks the block for its next token; if the pool has
none, the youngest request gives way. The oldest one therefore always goes on,
and each request becomes the oldest in time: nobody starves. While there are suspects of crashes
(`crashes.py`), they come first, each alone.

How many prompt tokens a step takes is `prompt_budget`. Large steps compute prompts at the
highest rate, and every stream in decode waits for their end:

    nobody decodes       as many as a step holds: there is nobody to hold up
    some decode          few, so that the step lasts a small multiple of one that only decodes,
                         by what steps cost (`costs.py`)
    … and many waited    as many as a step holds, until all that may run has been taken: the last
                         of a burst decide when it ends

(Llama-3.1-8B on an H200: decoding for 100 requests takes 8 ms, 512 prompt tokens beside them
bring that to 19, 8,192 to 220. `python -m tests.simulation.timed` shows what follows.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenloom.scheduler.core import admission, timeliness
from tokenloom.scheduler.core.blocks import BlockPool
from tokenloom.scheduler.core.request import Request
from tokenloom.scheduler.core.state import Int64Array, Slots, State, StepRecord
from tokenloom.scheduler.messages import Admitted
from tokenloom.wire.messages import Admit, Step

RESERVE_DIVISOR = 50
"""At most this part of the pool is kept for the growth of those that run."""

LONG_QUEUE = 8
"""When more requests than this wait, a burst begins: prompts are computed in large steps.

Poisson arrivals at 90 % of saturation leave fewer in the queue; 32 prompts at once, more."""


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One step: its spans, and what changed for the worker since the last one."""

    step_id: int
    released: list[int]
    admitted: list[Admit]
    block_slots: Int64Array
    block_indices: Int64Array
    block_ids: Int64Array
    span_slots: Int64Array
    span_starts: Int64Array
    span_lengths: Int64Array
    span_samples: np.ndarray
    """bool [num_spans]"""

    def to_wire(self, epoch: int) -> Step:
        """Returns the message that tells a worker this step."""
        return Step(
            epoch=epoch,
            step_id=self.step_id,
            released=np.array(self.released, np.int32).tobytes(),
            admitted=tuple(self.admitted),
            block_slots=self.block_slots.astype(np.int32).tobytes(),
            block_indices=self.block_indices.astype(np.int32).tobytes(),
            block_ids=self.block_ids.astype(np.int32).tobytes(),
            span_slots=self.span_slots.astype(np.int32).tobytes(),
            span_starts=self.span_starts.astype(np.int32).tobytes(),
            span_lengths=self.span_lengths.astype(np.int32).tobytes(),
            span_samples=self.span_samples.astype(np.uint8).tobytes(),
        )


class _Changes:
    """Collects what the worker has to be told beside the spans."""

    def __init__(self) -> None:
        self.admitted: list[Admit] = []
        self.block_slots: list[int] = []
        self.block_indices: list[int] = []
        self.block_ids: list[int] = []

    def give(self, slots: Slots, slot: int, blocks: list[int]) -> None:
        """Appends blocks to a slot's table."""
        first = int(slots.num_blocks[slot])
        slots.block_table[slot, first : first + len(blocks)] = blocks
        slots.num_blocks[slot] = first + len(blocks)
        self.block_slots += [slot] * len(blocks)
        self.block_indices += range(first, first + len(blocks))
        self.block_ids += blocks


def plan(state: State, now: float) -> StepPlan | None:
    """Decides the next step and enters it as in flight; None: there is nothing to compute."""
    slots, pool, spec = state.slots, state.pool, state.spec
    if slots is None or pool is None or spec is None:
        return None
    pool.now_s = now
    timeliness.expire(state, now)
    changes = _Changes()
    begin_s = _begin_s(state, now)
    preempted = _grow(state, slots, pool, changes, begin_s)

    todo = slots.num_planned - slots.num_scheduled
    open_slots = _open_slots(state, slots, begin_s)
    decoding = np.flatnonzero(open_slots & (todo == 1))
    state.in_burst |= len(state.waiting) > LONG_QUEUE
    budget = whole = prompt_budget(state, spec.max_step_tokens, num_decoding=len(decoding))

    spans, lengths = [decoding], [np.ones(len(decoding), np.int64)]
    prefilling = np.flatnonzero(open_slots & (todo > 1))
    if len(prefilling) or (state.waiting and not preempted):
        order = prefilling[np.argsort(slots.serial[prefilling])].tolist()
        chunks: list[tuple[int, int]] = []
        for slot in order:
            if budget == 0:
                break
            length = min(int(todo[slot]), budget)
            chunks.append((slot, length))
            budget -= length
        # Right after a preemption the pool is too full for anybody new.
        while budget and state.waiting and slots.free and not preempted:
            admitted = _admit(state, slots, pool, changes, now, begin_s)
            if admitted is None:
                break
            length = min(int(slots.num_planned[admitted] - slots.num_scheduled[admitted]), budget)
            chunks.append((admitted, length))
            budget -= length
        spans.append(np.array([slot for slot, _ in chunks], np.int64))
        lengths.append(np.array([length for _, length in chunks], np.int64))
    if budget:
        state.in_burst = False

    span_slots, span_lengths = np.concatenate(spans), np.concatenate(lengths)
    if not len(span_slots):
        return None
    if not state.in_flight:
        state.totals.begun_s = now
    return _enter(
        state,
        slots,
        changes,
        span_slots,
        span_lengths,
        num_decoding=len(decoding),
        num_prompt_tokens=whole - budget,
        now=now,
    )


def _begin_s(state: State, now: float) -> float:
    """Returns about when a step begins that is sent now.

    To take it for somewhat later costs nothing: what a step draws comes at its end.
    """
    if not state.in_flight or state.deadlines.next_s == math.inf:
        return now
    record = state.in_flight[-1]
    step_s = state.forecast.decode.at(record.num_decoding) or 0.0
    step_s += record.num_prompt_tokens * (state.costs.prompt_token_s or 0.0)
    return max(now, max(record.planned_s, state.last_result_s) + step_s)


def prompt_budget(state: State, max_step_tokens: int, *, num_decoding: int) -> int:
    """Returns how many prompt tokens a step may compute beside `num_decoding` requests."""
    room = max_step_tokens - num_decoding
    if num_decoding == 0 or state.in_burst:
        return room
    if state.limits.max_mixed_prompt_tokens is not None:
        return min(room, state.limits.max_mixed_prompt_tokens)
    return state.costs.prompt_budget(room)


def _open_slots(state: State, slots: Slots, begin_s: float) -> npt.NDArray[np.bool_]:
    """Returns whose requests a step that begins then may compute for.

    A request that reached max_total is only waiting for results in flight, and so is one whose
    deadline passes before that.
    """
    is_open: npt.NDArray[np.bool_] = (slots.serial != 0) & (slots.num_planned < slots.max_total)
    if state.deadlines.next_s <= begin_s:
        is_open &= slots.deadline_s > begin_s
    return is_open


def _grow(state: State, slots: Slots, pool: BlockPool, changes: _Changes, begin_s: float) -> bool:
    """Gives each decoding request the block of its next position; tells if it had to preempt."""
    preempted = False
    while True:
        position = slots.num_scheduled
        lacking = np.flatnonzero(
            _open_slots(state, slots, begin_s) & (position >= slots.num_blocks * pool.block_size)
        )
        if len(lacking) <= pool.num_free:
            break
        youngest = slots.requests[int(np.argmax(slots.serial))]
        assert youngest is not None
        state.preempt(youngest)
        preempted = True
    blocks, indices = pool.allocate(len(lacking)), slots.num_blocks[lacking]
    slots.block_table[lacking, indices] = blocks
    slots.num_blocks[lacking] += 1
    changes.block_slots += lacking.tolist()
    changes.block_indices += indices.tolist()
    changes.block_ids += blocks
    return preempted


def _admit(
    state: State, slots: Slots, pool: BlockPool, changes: _Changes, now: float, begin_s: float
) -> int | None:
    """Moves the next of the queue into a slot with blocks for all its tokens, if they are free."""
    request = _next_in_time(state, slots, pool, now)
    if request is None or request.deadline_s <= begin_s:  # it ends where it waits
        return None
    num_tokens, block_size = len(request.tokens), pool.block_size
    cached = request.cached_digests(pool)
    num_new = -(-num_tokens // block_size) - len(cached)
    reserve = min(state.num_running, pool.num_blocks // RESERVE_DIVISOR)
    if num_new + pool.num_evictable(cached) + reserve > pool.num_free:
        return None

    if request.planned_s is None:
        num_cached = len(cached) * block_size
        request.estimate = timeliness.estimate(state, slots, request, num_cached)
    state.waiting.leave(request)
    slot = slots.free.pop()
    num_computed = len(cached) * block_size
    usual = state.forecast.usual_tokens(request.max_total - request.num_prompt)
    _fill_slot(slots, slot, request, num_computed, goal=request.num_prompt + usual)
    slots.tenure[slot] = state.next_tenure
    state.next_tenure += 1
    # Shared blocks first: allocating may evict what nobody holds.
    shared = pool.share(cached)
    request.kv_block_s -= pool.meters_s(shared)
    changes.give(slots, slot, shared)
    changes.give(slots, slot, pool.allocate(num_new))
    changes.admitted.append(
        Admit(
            slot=slot,
            tokens=request.tokens.tobytes(),
            num_prompt_tokens=request.num_prompt,
            num_computed=num_computed,
            sampling=request.sampling,
        )
    )
    request.num_prefilled += num_tokens - num_computed
    if request.planned_s is None:
        request.planned_s = now
        num_cached = min(num_computed, request.num_prompt)
        state.totals.num_prompt_tokens += request.num_prompt
        state.totals.num_cached_prompt_tokens += num_cached
        state.forecast.note_departure(request.arrived_s, now)
        state.outputs_of(request.front).admitted.append(
            Admitted(stream=request.stream, num_cached_tokens=num_cached)
        )
    return slot


def _next_in_time(state: State, slots: Slots, pool: BlockPool, now: float) -> Request | None:
    """Returns the first of the queue that may be done by its deadline; refuses those before it."""
    while (request := state.next_waiting()) is not None:
        late = timeliness.lateness_in_slot(state, slots, pool, request, now)
        if late is None:
            return request
        admission.refuse_late(state, request, late)
        state.forecast.note_departure(request.arrived_s, now)
    return None


def _fill_slot(slots: Slots, slot: int, request: Request, num_computed: int, *, goal: int) -> None:
    num_tokens = len(request.tokens)
    request.slot = slot
    request.num_found = num_computed
    slots.requests[slot] = request
    slots.serial[slot] = request.serial
    slots.tokens[slot, :num_tokens] = request.tokens
    slots.num_tokens[slot] = num_tokens
    slots.num_planned[slot] = num_tokens
    slots.num_scheduled[slot] = num_computed
    slots.num_computed[slot] = num_computed
    slots.max_total[slot] = request.max_total
    slots.num_blocks[slot] = 0
    slots.num_hashed[slot] = num_computed // slots.block_size
    slots.first_token_s[slot] = np.nan if request.first_token_s is None else request.first_token_s
    slots.last_token_s[slot] = np.nan if request.last_token_s is None else request.last_token_s
    slots.gpu_s[slot] = request.gpu_s
    slots.deadline_s[slot] = request.deadline_s
    slots.goal[slot] = goal
    slots.front[slot] = request.front
    slots.stream[slot] = request.stream
    slots.set_stop_ids(slot, request.sampling.stop_token_ids)


def _enter(
    state: State,
    slots: Slots,
    changes: _Changes,
    span_slots: Int64Array,
    span_lengths: Int64Array,
    *,
    num_decoding: int,
    num_prompt_tokens: int,
    now: float,
) -> StepPlan:
    """Records the step as in flight and moves the slots on."""
    starts = slots.num_scheduled[span_slots]
    ends = starts + span_lengths
    samples = ends == slots.num_planned[span_slots]
    slots.num_scheduled[span_slots] = ends
    slots.num_planned[span_slots[samples]] += 1
    step_id = state.next_step_id
    state.next_step_id += 1
    state.in_flight.append(
        StepRecord(
            step_id=step_id,
            slots=span_slots,
            tenures=slots.tenure[span_slots],
            lengths=span_lengths,
            ends=ends,
            sampled=np.flatnonzero(samples),
            num_decoding=num_decoding,
            num_prompt_tokens=num_prompt_tokens,
            planned_s=now,
        )
    )
    released, state.released = state.released, []
    return StepPlan(
        step_id=step_id,
        released=released,
        admitted=changes.admitted,
        block_slots=np.array(changes.block_slots, np.int64),
        block_indices=np.array(changes.block_indices, np.int64),
        block_ids=np.array(changes.block_ids, np.int64),
        span_slots=span_slots,
        span_starts=starts,
        span_lengths=span_lengths,
        span_samples=samples,
    )
