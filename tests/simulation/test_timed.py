"""The default budgets keep streams steady and cost no throughput when steps are as long as real."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.simulation.timed import (
    BURSTS,
    LLAMA_8B,
    QWEN_06B,
    SEVENTY_PERCENT,
    SPEC,
    UNIFORM,
    Arrival,
    Costs,
    limits,
    poisson,
    run,
)

SLOW_LAUNCH_S = 15e-3
shapes = pytest.mark.parametrize("shape", [LLAMA_8B, QWEN_06B], ids=["8B", "0.6B"])


@shapes
def test_random_arrivals_stall_no_stream_and_delay_no_first_token(shape: Costs) -> None:
    load = run(limits(), shape, poisson(SEVENTY_PERCENT[shape], 30.0, UNIFORM, UNIFORM))
    assert load.ttft_ms(99) < 4 * load.ttft_ms(50)
    assert load.worst_stall < 4


@shapes
def test_a_long_prompt_stalls_no_stream(shape: Costs) -> None:
    streams = [Arrival(at_s=0.03 * i, num_prompt=500, num_output=800) for i in range(64)]
    long = Arrival(at_s=2.2, num_prompt=30_000, num_output=10)
    figures = run(limits(), shape, [*streams, long])
    assert figures.worst_stall < 4


@shapes
@pytest.mark.parametrize("burst", BURSTS)
def test_many_requests_at_once_lose_no_throughput_to_the_budget_of_mixed_steps(
    shape: Costs, burst: str
) -> None:
    unbounded = limits(max_mixed_prompt_tokens=SPEC.max_step_tokens)
    rate = run(limits(), shape, BURSTS[burst]).tokens_per_s
    assert rate > 0.995 * run(unbounded, shape, BURSTS[burst]).tokens_per_s


def test_a_host_that_launches_slowly_does_not_make_steps_ever_smaller() -> None:
    """Each such step lasts as long as its launch, whatever it computes: small ones only add up."""
    slow = replace(QWEN_06B, launch_s=SLOW_LAUNCH_S)
    arrivals = poisson(SEVENTY_PERCENT[QWEN_06B], 20.0, UNIFORM, UNIFORM)
    by_cost = run(limits(), slow, arrivals)
    fixed = run(limits(max_mixed_prompt_tokens=512), slow, arrivals)
    assert by_cost.ttft_ms(50) < 0.7 * fixed.ttft_ms(50)
    assert by_cost.gap_ms(50) < fixed.gap_ms(50)
