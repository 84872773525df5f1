"""How the processes of a server tell what they measured.

    core ──────┐  a file each, in run_dir/metrics   ┌──────────┐
    front ─────┼──────────────────────────────────▶ │ exporter │ ◀── Prometheus
    front ─────┘    written twice a second          └──────────┘

A process counts in plain numbers of its own, so that what happens in each step costs next to
nothing, and now and then writes down all of them. The exporter adds up what it finds. A file
outlives its process, and whoever starts in the place of one that died goes on with its file: so
counters never go back.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from tokenloom.scheduler.metrics import METRICS_BY_NAME, Histogram, Kind, Metric

INTERVAL_S = 0.5
"""Between two writings of a process."""
_SUFFIX = ".samples"


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """A metric's value for one set of labels."""

    name: str
    labels: tuple[str, ...]
    value: float
    """Of a histogram the sum of what was observed."""
    counts: tuple[int, ...] = ()
    """Of a histogram how many were observed in each bucket, and in no other."""


class Samples(msgspec.Struct, frozen=True, array_like=True):
    """All that a process has to tell."""

    written_s: float
    """On this host's monotonic clock."""
    samples: tuple[Sample, ...]


def number(metric: Metric, value: float, *labels: str) -> Sample:
    """Returns the sample of a gauge or a counter."""
    return Sample(metric.name, labels, float(value))


def distribution(histogram: Histogram, *labels: str) -> Sample:
    """Returns the sample of a histogram."""
    counts = tuple(histogram.counts.tolist())
    return Sample(histogram.metric.name, labels, histogram.total, counts)


def added(samples: Iterable[Sample]) -> list[Sample]:
    """Returns one sample, their sum, for all of the same metric and labels."""
    sums: dict[tuple[str, tuple[str, ...]], Sample] = {}
    for sample in samples:
        key = (sample.name, sample.labels)
        sums[key] = _sum(sums[key], sample) if key in sums else sample
    return list(sums.values())


def _sum(one: Sample, other: Sample) -> Sample:
    pairs = zip(one.counts, other.counts, strict=True)
    return msgspec.structs.replace(
        one, value=one.value + other.value, counts=tuple(first + second for first, second in pairs)
    )


def is_gauge(sample: Sample) -> bool:
    """Returns whether a sample stops being true when its process is gone."""
    return METRICS_BY_NAME[sample.name].kind is Kind.GAUGE


class SampleFile:
    """Where one process writes, in a folder of all processes of a server."""

    def __init__(self, folder: Path, role: str) -> None:
        """Processes of the same `role` take each other's place."""
        self._folder = folder
        self._role = role
        self._path = folder / f"{role}-{os.getpid()}{_SUFFIX}"
        self._before: list[Sample] = []
        """What the process told whose place this one took."""
        self._due_s = 0.0

    def take_over(self) -> None:
        """Goes on with the file of a process of the same role that died, if there is one."""
        for path in sorted(self._folder.glob(f"{self._role}-*{_SUFFIX}")):
            if _is_alive(int(path.stem.rpartition("-")[-1])):
                continue
            with suppress(FileNotFoundError):  # another one was faster
                path.rename(self._path)
                if (found := _read(self._path)) is not None:
                    self._before = [each for each in found.samples if not is_gauge(each)]
                return

    def is_due(self, now: float) -> bool:
        """Returns whether it is time to write."""
        return now >= self._due_s

    def write(self, samples: Iterable[Sample], now: float) -> None:
        """Replaces the file, whole or not at all."""
        self._due_s = now + INTERVAL_S
        told = Samples(now, tuple(added([*self._before, *samples])))
        draft = self._path.with_suffix(".draft")
        draft.write_bytes(msgspec.msgpack.encode(told))
        draft.replace(self._path)


def read_all(folder: Path) -> Iterator[Samples]:
    """Yields what each process wrote last, also those that are gone."""
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        if (found := _read(path)) is not None:
            yield found


def _read(path: Path) -> Samples | None:
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=Samples)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
