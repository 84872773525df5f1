"""What a front measures: how its calls went, told once each."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenloom.scheduler import metrics
from tokenloom.scheduler.front.record import Event, Record
from tokenloom.scheduler.metrics import Histogram
from tokenloom.scheduler.sample_files import INTERVAL_S, SampleFile
from tokenloom.scheduler.samples import Sample, distribution, number

OTHER = "OTHER"
"""Stands for a reason that metrics do not know by name."""


class CallCounts:
    """The calls of one front."""

    def __init__(self) -> None:
        self._first_token_times = Histogram(metrics.TIME_TO_FIRST_TOKEN)
        self._whole_times = Histogram(metrics.E2E_REQUEST_LATENCY)
        self._refused: Counter[str] = Counter()
        self._tenant_refused: Counter[tuple[str, str]] = Counter()
        self._tenant_first_token_times: dict[str, Histogram] = {}

    def first_token(self, record: Record) -> None:
        """A call got its first token."""
        waited_s = record.since_begin_s(Event.FIRST_TOKEN)
        if waited_s is None:
            return
        self._first_token_times.observe(waited_s)
        if record.tenant:
            self._of_tenant(record.tenant).observe(waited_s)

    def end(self, record: Record) -> None:
        """A call is over."""
        if record.code == "OK" and record.ended_s is not None:
            self._whole_times.observe(record.ended_s - record.began_s)
        elif record.error_reason and record.since_begin_s(Event.ADMITTED) is None:
            known = record.error_reason in metrics.REFUSALS
            reason = record.error_reason if known else OTHER
            self._refused[reason] += 1
            if record.tenant:
                self._tenant_refused[record.tenant, reason] += 1

    def _of_tenant(self, tenant: str) -> Histogram:
        if tenant not in self._tenant_first_token_times:
            self._tenant_first_token_times[tenant] = Histogram(metrics.TENANT_TIME_TO_FIRST_TOKEN)
        return self._tenant_first_token_times[tenant]

    def samples(self) -> Iterator[Sample]:
        """Yields all that was counted."""
        yield distribution(self._first_token_times)
        yield distribution(self._whole_times)
        for reason, num_refused in self._refused.items():
            yield number(metrics.REQUESTS_REFUSED, num_refused, reason)
        for (tenant, reason), num_refused in self._tenant_refused.items():
            yield number(metrics.TENANT_REQUESTS_REFUSED, num_refused, tenant, reason)
        for tenant, histogram in self._tenant_first_token_times.items():
            yield distribution(histogram, tenant)


class CountsFile:
    """Keeps a front's part of the metrics written while `follow` runs."""

    def __init__(self, folder: Path, counts: CallCounts, is_ready: Callable[[], bool]) -> None:
        self._file = SampleFile(folder, "front")
        self._counts = counts
        self._is_ready = is_ready

    async def follow(self) -> None:
        """Writes now and then, until it is cancelled, and goes on where a dead front ended."""
        self._file.take_over()
        while True:
            self._file.write(self._measured(), time.monotonic())
            await asyncio.sleep(INTERVAL_S)

    def close(self) -> None:
        """Writes for the last time."""
        self._file.close(self._measured(), time.monotonic())

    def _measured(self) -> Iterator[Sample]:
        yield number(metrics.READY, self._is_ready())
        yield from self._counts.samples()
