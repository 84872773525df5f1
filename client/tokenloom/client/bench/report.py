"""A run's figures for a person and for a program."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

from tokenloom.client.bench.figures import Figures, Goodput, Spread
from tokenloom.client.bench.load import AtOnce, Concurrency, Load, Rate

SCHEMA = "tokenloom-bench-1"
"""Changes when a field of the JSON goes or changes its meaning; new fields may come."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One load and what it showed."""

    load: Load
    interrupted: bool
    figures: Figures

    @property
    def kind(self) -> str:
        """What kind of load it was, as the JSON names it."""
        match self.load:
            case AtOnce():
                return "at_once"
            case Concurrency():
                return "concurrency"
            case Rate():
                return "rate"
            case _:
                assert_never(self.load)

    @property
    def value(self) -> float:
        """How much load it was: requests at once, streams, or requests a second."""
        match self.load:
            case AtOnce():
                return self.figures.num_requests
            case Concurrency(num_streams):
                return num_streams
            case Rate(requests_per_s):
                return requests_per_s
            case _:
                assert_never(self.load)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All points of a command."""

    started_at: str
    """ISO 8601, UTC."""
    api: str
    """grpc or openai."""
    target: str
    model: str
    server_version: str | None
    workload: str
    ignore_eos: bool
    temperature: float
    num_processes: int
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns what `--json` writes."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "points"
        }
        points = [
            {
                "load": {"kind": point.kind, "value": point.value},
                "interrupted": point.interrupted,
                **dataclasses.asdict(point.figures),
            }
            for point in self.points
        ]
        return {"schema": SCHEMA, **fields, "points": points}


def headline(point: Point) -> str:
    """Returns what load a point was, in words."""
    match point.load:
        case AtOnce():
            return f"{point.value:g} requests at once"
        case Concurrency(num_streams):
            return f"{num_streams} streams kept busy"
        case Rate(requests_per_s):
            return f"{requests_per_s:g} requests/s, Poisson"
        case _:
            assert_never(point.load)


def point_lines(point: Point) -> Iterator[str]:
    """Yields the lines that tell a person of one point."""
    seen = point.figures
    yield headline(point) + (" (interrupted)" if point.interrupted else "")
    counts = f"{seen.num_done} of {seen.num_requests} done, {seen.num_failed} failed"
    if seen.num_cut:
        counts += f", {seen.num_cut} cut off"
    if seen.num_short:
        counts += f", {seen.num_short} with another length than asked for"
    yield f"  requests  {counts}; {seen.requests_per_s:.2f}/s in {seen.measured_s:.2f} s"
    each = "" if seen.tokens_per_delta is None else f", {seen.tokens_per_delta:.2f} a delta"
    tokens = f"{seen.num_output_tokens:,} tokens{each}"
    yield f"  output    {seen.output_tokens_per_s:,.1f} tok/s ({tokens})"
    yield f"  input     {seen.input_tokens_per_s:,.1f} tok/s ({seen.num_input_tokens:,} tokens)"
    yield f"  {'ms':<24}" + "".join(f"{name:>11}" for name in ("p50", "p90", "p99", "max", "mean"))
    for name, spread in (
        ("first token", seen.ttft_ms),
        ("inter-token", seen.itl_ms),
        ("between deltas", seen.gap_ms),
        ("end to end", seen.e2e_ms),
        ("sent later than due", seen.late_ms if isinstance(point.load, Rate) else None),
    ):
        if spread is not None:
            yield f"  {name:<24}" + _cells(spread)
    if seen.longest_stall is not None:
        stall = seen.longest_stall
        yield (
            f"  longest stall {stall.ms:,.1f} ms, {stall.times_median_itl:.1f} × its stream's"
            " median inter-token latency"
        )
    if seen.goodput is not None:
        yield f"  goodput   {_goodput_words(seen.goodput)}"
    for error in seen.errors:
        yield f"  error     {error.count} × {error.code} {error.reason}".rstrip()


def summary_lines(points: Sequence[Point]) -> Iterator[str]:
    """Yields a table with a line for each point."""
    names = (
        "load",
        "out tok/s",
        "in tok/s",
        "req/s",
        "failed",
        "TTFT p50",
        "p99",
        "ITL p50",
        "p99",
    )
    has_goodput = any(point.figures.goodput is not None for point in points)
    yield " ".join(f"{name:>10}" for name in (*names, *(("goodput",) if has_goodput else ())))
    for point in points:
        seen = point.figures
        cells = [
            f"{point.value:g}",
            f"{seen.output_tokens_per_s:,.0f}",
            f"{seen.input_tokens_per_s:,.0f}",
            f"{seen.requests_per_s:.2f}",
            f"{seen.num_failed}",
        ]
        for spread in (seen.ttft_ms, seen.itl_ms):
            cells += ["–", "–"] if spread is None else [f"{spread.p50:,.2f}", f"{spread.p99:,.2f}"]
        if seen.goodput is not None:
            cells.append(f"{100 * seen.goodput.share:.1f} %")
        yield " ".join(f"{cell:>10}" for cell in cells)


def _cells(spread: Spread) -> str:
    values = (spread.p50, spread.p90, spread.p99, spread.max, spread.mean)
    return "".join(f"{value:>11,.2f}" for value in values)


def _goodput_words(goodput: Goodput) -> str:
    bounds = [
        f"{name} {limit:g} ms"
        for name, limit in (("TTFT", goodput.ttft_ms), ("mean ITL", goodput.itl_ms))
        if limit is not None
    ]
    return (
        f"{100 * goodput.share:.1f} % of the requests within {' and '.join(bounds)}:"
        f" {goodput.requests_per_s:.2f} requests/s, {goodput.output_tokens_per_s:,.1f} tok/s"
    )
