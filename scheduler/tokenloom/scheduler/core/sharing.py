"""Who gives way to whom: what each tenant holds of the slots and of the block pool.

A tenant's share is the larger of its part of the slots and its part of the blocks, over its
weight: dominant resource fairness (Ghodsi et al., NSDI 2011). While there is room it decides
nothing. Where there is none, a request whose tenant would hold less, with it, than another one
holds gets the room of that one's youngest:

    share   a ███████████████▒   ▒ gives way, for a still holds more than b
            b ████▓              ▓ comes in

The move leaves the claimant below where the other one was, so it is never made back and forth.

The oldest request that runs never gives way. It ends in time, then the next one is the oldest,
and so everybody who runs ends. Who waits and holds less than its share need not wait for that.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from tokenloom.scheduler.core.blocks import BlockPool
from tokenloom.scheduler.core.costs import MIN_PROMPT_TOKENS
from tokenloom.scheduler.core.queue import Queue
from tokenloom.scheduler.core.request import Request
from tokenloom.scheduler.core.state import Int64Array, Slots, State

HEAVY = 2.0
"""Who has so many times as much as another one asks for much."""

MAX_TURNS = 8
"""A request whose tenant asks for much decodes in each so many steps once, whatever that costs."""


class Shares:
    """What tenants hold, by line, at one moment."""

    def __init__(self, queue: Queue, slots: Slots, pool: BlockPool) -> None:
        held = np.flatnonzero(slots.serial)
        lines, num_lines = slots.line[held], len(queue.by_index)
        self._slots, self._pool = slots, pool
        self._weights = queue.weights
        self._num_slots = np.bincount(lines, minlength=num_lines)
        self._num_blocks = np.bincount(lines, slots.num_blocks[held], minlength=num_lines)

    def of(self, line: int, *, slots: int = 0, blocks: int = 0) -> float:
        """Returns the share of a line, if it had so much more."""
        part = max(
            (self._num_slots[line] + slots) / self._slots.num_slots,
            (self._num_blocks[line] + blocks) / self._pool.num_blocks,
        )
        return float(part / self._weights[line])

    def all(self) -> np.ndarray:
        """Returns the share of each line, float64 [num_lines]."""
        slots, pool = self._slots, self._pool
        parts = np.maximum(self._num_slots / slots.num_slots, self._num_blocks / pool.num_blocks)
        return parts / self._weights


def next_to_give_way(
    slots: Slots, shares: Shares, *, taken: Collection[int] = ()
) -> Request | None:
    """Returns who gives way next: the youngest of the lowest priority of the largest share.

    None: nobody runs but the oldest, or this one's slot is `taken`, for it is in the very step.
    """
    running = np.flatnonzero(slots.serial)
    may = slots.serial[running] > slots.serial[running].min(initial=np.iinfo(np.int64).max)
    running = running[may]
    if not len(running):
        return None
    lines = slots.line[running]
    of_slot = shares.all()[lines]
    theirs = running[lines == lines[np.argmax(of_slot)]]
    last = np.lexsort((-slots.serial[theirs], slots.priority[theirs]))[0]
    slot = int(theirs[last])
    return None if slot in taken else slots.requests[slot]


def heavy_lines(queue: Queue, now: float) -> set[int]:
    """Returns the lines of the tenants whose steps others, who ask for little, have to wait for.

    A tenant asks for much if its line does not keep up, or if more than `HEAVY` times as much was
    computed for it of late as for another one whose line does. Where all ask for much, or there
    is but one, nobody has to wait for them: none is returned.
    """
    present = [queue.by_index[index] for index in queue.present(now)]
    if len(present) < 2:
        return set()
    behind = {line.index for line in present if queue.is_behind(line, now)}
    recent = [line.recent for line in present if line.index not in behind]
    if not recent:
        return set()
    most = HEAVY * min(recent)
    return behind | {line.index for line in present if line.recent > most}


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a step may take up of those who ask for much, beside those who ask for little."""

    decoding: Int64Array
    """Slots of all that decode in it."""
    heavy: frozenset[int] = frozenset()
    """Lines of the tenants that ask for much."""
    num_prompt_tokens: int = 0
    """Of theirs, less those of others in the step."""
    is_full: bool = False
    """None of them should be admitted."""


def room_beside_others(state: State, slots: Slots, decoding: Int64Array, now: float) -> Room:
    """Returns which of the `decoding` slots a step takes, and what else may be in it.

    Whoever comes waits for the end of the steps in flight and then for its own. So while a tenant
    is present that asks for little, those that ask for much may make a step `tenant_stretch`
    times as long as it would be without them. Their requests then take turns:

        step n      │ little │ much 1 2 3 │
        step n + 1  │ little │ much 4 5 1 │
                             1            tenant_stretch, times the step without them
    """
    heavy = heavy_lines(state.waiting, now)
    costs = state.costs
    is_heavy = np.isin(slots.line[decoding], list(heavy))
    num_heavy = int(is_heavy.sum())
    alone_s = costs.decoding_s(len(decoding) - num_heavy)
    if not heavy or not alone_s or not costs.prompt_token_s:
        return Room(decoding=decoding)
    left_s = (state.limits.tenant_stretch - 1) * alone_s
    if num_heavy * costs.decode_token_s > left_s:
        num_turns = max(int(left_s / costs.decode_token_s), -(-num_heavy // MAX_TURNS))
        theirs = decoding[is_heavy]
        first = int(np.searchsorted(theirs, state.next_turn))
        chosen = np.roll(theirs, -first)[:num_turns]
        state.next_turn = int(chosen[-1]) + 1
        decoding = np.union1d(decoding[~is_heavy], chosen)
        num_heavy = len(chosen)
    left = costs.prompt_tokens_in(left_s - num_heavy * costs.decode_token_s)
    return Room(
        decoding=decoding,
        heavy=frozenset(heavy),
        num_prompt_tokens=max(left, MIN_PROMPT_TOKENS),
        is_full=left == 0 and num_heavy > 0,
    )
