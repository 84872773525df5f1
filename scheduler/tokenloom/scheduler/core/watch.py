"""How long a step may take until its group counts as hung, and how long there is none.

A hung collective ends nothing by itself, so the bound follows what steps took lately: steps of
2 ms and of 20 s are both alright, and 20 s after 2 ms are not. The first step of a kind may compile
kernels, so it has several times as long as the others have at least.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TypeAlias

FACTOR = 10.0
"""Of the recent time of steps of a kind: what a longer context or a busy host adds is less."""

FIRST_FACTOR = 6.0
"""Of the least bound: for the first step of a kind."""

LATE_S = 1.0
"""Who looks this much later than it wanted to was stopped itself, and the workers perhaps, too."""

DECAY = 0.9
"""A recent time falls to this part with each step that took less."""

StepKind: TypeAlias = tuple[int, int]


class StepWatch:
    """The bounds of the steps of one epoch; times are the caller's."""

    def __init__(self, floor_s: float) -> None:
        self._floor_s = floor_s
        """No step counts as hung before."""
        self._recent_s: dict[StepKind, float] = {}
        self._in_flight: deque[StepKind] = deque()
        self._begun_s = 0.0
        """When the oldest step in flight was the next to be computed."""

    def sent(self, *, num_spans: int, num_tokens: int, now: float) -> None:
        """Enters a step that is on its way. Its kind are its sizes, to a factor of 2."""
        if not self._in_flight:
            self._begun_s = now
        self._in_flight.append((num_spans.bit_length(), num_tokens.bit_length()))

    def done(self, now: float) -> None:
        """Enters the result of the oldest step."""
        kind = self._in_flight.popleft()
        took_s = now - self._begun_s
        self._recent_s[kind] = max(took_s, DECAY * self._recent_s.get(kind, 0.0))
        self._begun_s = now

    @property
    def due_s(self) -> float:
        """When the oldest step counts as hung; infinite if no step is in flight."""
        if not self._in_flight:
            return math.inf
        recent_s = self._recent_s.get(self._in_flight[0])
        bound_s = FIRST_FACTOR * self._floor_s if recent_s is None else FACTOR * recent_s
        return self._begun_s + max(self._floor_s, bound_s)

    def is_overdue(self, now: float) -> bool:
        """Returns whether the group hangs; a caller that comes too late to tell has to wait again.

        Its results may have come while it was stopped, or the workers were stopped with it.
        """
        late_s = now - self.due_s
        if late_s < 0:
            return False
        if late_s > LATE_S:
            self._begun_s = now
            return False
        return True


class StallWatch:
    """For how long there has been work and no step with it; times are the caller's.

    It is never right, but for the turn in which the work comes.
    """

    def __init__(self) -> None:
        self._since_s: float | None = None

    def look(self, *, stalls: bool, now: float) -> None:
        """Enters what a turn ended with."""
        if not stalls:
            self._since_s = None
        elif self._since_s is None:
            self._since_s = now

    def stalled_s(self, now: float) -> float:
        """Returns the seconds since the first of the turns in a row that ended so; 0: none."""
        return 0.0 if self._since_s is None else now - self._since_s
