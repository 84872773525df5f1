import random
import statistics

import pytest

from tokenloom.client.bench.figures import (
    ErrorCount,
    Figures,
    Goodput,
    Stall,
    Target,
    figures,
    percentile,
    spread_ms,
)
from tokenloom.client.bench.record import Record


def record(
    *deltas: tuple[float, int],
    sent_s: float = 0.0,
    end_s: float | None = None,
    error: tuple[str, str] | None = None,
    asked: int | None = None,
    due_s: float | None = None,
) -> Record:
    """A request; each delta is (when it came, its tokens)."""
    return Record(
        index=0,
        due_s=sent_s if due_s is None else due_s,
        sent_s=sent_s,
        num_asked_tokens=asked,
        num_prompt_tokens=10,
        delta_s=[moment_s for moment_s, _ in deltas],
        delta_tokens=[num_tokens for _, num_tokens in deltas],
        end_s=end_s,
        error=error,
    )


def figures_of(
    *records: Record,
    begin_s: float = 0.0,
    end_s: float | None = None,
    target: Target | None = None,
) -> Figures:
    return figures(
        records,
        begin_s=begin_s,
        end_s=end_s,
        target=target,
        exact_lengths=True,
        client_cpu_s=0.5,
    )


def test_percentile_is_the_smallest_value_that_enough_do_not_exceed() -> None:
    tens = [(float(value), 1.0) for value in range(1, 11)]
    assert [percentile(tens, share) for share in (0.1, 0.5, 0.9, 0.99, 1.0)] == [1, 5, 9, 10, 10]
    assert percentile([(3.0, 1.0)], 0.5) == 3.0


def test_weight_counts_as_so_many_equal_values() -> None:
    draws = random.Random(5)
    pairs = sorted((draws.random(), draws.randint(1, 5)) for _ in range(200))
    spread_out = [(value, 1.0) for value, weight in pairs for _ in range(weight)]
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        assert percentile(pairs, share) == percentile(spread_out, share)
    weighted = spread_ms([value for value, _ in pairs], [weight for _, weight in pairs])
    assert weighted is not None
    assert weighted.mean == pytest.approx(1000 * statistics.fmean(v for v, _ in spread_out))
    assert spread_ms([]) is None


def test_latencies_of_one_stream() -> None:
    # First 2 tokens after 1 s, 1 token 0.1 s later, 4 tokens 0.8 s after that; ends at 2 s.
    seen = figures_of(record((1.0, 2), (1.1, 1), (1.9, 4), end_s=2.0, asked=7))
    assert seen.ttft_ms is not None
    assert seen.itl_ms is not None
    assert seen.gap_ms is not None
    assert seen.e2e_ms is not None
    assert seen.ttft_ms.p50 == pytest.approx(1000)
    assert seen.e2e_ms.p99 == pytest.approx(2000)
    # 1 gap of 100 ms and 4 of 200 ms.
    assert seen.itl_ms.mean == pytest.approx(180)
    assert (seen.itl_ms.p50, seen.itl_ms.max) == pytest.approx((200, 200))
    assert (seen.gap_ms.p50, seen.gap_ms.max) == pytest.approx((100, 800))
    assert seen.longest_stall is not None
    assert seen.longest_stall.ms == pytest.approx(800)
    assert seen.longest_stall.times_median_itl == pytest.approx(4.0)
    assert (seen.num_output_tokens, seen.num_input_tokens, seen.num_short) == (7, 10, 0)
    assert seen.output_tokens_per_s == pytest.approx(3.5)
    assert seen.tokens_per_delta == pytest.approx(7 / 3)


def test_longest_stall_is_relative_to_its_own_stream() -> None:
    slow = record(*((float(second), 1) for second in range(1, 9)), end_s=8.0)
    stalled = record((0.01, 1), (0.02, 1), (0.03, 1), (0.08, 1), end_s=0.08)
    stall = figures_of(slow, stalled).longest_stall
    assert isinstance(stall, Stall)
    assert stall.ms == pytest.approx(50)
    assert stall.times_median_itl == pytest.approx(5)


def test_tokens_count_when_they_came_and_requests_when_they_were_sent() -> None:
    seen = figures_of(
        record((1.5, 1), (2.5, 3), sent_s=0.5, end_s=2.5),  # sent in the warm-up
        record((2.0, 1), (4.5, 8), sent_s=1.0, end_s=4.5),  # ends after the measured time
        begin_s=1.0,
        end_s=4.0,
    )
    assert seen.measured_s == 3.0
    assert (seen.num_requests, seen.num_done) == (1, 1)
    assert seen.num_output_tokens == 1 + 3 + 1
    assert seen.num_input_tokens == 20
    assert seen.requests_per_s == pytest.approx(1 / 3)
    assert seen.e2e_ms is not None
    assert seen.e2e_ms.max == pytest.approx(3500)  # of the one that was sent in time


def test_goodput_counts_requests_that_ended_well_and_kept_both_bounds() -> None:
    kept = record((0.1, 1), (0.3, 4), end_s=0.3)  # 50 ms a token
    late = record((0.2, 1), (0.4, 4), end_s=0.4)
    slow = record((0.1, 1), (0.6, 4), end_s=0.6)
    single = record((0.1, 1), end_s=0.1)
    failed = record((0.1, 1), error=("UNAVAILABLE", ""))
    both = Target(ttft_ms=100.001, itl_ms=50.001)
    seen = figures_of(kept, late, slow, single, failed, end_s=2.0, target=both)
    assert seen.goodput == Goodput(
        ttft_ms=100.001,
        itl_ms=50.001,
        num_requests=2,
        share=0.4,
        requests_per_s=1.0,
        output_tokens_per_s=3.0,
    )
    for target, count in (
        (Target(ttft_ms=150, itl_ms=None), 3),
        (Target(ttft_ms=None, itl_ms=60), 3),
    ):
        goodput = figures_of(kept, late, slow, single, failed, target=target).goodput
        assert goodput is not None
        assert goodput.num_requests == count


def test_errors_are_counted_by_status_and_reason_and_the_cut_are_none() -> None:
    full = ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    seen = figures_of(
        record(error=full),
        record(error=("UNAVAILABLE", "")),
        record((1.0, 1), error=full),
        record((1.0, 1)),
        record((1.0, 3), end_s=1.0, asked=4),
    )
    assert seen.errors == (
        ErrorCount(code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL", count=2),
        ErrorCount(code="UNAVAILABLE", reason="", count=1),
    )
    assert (seen.num_requests, seen.num_done, seen.num_failed) == (5, 1, 3)
    assert (seen.num_cut, seen.num_short) == (1, 1)


def test_late_sending_is_told() -> None:
    late = figures_of(record((2.0, 1), due_s=1.0, sent_s=1.25, end_s=2.0)).late_ms
    assert late is not None
    assert late.max == pytest.approx(250)


def test_nothing_at_all_has_figures() -> None:
    seen = figures_of()
    assert (seen.num_requests, seen.measured_s, seen.output_tokens_per_s) == (0, 0.0, 0.0)
    assert (seen.ttft_ms, seen.longest_stall, seen.tokens_per_delta) == (None, None, None)
