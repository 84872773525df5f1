"""Deadlines: who is past theirs, and who would not be done by it.

A request is held to its deadline three times: when it comes, when it is about to get a slot, and
when the deadline passes, wherever it is then. The first two refuse what could only be computed in
vain, by `forecast.py`; a request that has begun to run is left to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenloom.scheduler.core.blocks import BlockPool
from tokenloom.scheduler.core.forecast import Estimate
from tokenloom.scheduler.core.request import Request
from tokenloom.scheduler.core.state import Slots, State
from tokenloom.scheduler.messages import FinishReason

HARM = 1 / 32
"""Of those that run, and at least one, may be late because of a newcomer: nobody whose deadline is
tight keeps all others out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lateness:
    """A request would be done after its deadline, or others because of it."""

    needed_s: float
    left_s: float
    num_harmed: int

    @property
    def retry_after_s(self) -> float:
        """When there may be time enough: a tenth of those that run will have left."""
        return max(self.needed_s - self.left_s, self.needed_s / 10)

    def __str__(self) -> str:
        if self.needed_s <= self.left_s:
            return f"{self.num_harmed} requests that run would be late with another one beside them"
        return f"about {self.needed_s:.3g} s are needed; the deadline is in {self.left_s:.3g} s"


def expire(state: State, now: float) -> None:
    """Ends all requests whose deadline has passed."""
    for key in state.deadlines.pop_due(now):
        if (request := state.requests.get(key)) is not None:
            state.finish(request, FinishReason.DEADLINE)


def estimate(state: State, slots: Slots, request: Request, num_cached: int) -> Estimate | None:
    """Returns what a request that waits takes from its slot on; `num_cached` of it are found."""
    return state.forecast.estimate(
        num_tokens=_num_prefilling(slots) + len(request.tokens) - num_cached,
        num_running=min(slots.num_slots, state.num_running + len(state.waiting)),
        prompt_token_s=state.costs.prompt_token_s,
    )


def lateness_in_queue(state: State, request: Request, now: float) -> Lateness | None:
    """Returns by how much a request is too late that has just come to the end of the queue."""
    slots, pool = state.slots, state.pool
    if slots is None or pool is None or not _is_held(state, request):
        return None
    waiting = state.waiting
    # Tenants take turns: of each there go about as many ahead of it as of its own.
    line, num_lines = waiting.lines[request.tenant], len(waiting.waiting)
    num_waiting = min(len(waiting), num_lines * len(line.places))
    num_tokens = min(waiting.num_tokens, num_lines * line.num_tokens)
    wait_s = (num_tokens - len(request.tokens)) * (state.costs.prompt_token_s or 0.0)
    has_room = num_waiting <= len(slots.free) and num_tokens // pool.block_size < pool.num_free
    if not has_room:
        wait_s = max(wait_s, state.forecast.queue_s(num_waiting))
    # Whom it would meet once others have left is not known yet.
    return _lateness(state, slots, pool, request, wait_s, may_harm=has_room, now=now)


def lateness_in_slot(
    state: State, slots: Slots, pool: BlockPool, request: Request, now: float
) -> Lateness | None:
    """Returns by how much a request is too late that might get a slot now."""
    if not _is_held(state, request):
        return None
    return _lateness(state, slots, pool, request, 0.0, may_harm=True, now=now)


def _is_held(state: State, request: Request) -> bool:
    """Tells whether a request is refused if it cannot be in time.

    One that finds nobody is not: it is in nobody's way, and what it takes is worth knowing.
    """
    return (
        state.limits.deadline_admission
        and request.deadline_s < np.inf
        and request.planned_s is None
        and (state.num_running > 0 or len(state.waiting) > 1)
    )


def _lateness(
    state: State,
    slots: Slots,
    pool: BlockPool,
    request: Request,
    wait_s: float,
    *,
    may_harm: bool,
    now: float,
) -> Lateness | None:
    forecast = state.forecast
    max_tokens = request.max_total - request.num_prompt
    num_tokens = max(1, forecast.useful_tokens(max_tokens) - request.num_given)
    left_s = request.deadline_s - now

    def late(num_cached: int) -> Lateness | None:
        told = estimate(state, slots, request, num_cached)
        needed_s, num_harmed = wait_s, 0
        if told is not None:
            needed_s += forecast.factor * told.elapsed_s(num_tokens)
            if may_harm:
                num_harmed = _num_harmed(state, slots, forecast.factor * told.token_s, now)
        if needed_s <= left_s and num_harmed <= max(1, HARM * state.num_running):
            return None
        return Lateness(needed_s=needed_s, left_s=left_s, num_harmed=num_harmed)

    # Nearly all are in time even if nothing of them is cached, which needs no look.
    return late(0) and late(pool.block_size * len(request.cached_digests(pool)))


def _num_harmed(state: State, slots: Slots, token_s: float, now: float) -> int:
    """Returns how many that run would be late at this pace, and not if nobody came any more."""
    held = np.flatnonzero((slots.serial != 0) & (slots.deadline_s < np.inf))
    if not len(held):
        return 0
    to_come = np.maximum(1, slots.goal[held] - slots.num_tokens[held])
    allowed_s = (slots.deadline_s[held] - now) / to_come
    least_s = state.forecast.decode.at(state.num_running) or 0.0
    return int(((allowed_s >= least_s) & (allowed_s < token_s)).sum())


def _num_prefilling(slots: Slots) -> int:
    """Returns how many tokens are to be computed for requests that have a slot."""
    todo = slots.num_planned - slots.num_scheduled
    return int(todo[(slots.serial != 0) & (todo > 1)].sum())
