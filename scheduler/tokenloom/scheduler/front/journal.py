"""Tells of each Generate call once, when it is over: a line in the log, and a span if asked for.

Nothing is told while a stream runs, so that it costs no more than its marks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import grpc.aio

from tokenloom.scheduler.front.counts import CallCounts
from tokenloom.scheduler.front.errors import RequestError, ServerFault, fault_of
from tokenloom.scheduler.front.record import Event, Record, TraceParent

_log = logging.getLogger("tokenloom.requests")


class Traces(Protocol):
    """Where trace spans go."""

    def tell(self, record: Record) -> None:
        """Makes a span of a call that is over, and notes its ids in the record."""

    def close(self) -> None:
        """Sends what is left, and waits for that no longer than a moment."""


class Journal:
    """The calls of one front."""

    def __init__(
        self, traces: Traces | None, counts: CallCounts, *, gpu_hour_price: float | None
    ) -> None:
        self._traces = traces
        self._counts = counts
        self._gpu_hour_price = gpu_hour_price

    @contextmanager
    def entry(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> Iterator[Record]:
        """Yields the record of a call to be filled in, and tells it when the call is over.

        Whatever should not be raised comes out as a RequestError, with its id in the record.
        """
        record = Record(
            parent=TraceParent.of(context.invocation_metadata() or ()),
            gpu_hour_price=self._gpu_hour_price,
        )
        try:
            yield record
        except RequestError as error:
            _note(record, error)
            raise
        except (asyncio.CancelledError, grpc.aio.InternalError):  # the latter: nobody to write to
            is_late = context.time_remaining() == 0.0
            record.code = "DEADLINE_EXCEEDED" if is_late else "CANCELLED"
            raise
        except Exception as error:
            fault = fault_of(error)
            _note(record, fault)
            raise fault from error
        finally:
            self._tell(record)

    def mark(self, record: Record, event: Event) -> None:
        """Notes that something happened to a call, now."""
        record.mark(event)
        if event is Event.FIRST_TOKEN:
            self._counts.first_token(record)

    def close(self) -> None:
        """Sends what has not been sent."""
        if self._traces is not None:
            self._traces.close()

    def _tell(self, record: Record) -> None:
        record.ended_s = time.monotonic()
        self._counts.end(record)
        if record.parent is not None:
            record.trace_id = f"{record.parent.trace_id:032x}"
        if self._traces is not None:
            self._traces.tell(record)
        if _log.isEnabledFor(logging.INFO):
            _log.info("request ended", extra={"fields": record.fields()})


def _note(record: Record, error: RequestError) -> None:
    record.code = error.code.name
    record.error_reason = error.reason
    if isinstance(error, ServerFault):
        record.fault_id = error.fault_id
