"""What the loss of a group means: who goes on, who is suspected, and whether it was one too many.

A request that breaks its worker would break the next one, too, and with it everybody's. Which one
it is shows only when it runs alone:

    in the steps in flight at 1 crash     goes on with the others
                        … at 2 crashes    a suspect: they run first, in order of arrival, each alone
                                          until it is beyond where it was at the crash
    a crash of a suspect alone            it fails, and the others are not suspected any more

Crashes without a culprit, or with ever new ones, are stopped by `CrashBudget`.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from tokenloom.scheduler.core import admission
from tokenloom.scheduler.core.request import Request
from tokenloom.scheduler.core.state import State
from tokenloom.scheduler.messages import FinishReason

SUSPICIOUS_CRASHES = 2
"""A request that was in the steps of so many is a suspect."""


class CrashBudget:
    """At most so many crashes within a time."""

    def __init__(self, *, max_crashes: int, window_s: float) -> None:
        self.max_crashes = max_crashes
        self.window_s = window_s
        self._times_s: deque[float] = deque()

    def spend(self, now: float) -> bool:
        """Enters a crash; returns whether it is one more than may be."""
        self._times_s.append(now)
        while now - self._times_s[0] > self.window_s:
            self._times_s.popleft()
        return len(self._times_s) > self.max_crashes


def lose_group(state: State) -> None:
    """The group of the epoch has crashed: blames, ends a culprit, and sends the others to wait."""
    accused = _in_flight(state)
    if len(accused) == 1 and accused[0].serial in state.suspects:
        state.finish(accused[0], FinishReason.CRASH)
        _acquit_all(state)
    else:
        for request in accused:
            _blame(state, request)
    admission.end_epoch(state)


def judge(state: State) -> None:
    """After a result: acquits the suspect that ran alone once it is past where it crashed."""
    if not state.suspects or state.slots is None:
        return
    suspect = next(iter(state.suspects.values()))
    slot = suspect.slot
    if slot is not None and state.slots.num_tokens[slot] > suspect.crash_tokens:
        del state.suspects[suspect.serial]
        suspect.num_crashes = 0
        # It waits for its turn like everybody, or for the next suspect to be through.
        state.preempt(suspect)


def _acquit_all(state: State) -> None:
    """Forgets all suspicion: the crashes are explained."""
    state.suspects.clear()
    for request in state.requests.values():
        request.num_crashes = 0


def _in_flight(state: State) -> list[Request]:
    """Returns the requests in the steps in flight, in order of arrival."""
    slots = state.slots
    if slots is None:
        return []
    found = {}
    for record in state.in_flight:
        alive = slots.tenure[record.slots] == record.tenures
        for slot in np.unique(record.slots[alive]).tolist():
            if (request := slots.requests[slot]) is not None:
                found[request.serial] = request
    return [found[serial] for serial in sorted(found)]


def _blame(state: State, request: Request) -> None:
    assert state.slots is not None
    assert request.slot is not None
    request.num_crashes += 1
    request.crash_tokens = max(request.crash_tokens, int(state.slots.num_planned[request.slot]))
    if request.num_crashes >= SUSPICIOUS_CRASHES:
        state.suspects[request.serial] = request
