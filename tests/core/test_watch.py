"""When a step counts as hung."""

from __future__ import annotations

import math

from tokenloom.scheduler.core.watch import FACTOR, FIRST_FACTOR, StallWatch, StepWatch

FLOOR_S = 5.0


def run(watch: StepWatch, took_s: float, *, now: float = 0.0, num_tokens: int = 1) -> None:
    watch.sent(num_spans=1, num_tokens=num_tokens, now=now)
    watch.done(now + took_s)


def due_s(watch: StepWatch, *, now: float, num_tokens: int = 1) -> float:
    watch.sent(num_spans=1, num_tokens=num_tokens, now=now)
    return watch.due_s


def test_nothing_is_due_while_no_step_is_in_flight() -> None:
    watch = StepWatch(FLOOR_S)
    assert watch.due_s == math.inf
    run(watch, 0.1)
    assert watch.due_s == math.inf
    assert not watch.is_overdue(1e9)


def test_short_steps_are_bound_by_the_floor_and_long_ones_by_their_kind() -> None:
    watch = StepWatch(FLOOR_S)
    run(watch, 0.01)
    assert due_s(watch, now=100.0) == 100.0 + FLOOR_S
    watch.done(100.01)
    run(watch, 2.0, num_tokens=5000)
    assert due_s(watch, now=200.0, num_tokens=5000) == 200.0 + FACTOR * 2.0


def test_the_first_step_of_a_kind_may_compile() -> None:
    watch = StepWatch(FLOOR_S)
    run(watch, 0.01)
    assert due_s(watch, now=100.0, num_tokens=5000) == 100.0 + FIRST_FACTOR * FLOOR_S


def test_one_slow_step_does_not_make_the_watch_blind() -> None:
    watch = StepWatch(FLOOR_S)
    run(watch, 60.0)
    for _ in range(50):
        run(watch, 0.01)
    assert due_s(watch, now=0.0) == FLOOR_S


def test_a_step_behind_another_begins_when_that_ends() -> None:
    watch = StepWatch(FLOOR_S)
    run(watch, 0.01)
    for _ in range(2):
        watch.sent(num_spans=1, num_tokens=1, now=100.0)
    assert watch.due_s == 100.0 + FLOOR_S
    watch.done(104.0)
    assert watch.due_s == 104.0 + max(FLOOR_S, 4.0 * FACTOR)


def test_who_was_stopped_itself_waits_again() -> None:
    watch = StepWatch(FLOOR_S)
    run(watch, 0.01)
    watch.sent(num_spans=1, num_tokens=1, now=0.0)
    assert not watch.is_overdue(FLOOR_S - 0.1)
    assert not watch.is_overdue(FLOOR_S + 60.0)
    assert not watch.is_overdue(FLOOR_S + 60.1)
    assert watch.is_overdue(FLOOR_S + 60.0 + FLOOR_S)


def test_a_stall_counts_from_its_first_turn_and_is_over_with_a_step() -> None:
    stalls = StallWatch()
    assert stalls.stalled_s(5.0) == 0
    stalls.look(stalls=True, now=10.0)
    stalls.look(stalls=True, now=12.0)
    assert stalls.stalled_s(13.0) == 3
    stalls.look(stalls=False, now=14.0)
    assert stalls.stalled_s(20.0) == 0
    stalls.look(stalls=True, now=30.0)
    assert stalls.stalled_s(30.0) == 0
