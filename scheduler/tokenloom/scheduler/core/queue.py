"""The requests that wait, a line for each tenant.

Within a line those that ran already (preempted, or their worker was lost) come first, in order of
arrival; then the others, by priority and arrival.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import TypeAlias

from tokenloom.scheduler.core.request import Request

_Place: TypeAlias = tuple[bool, int, int]
"""Of a request in its line: whether it never ran, its negated priority, its serial."""


class Queue:
    """Owner of the waiting requests."""

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}
        """By serial."""
        self._lines: dict[str, list[_Place]] = {}
        """By tenant, each sorted and none empty."""
        self.num_tokens = 0
        self.num_bytes = 0
        """Both of all that wait."""

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """In no order."""
        return iter(self._requests.values())

    def enter(self, request: Request) -> None:
        """Takes a request into its tenant's line."""
        self._requests[request.serial] = request
        self.num_tokens += len(request.tokens)
        self.num_bytes += request.num_bytes
        insort(self._lines.setdefault(request.tenant, []), _place(request))

    def leave(self, request: Request) -> None:
        """Takes a request out of its line, wherever in it it stands."""
        del self._requests[request.serial]
        self.num_tokens -= len(request.tokens)
        self.num_bytes -= request.num_bytes
        line = self._lines[request.tenant]
        del line[bisect_left(line, _place(request))]
        if not line:
            del self._lines[request.tenant]

    def head(self) -> Request | None:
        """Returns who runs next."""
        first = min((line[0] for line in self._lines.values()), default=None)
        return None if first is None else self._requests[first[-1]]

    def check(self) -> list[str]:
        """Returns what is wrong with the queue; empty is right."""
        wrong = []
        places = sorted(place for line in self._lines.values() for place in line)
        if places != sorted(_place(request) for request in self):
            wrong.append("the lines and the requests that wait differ")
        if any(not line or line != sorted(line) for line in self._lines.values()):
            wrong.append("a line is empty or not in order")
        if self.num_tokens != sum(len(request.tokens) for request in self):
            wrong.append(f"num_tokens is {self.num_tokens}, not the sum of those that wait")
        if self.num_bytes != sum(request.num_bytes for request in self):
            wrong.append(f"num_bytes is {self.num_bytes}, not the sum of those that wait")
        return wrong


def _place(request: Request) -> _Place:
    has_run = request.planned_s is not None
    return not has_run, 0 if has_run else -request.priority, request.serial
