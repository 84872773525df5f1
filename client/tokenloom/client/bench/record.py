"""What a process notes about each request, and what a way to call a server must offer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

from tokenloom.client.bench.workload import Request


@dataclass(kw_only=True)
class Record:
    """One request as its client saw it. Times are seconds from the start of the run.

    Done: `end_s` is there. Failed: `error` is there. Neither: it was cut off under way.
    """

    index: int
    due_s: float
    sent_s: float
    num_asked_tokens: int | None
    num_prompt_tokens: int = 0
    delta_s: list[float] = field(default_factory=list)
    """When each delta came."""
    delta_tokens: list[int] = field(default_factory=list)
    """How many tokens it had."""
    end_s: float | None = None
    error: tuple[str, str] | None = None
    """The name of the status and the reason that the server gave, perhaps empty."""

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Record:
        """Returns the record whose `vars` went through JSON."""
        error = fields.pop("error")
        return cls(**fields, error=None if error is None else tuple(error))


class Clock:
    """Seconds from a start that all processes of this host share."""

    def __init__(self, start_s: float) -> None:
        self._start_s = start_s

    def now_s(self) -> float:
        """Returns the seconds that have passed; below 0 before the start."""
        return time.monotonic() - self._start_s

    async def sleep_until(self, moment_s: float) -> None:
        """Returns at a moment or after it; an event loop by itself may wake a bit early."""
        while (wait_s := moment_s - self.now_s()) > 0:  # noqa: ASYNC110 - a clock has no events
            await asyncio.sleep(wait_s)


class CallFailed(Exception):
    """A call ended in an error; `code` and `reason` are what the errors are counted by."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


Send: TypeAlias = Callable[[Record, Clock], Awaitable[None]]
"""Sends a request that is ready and notes each delta in the record. Raises CallFailed."""


class Caller(Protocol):
    """A connection to a server. Entering it connects; requests are built before they are due."""

    async def __aenter__(self) -> Self:
        """Connects."""

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends what runs."""

    def prepare(self, request: Request) -> Send:
        """Does all that can be done before the sending."""
