"""What a start consists of, phase after phase, in seconds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Phases:
    """Adds up the time of phases that follow each other without a gap.

    A phase that comes again continues; the order is that of their first beginnings.
    """

    def __init__(
        self, first: str, start_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`first` began at `start_s` of the clock."""
        self._clock = clock
        self._now, self._since_s = first, start_s
        self._seconds: dict[str, float] = {first: 0.0}

    def begin(self, phase: str) -> None:
        """Ends the present phase and begins another."""
        now_s = self._clock()
        self._seconds[self._now] += now_s - self._since_s
        self._seconds.setdefault(phase, 0.0)
        self._now, self._since_s = phase, now_s

    def end(self) -> tuple[tuple[str, float], ...]:
        """Ends the present phase and returns all with their seconds."""
        self.begin(self._now)
        return tuple(self._seconds.items())
