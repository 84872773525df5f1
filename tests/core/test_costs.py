"""What is learned from the durations of steps, and what disturbs it not."""

from __future__ import annotations

import math

import pytest

from tokenloom.scheduler.core.costs import (
    MAX_STALL,
    MIN_PROMPT_TOKENS,
    UNKNOWN_PROMPT_TOKENS,
    StepCosts,
)

ROOM = 8000


def known(*, decode_s: float, prompt_token_s: float) -> StepCosts:
    """Returns costs that were learned from one step of either kind."""
    costs = StepCosts()
    costs.note(num_prompt_tokens=1000, compute_s=1000 * prompt_token_s)
    costs.note(num_prompt_tokens=0, compute_s=decode_s)
    return costs


def test_prompts_fill_what_a_stall_may_last() -> None:
    costs = known(decode_s=0.005, prompt_token_s=20e-6)
    assert costs.prompt_budget(ROOM) == pytest.approx((MAX_STALL - 1) * 250, abs=1)


def test_the_budget_stays_within_the_step_and_above_a_tile() -> None:
    assert known(decode_s=1.0, prompt_token_s=1e-6).prompt_budget(ROOM) == ROOM
    assert known(decode_s=1e-3, prompt_token_s=1e-3).prompt_budget(ROOM) == MIN_PROMPT_TOKENS
    assert known(decode_s=1e-3, prompt_token_s=1e-3).prompt_budget(7) == 7


def test_until_both_costs_are_known_the_budget_is_fixed() -> None:
    costs = StepCosts()
    assert costs.prompt_budget(ROOM) == UNKNOWN_PROMPT_TOKENS
    assert costs.prompt_budget(7) == 7
    costs.note(num_prompt_tokens=1000, compute_s=0.02)
    assert costs.prompt_budget(ROOM) == UNKNOWN_PROMPT_TOKENS


def test_first_steps_that_compile_kernels_are_forgotten() -> None:
    costs = StepCosts()
    costs.note(num_prompt_tokens=1000, compute_s=30.0)
    costs.note(num_prompt_tokens=0, compute_s=10.0)
    costs.note(num_prompt_tokens=1000, compute_s=0.02)
    costs.note(num_prompt_tokens=0, compute_s=0.005)
    assert costs == known(decode_s=0.005, prompt_token_s=20e-6)


def test_a_step_that_stood_still_is_forgotten_by_the_next() -> None:
    costs = known(decode_s=0.005, prompt_token_s=20e-6)
    before = costs.prompt_budget(ROOM)
    costs.note(num_prompt_tokens=500, compute_s=3.0)
    costs.note(num_prompt_tokens=0, compute_s=3.0)
    costs.note(num_prompt_tokens=0, compute_s=0.005)
    assert costs.prompt_budget(ROOM) == before


def test_steps_that_grow_longer_raise_the_budget_in_time() -> None:
    costs = known(decode_s=0.004, prompt_token_s=20e-6)
    for _ in range(50):
        costs.note(num_prompt_tokens=0, compute_s=0.008)
    assert costs.prompt_budget(ROOM) == pytest.approx((MAX_STALL - 1) * 400, rel=0.02)


def test_short_prompts_beside_many_decodes_do_not_shrink_the_budget() -> None:
    costs = known(decode_s=0.005, prompt_token_s=20e-6)
    before = costs.prompt_budget(ROOM)
    costs.note(num_prompt_tokens=10, compute_s=0.005)
    assert costs.prompt_budget(ROOM) == before


@pytest.mark.parametrize("compute_s", [0.0, -1.0, math.inf, math.nan])
def test_what_is_no_duration_tells_nothing(compute_s: float) -> None:
    costs = StepCosts()
    costs.note(num_prompt_tokens=100, compute_s=compute_s)
    costs.note(num_prompt_tokens=0, compute_s=compute_s)
    assert costs == StepCosts()


def test_any_duration_gives_a_budget() -> None:
    tiny, huge = 5e-324, 1.7e308
    assert known(decode_s=huge, prompt_token_s=1e-300).prompt_budget(ROOM) == ROOM
    assert known(decode_s=tiny, prompt_token_s=1e300).prompt_budget(ROOM) == MIN_PROMPT_TOKENS
    costs = StepCosts()
    for _ in range(3):
        costs.note(num_prompt_tokens=1000, compute_s=tiny)  # rounded to 0 a token
        costs.note(num_prompt_tokens=0, compute_s=huge)
    assert costs.prompt_budget(ROOM) == UNKNOWN_PROMPT_TOKENS
