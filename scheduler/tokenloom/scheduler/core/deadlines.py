"""When callers stop waiting for their requests."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

MIN_COMPACTED = 64
"""Entries below which it does not pay to drop those of requests that have ended."""


class Deadlines:
    """The deadlines of live requests, the earliest first.

    A request that ends leaves its entry behind; half of the entries at most are of such.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int]] = []
        """(deadline_s, front, stream)"""

    @property
    def next_s(self) -> float:
        """The earliest deadline, perhaps of a request that has ended; infinite: there is none."""
        return self._heap[0][0] if self._heap else math.inf

    def add(self, deadline_s: float, key: tuple[int, int]) -> None:
        """Enters the deadline of the request (front, stream)."""
        heapq.heappush(self._heap, (deadline_s, *key))

    def pop_due(self, now: float) -> list[tuple[int, int]]:
        """Returns whose deadline has passed, and forgets them."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            _, front, stream = heapq.heappop(self._heap)
            due.append((front, stream))
        return due

    def compact(self, live: Mapping[tuple[int, int], object]) -> None:
        """Forgets those who are not live, if they are the greater part."""
        if len(self._heap) > max(MIN_COMPACTED, 2 * len(live)):
            self._heap = [entry for entry in self._heap if entry[1:] in live]
            heapq.heapify(self._heap)
