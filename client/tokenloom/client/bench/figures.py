"""From the records of a run to its figures. Pure.

    sent_s      delta_s[0]      delta_s[1]                    delta_s[2]   end_s
      │── first token ──│─── gap ───│──────────── gap ────────────│──────────│
      │               3 tokens    1 token                      2 tokens      │
      │── end to end ────────────────────────────────────────────────────────│

A gap before a delta of n tokens counts as n inter-token latencies of gap / n: the pace at which
the reader can go on. The tokens that come with the first delta have none. What a reader waits
without seeing anything is the gap itself; the longest of a stream, as a multiple of the
stream's median inter-token latency, is its stall.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter

from tokenloom.client.bench.record import Record


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a latency is distributed, in milliseconds. Percentiles are values that occurred."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Stall:
    """The longest gap of any stream, relative to the stream's own pace."""

    times_median_itl: float
    ms: float


@dataclass(frozen=True, kw_only=True)
class Target:
    """What an answer must keep to be good; None: anything will do."""

    ttft_ms: float | None
    itl_ms: float | None
    """For the mean from the first token to the last."""


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Of the measured requests those that ended well and kept the target."""

    ttft_ms: float | None
    itl_ms: float | None
    num_requests: int
    share: float
    requests_per_s: float
    output_tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class ErrorCount:
    """How many requests ended with a status."""

    code: str
    reason: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one run showed.

    Requests count when they were sent in the measured time, however long they then took; tokens
    count when they came in it. Latencies are those of requests that ended well.
    """

    measured_s: float
    num_requests: int
    num_done: int
    num_failed: int
    num_cut: int
    """Still under way when the run was interrupted."""
    num_short: int
    """Done with another number of tokens than asked for."""
    num_output_tokens: int
    num_input_tokens: int
    """Of prompts whose first output token came in the measured time."""
    output_tokens_per_s: float
    input_tokens_per_s: float
    requests_per_s: float
    """Ended well in the measured time."""
    deltas_per_s: float
    tokens_per_delta: float | None
    ttft_ms: Spread | None
    itl_ms: Spread | None
    gap_ms: Spread | None
    """Between two deltas of a stream."""
    e2e_ms: Spread | None
    late_ms: Spread | None
    """How much later than due a request was sent, by the fault of the load's own processes."""
    longest_stall: Stall | None
    goodput: Goodput | None
    errors: tuple[ErrorCount, ...]
    client_cpu_s: float


def figures(
    records: Sequence[Record],
    *,
    begin_s: float,
    end_s: float | None,
    target: Target | None,
    exact_lengths: bool,
    client_cpu_s: float,
) -> Figures:
    """Returns the figures of the time from `begin_s` to `end_s`, or to the last thing noted."""
    until_s = max(map(_last_s, records), default=begin_s) if end_s is None else end_s
    measured_s = max(0.0, until_s - begin_s)

    def in_time(moment_s: float) -> bool:
        return begin_s <= moment_s <= until_s

    counted = [record for record in records if in_time(record.sent_s)]
    done = [record for record in counted if record.end_s is not None]
    pairs = [list(_gaps(record)) for record in done]
    came = [
        num_tokens
        for record in records
        for delta_s, num_tokens in zip(record.delta_s, record.delta_tokens, strict=True)
        if in_time(delta_s)
    ]
    num_input_tokens = sum(
        record.num_prompt_tokens
        for record in records
        if record.delta_s and in_time(record.delta_s[0])
    )
    num_ended = sum(1 for each in records if each.end_s is not None and in_time(each.end_s))
    return Figures(
        measured_s=measured_s,
        num_requests=len(counted),
        num_done=len(done),
        num_failed=sum(1 for record in counted if record.error is not None),
        num_cut=sum(1 for each in counted if each.error is None and each.end_s is None),
        num_short=sum(1 for record in done if exact_lengths and _is_short(record)),
        num_output_tokens=sum(came),
        num_input_tokens=num_input_tokens,
        output_tokens_per_s=_per_second(sum(came), measured_s),
        input_tokens_per_s=_per_second(num_input_tokens, measured_s),
        requests_per_s=_per_second(num_ended, measured_s),
        deltas_per_s=_per_second(len(came), measured_s),
        tokens_per_delta=sum(came) / len(came) if came else None,
        ttft_ms=spread_ms(_ttft_s(record) for record in done if record.delta_s),
        itl_ms=spread_ms(*_unzipped((gap / n, n) for each in pairs for gap, n in each)),
        gap_ms=spread_ms(gap for each in pairs for gap, _ in each),
        e2e_ms=spread_ms(_last_s(record) - record.sent_s for record in done),
        late_ms=spread_ms(record.sent_s - record.due_s for record in counted),
        longest_stall=max(
            filter(None, map(_stall, pairs)), key=lambda stall: stall.times_median_itl, default=None
        ),
        goodput=_goodput(counted, target, measured_s),
        errors=_count_errors(counted),
        client_cpu_s=client_cpu_s,
    )


