"""`plan`: what the next step computes.

The order of claims on a step's token budget is: one token for every request in
steady decode, then the prompts that are being computed, oldest first, then
new requests from the queue, in its order and never past one that does not fit.
Of several tenants the one that was served least has the next turn, with both (`queue.py`).
A running request only ever lacks the block for its next token; if the pool has
none, the youngest request gives way, of several tenants that of the one that holds most
(`sharing.py`). The oldest one therefore always goes on, and each request becomes the oldest in
time: nobody starves. While there are suspects of crashes (`crashes.py`), they come first, each
alone.

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

import heapq
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenloom.scheduler.core import admission, timeliness
from tokenloom.scheduler.core.blocks import BlockPool
from tokenloom.scheduler.core.queue import Line
from tokenloom.scheduler.core.request import Request
from tokenloom.scheduler.core.sharing import Room, Shares, next_to_give_way, room_beside_others
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
    growing, preempted = _shrink(state, slots, pool, begin_s)
    is_shared = state.waiting.num_active > 1 or len(state.waiting.present(now)) > 1
    if is_shared:
        state.settle()

    todo = slots.num_planned - slots.num_scheduled
    open_slots = _open_slots(state, slots, begin_s)
    decoding = np.flatnonzero(open_slots & (todo == 1))
    room = Room(decoding=decoding)
    if is_shared:
        room = room_beside_others(state, slots, decoding, now)
        decoding = room.decoding
    state.in_burst |= len(state.waiting) > LONG_QUEUE
    budget = whole = prompt_budget(state, spec.max_step_tokens, num_decoding=len(decoding), now=now)

    spans, lengths = [decoding], [np.ones(len(decoding), np.int64)]
    prefilling = np.flatnonzero(open_slots & (todo > 1))
    if len(prefilling) or state.waiting:
        prompts = _Prompts(
            state,
            slots,
            pool,
            changes,
            num_growing=len(growing),
            room=room,
            now=now,
            begin_s=begin_s,
        )
        budget = prompts.fill(budget, prefilling, preempted)
        if prompts.preempted:
            decoding = decoding[~np.isin(decoding, prompts.preempted)]
            if not (prompts.chunks or len(decoding)):
                # They gave way for somebody who needs still more; whose turn it was not may run.
                return plan(state, now)
        chunks = prompts.chunks
        spans = [decoding, np.array([slot for slot, _ in chunks], np.int64)]
        lengths = [np.ones(len(decoding), np.int64), np.array([n for _, n in chunks], np.int64)]
    if budget:
        state.in_burst = False
    if is_shared:
        growing = growing[np.isin(growing, decoding)]
    _grow(slots, pool, changes, growing)

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
    """Returns when a step that is sent now has begun, somewhat late.

    That costs nothing: what a step draws comes at its end, half a step and more behind this.
    """
    if not state.in_flight or state.deadlines.next_s == math.inf:
        return now
    record = state.in_flight[-1]
    decode_s = state.forecast.decode.at(record.num_decoding) or 0.0
    step_s = decode_s + record.num_prompt_tokens * (state.costs.prompt_token_s or 0.0)
    return max(now, max(record.planned_s, state.last_result_s) + step_s + decode_s / 2)


def prompt_budget(state: State, max_step_tokens: int, *, num_decoding: int, now: float) -> int:
    """Returns how many prompt tokens a step may compute beside `num_decoding` requests."""
    room = max_step_tokens - num_decoding
    if len(state.waiting.present(now)) > 1:
        return state.costs.prompt_budget(room, num_decoding=num_decoding)
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


def _shrink(
    state: State, slots: Slots, pool: BlockPool, begin_s: float
) -> tuple[Int64Array, set[int]]:
    """Preempts until there is a block for each decoding request that needs one.

    Returns their slots, and the lines of those who gave way.
    """
    preempted: set[int] = set()
    while True:
        growing = np.flatnonzero(
            _open_slots(state, slots, begin_s)
            & (slots.num_scheduled >= slots.num_blocks * pool.block_size)
        )
        if len(growing) <= pool.num_free:
            return growing, preempted
        last = next_to_give_way(slots, Shares(state.waiting, slots, pool))
        assert last is not None, "the pool holds any request alone"
        preempted.add(state.waiting.lines[last.tenant].index)
        state.preempt(last)


def _grow(slots: Slots, pool: BlockPool, changes: _Changes, growing: Int64Array) -> None:
    """Gives each of these slots the block of its next position."""
    blocks, indices = pool.allocate(len(growing)), slots.num_blocks[growing]
    slots.block_table[growing, indices] = blocks
    slots.num_blocks[growing] += 1
    changes.block_slots += growing.tolist()
    changes.block_indices += indices.tolist()
    changes.block_ids += blocks


class _Prompts:
    """Fills a step's budget for prompts: those under way, and those it admits.

    The line whose tenant was served least is always next. It goes on with its own prompts, in
    their order, and then with the first that waits. Where that one has no room, and its tenant
    holds too much already to claim any, it is passed only by tenants that hold less.
    """

    def __init__(
        self,
        state: State,
        slots: Slots,
        pool: BlockPool,
        changes: _Changes,
        *,
        num_growing: int,
        room: Room,
        now: float,
        begin_s: float,
    ) -> None:
        self._state, self._slots, self._pool, self._changes = state, slots, pool, changes
        self._num_growing = num_growing
        self._now = now
        self._begin_s = begin_s
        self._room = room
        self._is_shared = state.waiting.num_active > 1
        self._least_blocked = math.inf
        """The least share of the tenants that lack room."""
        self._blocked: set[int] = set()
        """Lines from which nobody is admitted in this step."""
        self.chunks: list[tuple[int, int]] = []
        """Slot and number of tokens."""
        self.preempted: list[int] = []
        """Slots whose requests gave way."""

    def fill(self, budget: int, prefilling: Int64Array, blocked: set[int]) -> int:
        """Returns what is left of the budget. From the `blocked` lines nobody is admitted."""
        queue = self._state.waiting
        if self._room.is_full:
            self._blocked |= self._room.heavy
        for index in blocked:
            self._block(index)
        heavy_budget = self._room.num_prompt_tokens
        under_way = self._under_way(prefilling)
        turns = [queue.by_index[index].rank for index in under_way.keys() | queue.waiting.keys()]
        heapq.heapify(turns)
        while budget and turns:
            line = queue.by_index[turns[0][-1]]
            is_heavy = line.index in self._room.heavy
            if is_heavy and heavy_budget == 0:
                heapq.heappop(turns)
                continue
            slot = self._next_under_way(under_way.get(line.index))
            if slot is None:
                slot = self._next_waiting(line)
            if slot is None:
                heapq.heappop(turns)
                continue
            todo = int(self._slots.num_planned[slot] - self._slots.num_scheduled[slot])
            length = min(todo, budget, heavy_budget) if is_heavy else min(todo, budget)
            self.chunks.append((slot, length))
            budget -= length
            heavy_budget = max(0, heavy_budget - length)
            line.serve(length)
            self._slots.num_charged[slot] += length
            heapq.heapreplace(turns, line.rank)
        return budget

    def _under_way(self, prefilling: Int64Array) -> dict[int, list[Request]]:
        """Returns the requests whose prompts are being computed by line, the next one last."""
        slots, found = self._slots, dict[int, list[Request]]()
        if len(prefilling):
            order = np.lexsort((-slots.serial[prefilling], slots.priority[prefilling]))
            for slot in prefilling[order].tolist():
                request = slots.requests[slot]
                assert request is not None
                found.setdefault(int(slots.line[slot]), []).append(request)
        return found

    @staticmethod
    def _next_under_way(requests: list[Request] | None) -> int | None:
        while requests:
            request = requests.pop()
            if request.slot is not None:  # else it gave way in this very plan
                return request.slot
        return None

    def _next_waiting(self, line: Line) -> int | None:
        """Admits the next of a line; None: nobody waits, or there is no room."""
        state, slots = self._state, self._slots
        if line.index in self._blocked or not line.places:
            return None
        if not (slots.free or self._is_shared):
            return None
        request = self._first_in_time(line)
        if request is None or request.deadline_s <= self._begin_s:  # it ends where it waits
            return None
        if not self._has_room(line, request):
            self._block(line.index)
            return None
        return _admit(state, slots, self._pool, self._changes, request, self._now)

    def _first_in_time(self, line: Line) -> Request | None:
        """Returns the first of a line that may be done by its deadline; refuses those before it.

        While there are suspects, it is the first of these, where it is alone.
        """
        state = self._state
        if state.suspects:
            suspect = next(iter(state.suspects.values()))
            is_alone = not (state.num_running or state.in_flight)
            return suspect if is_alone and suspect.tenant == line.tenant.name else None
        while line.places:
            request = state.waiting.head(line)
            late = timeliness.lateness_in_slot(state, self._slots, self._pool, request, self._now)
            if late is None:
                return request
            admission.refuse_late(state, request, late)
            state.forecast.note_departure(request.arrived_s, self._now)
        return None

    def _has_room(self, line: Line, request: Request) -> bool:
        """Returns whether there are a slot and blocks for a request, or others have given way."""
        slots, pool = self._slots, self._pool
        num_blocks = -(-len(request.tokens) // pool.block_size)
        while True:
            fits = bool(slots.free) and _num_taken(pool, request) <= self._num_spare
            if fits and self._least_blocked == math.inf:
                return True
            if not self._is_shared:
                return False
            shares = Shares(self._state.waiting, slots, pool)
            claim = shares.of(line.index, slots=1, blocks=num_blocks)
            if claim >= self._least_blocked or fits:
                return claim < self._least_blocked
            last = next_to_give_way(slots, shares, taken=[slot for slot, _ in self.chunks])
            if last is None or not self._may_claim(line, claim, shares, last):
                return False
            self._preempt(last)

    def _may_claim(self, line: Line, claim: float, shares: Shares, last: Request) -> bool:
        """Returns whether a line may have the room of a request: of who holds more than it would.

        Nor may it have been served more, but for what a step computes, unless the other one is
        held back for its sake.
        """
        assert self._state.spec is not None
        holder = self._state.waiting.lines[last.tenant]
        lead = self._state.spec.max_step_tokens / line.tenant.weight
        heavy = self._room.heavy
        is_due = line.served < holder.served + lead
        is_due |= holder.index in heavy and line.index not in heavy
        return is_due and claim < shares.of(holder.index)

    @property
    def _num_spare(self) -> int:
        """Blocks that may go to somebody new."""
        reserve = min(self._state.num_running, self._pool.num_blocks // RESERVE_DIVISOR)
        return self._pool.num_free - self._num_growing - reserve

    def _preempt(self, request: Request) -> None:
        assert request.slot is not None
        # By what it held so far, or the claimant would not pass it any more.
        self._block(int(self._slots.line[request.slot]))
        self.preempted.append(request.slot)
        self._state.preempt(request)

    def _block(self, line: int) -> None:
        """Admits nobody of a line any more; those with a larger share do not pass it."""
        self._blocked.add(line)
        if self._is_shared:
            shares = Shares(self._state.waiting, self._slots, self._pool)
            self._least_blocked = min(self._least_blocked, shares.of(line))


def _num_taken(pool: BlockPool, request: Request) -> int:
    """Returns how many free blocks a request takes; evictable ones that it shares are of these."""
    cached = request.cached_digests(pool)
    return -(-len(request.tokens) // pool.block_size) - len(cached) + pool.num_evictable(cached)


def _admit(
    state: State, slots: Slots, pool: BlockPool, changes: _Changes, request: Request, now: float
) -> int:
    """Moves a request of the queue into a free slot, with blocks for all its tokens."""
    num_tokens, block_size = len(request.tokens), pool.block_size
    cached = request.cached_digests(pool)
    num_new = -(-num_tokens // block_size) - len(cached)
    num_computed = len(cached) * block_size
    if request.planned_s is None:
        request.estimate = timeliness.estimate(state, slots, request, num_computed)
    state.waiting.leave(request)
    slot = slots.free.pop()
    usual = state.forecast.usual_tokens(request.max_total - request.num_prompt)
    _fill_slot(slots, slot, request, num_computed, goal=request.num_prompt + usual)
    slots.line[slot] = state.waiting.lines[request.tenant].index
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
    slots.num_charged[slot] = num_computed
    slots.priority[slot] = request.priority
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
