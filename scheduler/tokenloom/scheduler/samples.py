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

from collections.abc import Iterable

import msgspec

from tokenloom.scheduler.metrics import METRICS_BY_NAME, Histogram, Kind, Metric


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
