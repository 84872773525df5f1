"""The requests that wait, a line for each tenant, and whose turn it is.

Within a line those that ran already (preempted, or their worker was lost) come first, in order of
arrival; then the others, by priority and arrival.

Between lines it goes by what each tenant was served, as in VTC (Sheng et al., Fairness in Serving
Large Language Models, OSDI 2024): every token that a step computes adds its cost, over the
tenant's weight, to the tenant's virtual counter, and the least counter goes first. A line that
was empty begins no lower than those that waited meanwhile, so idleness saves nothing up:

    served   a ████████████        waits
             b ██████████████      waits
             c ██████──────▶ a     comes back, and is equal to the least of those who wait
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tokenloom.scheduler.core.bucket import TokenBucket
from tokenloom.scheduler.core.request import Request
from tokenloom.scheduler.tenants import Tenant

PRESENCE_S = 10.0
"""A tenant counts as present for so long after its last request came."""

BACKLOG_S = 1.0
"""A line whose first request waits for longer than this does not keep up."""

_Place: TypeAlias = tuple[bool, int, int]
"""Of a request in its line: whether it never ran, its negated priority, its serial."""


@dataclass(slots=True, eq=False, kw_only=True)
class Line:
    """One tenant's waiting requests, and its account."""

    tenant: Tenant
    index: int
    """Its row where tenants are in arrays."""
    bucket: TokenBucket | None
    places: list[_Place] = field(default_factory=list)
    """Sorted."""
    num_tokens: int = 0
    """Of its waiting requests."""
    num_requests: int = 0
    """That wait or run."""
    num_computed: float = 0.0
    """What was computed for it, in prompt tokens; `marks` are what that was some time ago."""
    marks: tuple[float, float] = (0.0, 0.0)
    served: float = 0.0
    """The virtual counter: what was computed for it, in prompt tokens over its weight."""

    def serve(self, cost: float) -> None:
        """Enters what was computed for the tenant, in prompt tokens."""
        self.num_computed += cost
        self.served += cost / self.tenant.weight

    @property
    def recent(self) -> float:
        """What was computed for it of late, over its weight."""
        return (self.num_computed - self.marks[0]) / self.tenant.weight

    @property
    def rank(self) -> tuple[float, int, int]:
        """The least has the turn: who was served least, and of equals who asks for least."""
        return self.served, self.num_requests, self.index


