"""What operators asked of the core, until they have it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from tokenloom.scheduler.core import admission
from tokenloom.scheduler.core.state import State
from tokenloom.scheduler.messages import (
    Aborted,
    AbortNamed,
    Drain,
    Drained,
    Draining,
    ToFront,
    TraceData,
)
from tokenloom.wire.messages import Trace

log = logging.getLogger(__name__)


class Operators:
    """Answers operators by `send`, which takes the identity of a peer of the fronts' socket."""

    def __init__(self, state: State, send: Callable[[bytes, ToFront], None]) -> None:
        self._state = state
        self._send = send
        self._drainers: set[bytes] = set()
        """Who waits until no request is left."""
        self._profiler: bytes | None = None
        """Who gets what workers record."""

    def greet(self, front: bytes) -> None:
        """Tells a front that comes late what the others have heard."""
        if self._state.is_draining:
            self._send(front, Draining(ends=False))

    def drain(self, identity: bytes, drain: Drain, fronts: Iterable[bytes]) -> None:
        """Takes no more requests, here and in the fronts; `look` tells when none is left.

        Those that are ended are not waited for: clients that do not read could take their time.
        """
        num_left = len(self._state.requests)
        log.info("draining; %d requests are left", num_left)
        self._state.is_draining = True
        for front in fronts:
            self._send(front, Draining(ends=drain.ends))
        if drain.ends:
            self._send(identity, Drained(num_ended=num_left))
        else:
            self._drainers.add(identity)

    def look(self) -> None:
        """Answers those who wait for the last request, if it is gone; for each turn."""
        if self._drainers and not self._state.requests:
            drainers, self._drainers = self._drainers, set()
            for identity in drainers:
                self._send(identity, Drained(num_ended=0))

    def abort(self, identity: bytes, abort: AbortNamed) -> None:
        """Ends a request and tells whether there was one of that name."""
        found = admission.abort_named(self._state, abort.request_id)
        self._send(identity, Aborted(request_id=abort.request_id, was_found=found))

    def profile(self, identity: bytes) -> None:
        """From now on what workers record goes there."""
        self._profiler = identity

    def pass_on(self, rank: int, trace: Trace) -> None:
        """Hands on a piece of what a rank recorded."""
        if self._profiler is not None:
            piece = TraceData(
                number=trace.number,
                rank=rank,
                data=trace.data,
                is_last=trace.is_last,
                error=trace.error,
            )
            self._send(self._profiler, piece)
