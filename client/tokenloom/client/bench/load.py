"""When the requests of a run are sent, and where to."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from tokenloom.client.access import PLAIN, Access
from tokenloom.client.bench.workload import Source


@dataclass(frozen=True)
class AtOnce:
    """All requests at the start."""


@dataclass(frozen=True)
class Concurrency:
    """So many requests under way; when one ends the next is sent."""

    num_streams: int


@dataclass(frozen=True)
class Rate:
    """Poisson arrivals, whether or not earlier requests have ended."""

    requests_per_s: float


Load: TypeAlias = AtOnce | Concurrency | Rate


@dataclass(frozen=True, kw_only=True)
class Grpc:
    """A tokenloom server."""

    target: str
    """As gRPC writes it: host:port, unix:/path, dns:///name:port."""
    access: Access = PLAIN


@dataclass(frozen=True, kw_only=True)
class OpenAI:
    """A server with OpenAI's `/completions`."""

    url: str
    """Up to the version: http://host:port/v1."""
    model: str


Endpoint: TypeAlias = Grpc | OpenAI


@dataclass(frozen=True, kw_only=True)
class Run:
    """One load on one server: all that its processes need to know. Times count from the start."""

    endpoint: Endpoint
    source: Source
    load: Load
    num_requests: int | None
    """None: as many as `end_s` leaves time for."""
    warmup_s: float
    """What comes before is left out of the figures."""
    end_s: float | None
    """After it nothing is sent and no token counts; None: until the last answer."""
    num_processes: int
    ignore_eos: bool
    temperature: float
    timeout_s: float | None
    """For each request."""
    arrivals_s: tuple[float, ...] | None
    """When each request is due; None: when the load has room."""

    def num_streams(self, process: int) -> int:
        """Returns how many requests one process keeps under way. Not for Poisson arrivals."""
        match self.load:
            case AtOnce():
                num_streams = self.num_requests
            case Concurrency(num_streams):
                pass
            case Rate():
                num_streams = None
            case _:
                assert_never(self.load)
        if num_streams is None:
            raise ValueError(f"{self.load} has no number of streams")
        return len(range(process, num_streams, self.num_processes))


def poisson_arrivals(
    requests_per_s: float, *, num_requests: int | None, end_s: float | None, seed: int
) -> tuple[float, ...]:
    """Draws times in order, until there are `num_requests` or `end_s` is reached.

    Raises ValueError if both are None.
    """
    if num_requests is None and end_s is None:
        raise ValueError("arrivals need an end: a number of requests or a time")
    draws = random.Random(seed)
    arrivals: list[float] = []
    due_s = draws.expovariate(requests_per_s)
    while (num_requests is None or len(arrivals) < num_requests) and (
        end_s is None or due_s < end_s
    ):
        arrivals.append(due_s)
        due_s += draws.expovariate(requests_per_s)
    return tuple(arrivals)
