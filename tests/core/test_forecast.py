"""What is learned from steps and requests, and what is foretold from it."""

from __future__ import annotations

import math

import pytest

from tokenloom.scheduler.core.forecast import (
    LARGEST_FACTOR,
    MIN_STEPS,
    Estimate,
    Forecast,
    StepLine,
)


def line(*, base_s: float, row_s: float, rows: range) -> StepLine:
    """Returns what is learned from steps of so many requests, again and again."""
    learned = StepLine()
    for num_rows in [*rows] * 100:
        learned.note(num_rows, base_s + num_rows * row_s)
    return learned


def test_steps_with_more_requests_are_foretold_from_those_with_fewer() -> None:
    learned = line(base_s=4e-3, row_s=40e-6, rows=range(1, 33))
    assert learned.at(256) == pytest.approx(4e-3 + 256 * 40e-6, rel=0.05)


def test_steps_that_are_all_of_one_size_are_foretold_as_they_were() -> None:
    learned = line(base_s=4e-3, row_s=40e-6, rows=range(8, 9))
    assert learned.at(8) == learned.at(256) == pytest.approx(4e-3 + 8 * 40e-6)


def test_a_line_never_falls_and_never_rises_faster_than_its_rows() -> None:
    falling = line(base_s=0.1, row_s=-1e-3, rows=range(1, 33))
    assert falling.at(1) == pytest.approx(falling.at(100))
    steep = StepLine()
    for num_rows in [10, 20] * 50:
        steep.note(num_rows, num_rows**4 * 1e-6)
    assert steep.at(0) == pytest.approx(0.0)


def test_nothing_is_foretold_from_a_few_steps() -> None:
    learned = StepLine()
    for _ in range(MIN_STEPS):
        assert learned.at(1) is None
        learned.note(1, 0.01)
    learned.note(1, 0.01)
    assert learned.at(1) == pytest.approx(0.01)


@pytest.mark.parametrize("step_s", [0.0, -1.0, math.inf, math.nan])
def test_what_is_no_duration_tells_nothing(step_s: float) -> None:
    forecast = Forecast()
    forecast.note_step(num_decoding=3, prompts_s=0.0, step_s=step_s)
    assert forecast == Forecast()


def test_a_token_takes_longer_the_more_prompts_come_with_those_of_others() -> None:
    forecast = Forecast(decode=line(base_s=4e-3, row_s=0.0, rows=range(1, 9)))
    alone = forecast.estimate(num_tokens=100, num_running=1, prompt_token_s=20e-6)
    forecast.note_work(num_prompt_tokens=500, num_drawn_tokens=100)
    beside = forecast.estimate(num_tokens=100, num_running=11, prompt_token_s=20e-6)
    assert alone is not None
    assert beside is not None
    assert alone.token_s == pytest.approx(4e-3)
    assert beside.token_s == pytest.approx(4e-3 + 10 * 5 * 20e-6)
    assert beside.prefill_s > alone.prefill_s  # it has a part of each step


def test_forecasts_that_were_right_are_taken_at_their_word_and_wrong_ones_are_not() -> None:
    told = Estimate(prefill_s=0.1, token_s=0.01)
    right, wrong = Forecast(), Forecast()
    for turn in range(200):
        right.note_error(told, num_tokens=101, elapsed_s=1.1)
        wrong.note_error(told, num_tokens=101, elapsed_s=1.1 * (0.9 if turn % 2 else 1.3))
    assert right.factor == pytest.approx(1.0)
    assert 1.15 < wrong.factor < LARGEST_FACTOR


def test_a_disaster_does_not_double_forecasts_for_long() -> None:
    told = Estimate(prefill_s=0.1, token_s=0.01)
    forecast = Forecast()
    for _ in range(256):
        forecast.note_error(told, num_tokens=101, elapsed_s=1e9)
    assert forecast.factor == LARGEST_FACTOR
    for _ in range(256):
        forecast.note_error(told, num_tokens=101, elapsed_s=1.1)
    assert forecast.factor == pytest.approx(1.0, abs=0.02)


def test_completions_are_foretold_by_the_part_of_max_tokens_that_others_reached() -> None:
    forecast = Forecast()
    assert forecast.useful_tokens(1000) == forecast.usual_tokens(1000) == 1
    for num_tokens in range(100):
        forecast.note_length(max_tokens=1000, num_tokens=num_tokens + 1)
        forecast.note_length(max_tokens=64, num_tokens=64)
    # Of the last 64, from 37 to 100.
    assert forecast.useful_tokens(1000) == 40
    assert forecast.usual_tokens(1000) == 69
    assert forecast.usual_tokens(600) == 42
    assert forecast.useful_tokens(64) == 64


def test_idle_time_is_no_time_in_the_queue() -> None:
    forecast = Forecast()
    for hour in range(10):
        forecast.note_departure(arrived_s=3600.0 * hour, now=3600.0 * hour + 0.5)
    assert forecast.queue_s(4) == pytest.approx(2.0)


def test_an_outage_is_no_time_in_the_queue() -> None:
    forecast = Forecast()
    forecast.note_departure(arrived_s=0.0, now=1.0)
    forecast.begin_epoch()
    forecast.note_departure(arrived_s=0.0, now=100.0)
    assert forecast.queue_s(1) == 0.0