def percentile(ordered: Sequence[tuple[float, float]], share: float) -> float:
    """Returns the smallest value that `share` of the weight does not exceed.

    Takes (value, weight) in order of value, of which there must be some; 0 < share <= 1.
    """
    wanted = share * math.fsum(weight for _, weight in ordered)
    for (value, _), so_far in zip(
        ordered, itertools.accumulate(weight for _, weight in ordered), strict=True
    ):
        # A hair of tolerance: 0.9 * 10 must be 9 and not what floating point makes of it.
        if so_far >= wanted * (1 - 1e-12):
            return value
    return ordered[-1][0]


def spread_ms(seconds: Iterable[float], weights: Iterable[float] | None = None) -> Spread | None:
    """Returns the distribution of latencies, each with its weight; None of nothing."""
    pairs = zip(seconds, itertools.repeat(1.0) if weights is None else weights, strict=False)
    ordered = sorted(((1000 * value, weight) for value, weight in pairs), key=itemgetter(0))
    if not ordered:
        return None
    total = math.fsum(value * weight for value, weight in ordered)
    return Spread(
        mean=total / math.fsum(weight for _, weight in ordered),
        p50=percentile(ordered, 0.5),
        p90=percentile(ordered, 0.9),
        p99=percentile(ordered, 0.99),
        max=ordered[-1][0],
    )


def _unzipped(pairs: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    listed = list(pairs)
    return [value for value, _ in listed], [weight for _, weight in listed]


def _gaps(record: Record) -> Iterable[tuple[float, int]]:
    """Yields the seconds before each delta but the first, and the tokens that it had."""
    for (before_s, after_s), num_tokens in zip(
        itertools.pairwise(record.delta_s), record.delta_tokens[1:], strict=True
    ):
        yield after_s - before_s, num_tokens


def _stall(gaps: Sequence[tuple[float, int]]) -> Stall | None:
    if not gaps:
        return None
    median_s = percentile(sorted((gap / n, n) for gap, n in gaps), 0.5)
    longest_s = max(gap for gap, _ in gaps)
    if median_s <= 0:
        return None  # all came at one moment of the clock
    return Stall(times_median_itl=longest_s / median_s, ms=1000 * longest_s)


def _ttft_s(record: Record) -> float:
    return record.delta_s[0] - record.sent_s


def _last_s(record: Record) -> float:
    """When the last was heard of a request."""
    if record.end_s is not None:
        return record.end_s
    return record.delta_s[-1] if record.delta_s else record.sent_s


def _is_short(record: Record) -> bool:
    return record.num_asked_tokens not in (None, sum(record.delta_tokens))


def _goodput(counted: Sequence[Record], target: Target | None, measured_s: float) -> Goodput | None:
    if target is None:
        return None
    good = [record for record in counted if _is_good(record, target)]
    return Goodput(
        ttft_ms=target.ttft_ms,
        itl_ms=target.itl_ms,
        num_requests=len(good),
        share=len(good) / len(counted) if counted else 0.0,
        requests_per_s=_per_second(len(good), measured_s),
        output_tokens_per_s=_per_second(
            sum(sum(record.delta_tokens) for record in good), measured_s
        ),
    )


def _is_good(record: Record, target: Target) -> bool:
    if record.end_s is None or not record.delta_s:
        return False
    num_later = sum(record.delta_tokens[1:])
    mean_itl_s = (record.delta_s[-1] - record.delta_s[0]) / num_later if num_later else 0.0
    return (target.ttft_ms is None or 1000 * _ttft_s(record) <= target.ttft_ms) and (
        target.itl_ms is None or 1000 * mean_itl_s <= target.itl_ms
    )


def _count_errors(records: Iterable[Record]) -> tuple[ErrorCount, ...]:
    counts = Counter(record.error for record in records if record.error is not None)
    return tuple(
        ErrorCount(code=code, reason=reason, count=count)
        for (code, reason), count in counts.most_common()
    )


def _per_second(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
