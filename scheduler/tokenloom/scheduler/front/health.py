"""What health checks are told.

    readiness   "" and the service's name   the model is there, and the server does not drain
    liveness    "liveness"                  the core answers, and steps follow each other

While a model is loaded, at first or again, a server lives and is not ready.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from grpc_health.v1 import health, health_pb2

from tokenloom.scheduler.messages import Pulse

LIVENESS = "liveness"
"""The service's name that stands for it."""

_NUM_PINGS = 3
"""Within the time after which a core without an answer counts as stuck."""


class Health:
    """Tells what changes and asks the core now and then, while `follow` runs."""

    def __init__(self, services: tuple[str, ...], *, timeout_s: float) -> None:
        """Neither silence of the core nor a stall of its steps may last for `timeout_s`."""
        self.servicer = health.aio.HealthServicer()
        self._services = ("", *services)
        self._timeout_s = timeout_s
        self._has_model = False
        self._drains = False
        self._heard_s: float | None = None
        """When the core said something last; None: it has yet to start."""
        self._stalled_s = 0.0
        self._changed = asyncio.Event()

    def set_model(self, *, is_there: bool) -> None:
        """The core said that the model can be asked from now on, or not any more."""
        self._has_model = is_there
        self._heard_s = time.monotonic()
        self._changed.set()

    def feel(self, pulse: Pulse) -> None:
        """The core answered."""
        self._heard_s = time.monotonic()
        self._stalled_s = pulse.stalled_s
        self._changed.set()

    def drain(self) -> None:
        """From now on the server is not ready, and lives."""
        self._drains = True
        self._changed.set()

    async def follow(self, ping: Callable[[], None]) -> None:
        """Tells each change, until it is cancelled; `ping` asks the core for a pulse."""
        due_s = 0.0
        while True:
            if time.monotonic() >= due_s:
                ping()
                due_s = time.monotonic() + self._timeout_s / _NUM_PINGS
            with suppress(TimeoutError):
                async with asyncio.timeout(due_s - time.monotonic()):
                    await self._changed.wait()
            self._changed.clear()
            await self.tell()

    async def tell(self) -> None:
        """Brings what checks and watches see up to date."""
        for service in self._services:
            await self._set(service, is_serving=self.is_ready)
        await self._set(LIVENESS, is_serving=self._lives())

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._has_model and not self._drains

    def _lives(self) -> bool:
        is_heard = self._heard_s is None or time.monotonic() - self._heard_s < self._timeout_s
        return is_heard and self._stalled_s < self._timeout_s

    async def _set(self, service: str, *, is_serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        await self.servicer.set(service, status.SERVING if is_serving else status.NOT_SERVING)