class Queue:
    """Owner of the waiting requests and of the tenants' lines."""

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}
        """By serial."""
        self.num_tokens = 0
        self.num_bytes = 0
        """Both of all that wait."""
        self.lines: dict[str, Line] = {}
        """By tenant; whoever came once stays."""
        self.by_index: list[Line] = []
        self.weights: npt.NDArray[np.float64] = np.empty(0)
        """[num_lines]"""
        self.waiting: dict[int, Line] = {}
        """The lines in which somebody waits, by index."""
        self.num_active = 0
        """Tenants with requests that wait or run."""
        self._last_emptied: Line | None = None
        self._next_mark_s = -math.inf
        self._tenants: Mapping[str, Tenant] = {}
        self._present: OrderedDict[int, float] = OrderedDict()
        """When each tenant's last request came, the latest last."""

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """In no order."""
        return iter(self._requests.values())

    # Tenants

    def set_tenants(self, tenants: Mapping[str, Tenant], now: float) -> None:
        """Takes over weights and limits. Who is not named has weight 1 and no limits."""
        self._tenants = tenants
        for name, line in self.lines.items():
            line.tenant = self._tenant(name)
            line.bucket = TokenBucket.of(line.tenant.tokens_per_minute, now, old=line.bucket)
            self.weights[line.index] = line.tenant.weight

    def line(self, name: str, now: float) -> Line:
        """Returns a tenant's line, a new one at its first request."""
        line = self.lines.get(name)
        if line is None:
            tenant = self._tenant(name)
            bucket = TokenBucket.of(tenant.tokens_per_minute, now, old=None)
            line = Line(tenant=tenant, index=len(self.by_index), bucket=bucket)
            self.lines[name] = line
            self.by_index.append(line)
            self.weights = np.append(self.weights, tenant.weight)
        return line

    def _tenant(self, name: str) -> Tenant:
        return self._tenants.get(name) or Tenant(name=name)

    @property
    def is_divided(self) -> bool:
        """Whether there are several tenants by configuration."""
        return len(self._tenants) > 1

    def present(self, now: float) -> Collection[int]:
        """Returns the lines of the tenants whose requests have come of late, by index."""
        present = self._present
        if now >= self._next_mark_s:
            self._next_mark_s = now + PRESENCE_S / 2
            for line in self.by_index:
                line.marks = line.marks[1], line.num_computed
        while present and now - next(iter(present.values())) > PRESENCE_S:
            present.popitem(last=False)
        return present.keys()

    # Requests

    def arrive(self, request: Request) -> None:
        """Takes a request in that comes for the first time."""
        line = self.line(request.tenant, request.arrived_s)
        self.num_active += line.num_requests == 0
        line.num_requests += 1
        self._present[line.index] = request.arrived_s
        self._present.move_to_end(line.index)
        self.enter(request)

    def depart(self, request: Request) -> None:
        """Forgets a request that neither waits nor runs any more."""
        line = self.lines[request.tenant]
        line.num_requests -= 1
        self.num_active -= line.num_requests == 0

    def enter(self, request: Request) -> None:
        """Takes a request into its tenant's line."""
        line = self.lines[request.tenant]
        if not line.places:
            self._lift(line)
            self.waiting[line.index] = line
        self._requests[request.serial] = request
        self.num_tokens += len(request.tokens)
        self.num_bytes += request.num_bytes
        line.num_tokens += len(request.tokens)
        insort(line.places, _place(request))

    def leave(self, request: Request) -> None:
        """Takes a request out of its tenant's line, wherever in it it stands."""
        del self._requests[request.serial]
        self.num_tokens -= len(request.tokens)
        self.num_bytes -= request.num_bytes
        line = self.lines[request.tenant]
        line.num_tokens -= len(request.tokens)
        del line.places[bisect_left(line.places, _place(request))]
        if not line.places:
            del self.waiting[line.index]
            self._last_emptied = line

    def _lift(self, line: Line) -> None:
        """Brings a line that was empty level with those who waited, or the last who did."""
        others = self.waiting.values()
        last = 0.0 if self._last_emptied is None else self._last_emptied.served
        line.served = max(line.served, min((other.served for other in others), default=last))

    def head(self, line: Line) -> Request:
        """Returns who is first in a line with requests."""
        return self._requests[line.places[0][-1]]

    def is_behind(self, line: Line, now: float) -> bool:
        """Returns whether a line does not keep up with what comes."""
        return bool(line.places) and now - self.head(line).arrived_s > BACKLOG_S

    def check(self) -> list[str]:
        """Returns what is wrong with the queue; empty is right."""
        wrong = []
        for name, line in self.lines.items():
            mine = [request for request in self if request.tenant == name]
            if line.places != sorted(_place(request) for request in mine):
                wrong.append(f"the line of {name!r} is not its requests in their order")
            if line.num_tokens != sum(len(request.tokens) for request in mine):
                wrong.append(f"the line of {name!r} has not {line.num_tokens} tokens")
            if (line.index in self.waiting) != bool(mine):
                wrong.append(f"it is not known whether somebody waits in the line of {name!r}")
        if self.num_tokens != sum(line.num_tokens for line in self.lines.values()):
            wrong.append(f"num_tokens is {self.num_tokens}, not the sum of those that wait")
        if self.num_bytes != sum(request.num_bytes for request in self):
            wrong.append(f"num_bytes is {self.num_bytes}, not the sum of those that wait")
        if self.num_active != sum(line.num_requests > 0 for line in self.lines.values()):
            wrong.append(f"num_active is {self.num_active}, not the tenants with requests")
        return wrong


def _place(request: Request) -> _Place:
    has_run = request.planned_s is not None
    return not has_run, 0 if has_run else -request.priority, request.serial
