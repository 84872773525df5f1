"""The default budgets keep streams steady and cost no throughput when steps are as long as real."""

from __future__ import annotations

from tests.simulation.timed import (
    SEVENTY_PERCENT,
    SPEC,
    UNIFORM,
    Arrival,
    Costs,
    at_once,
    limits,
    poisson,
    run,
)
from tokenloom.scheduler.core.planning import LONG_QUEUE, prompt_budget


def test_random_arrivals_stall_no_stream_and_delay_no_first_token() -> None:
    load = run(limits(), Costs(), poisson(SEVENTY_PERCENT, 40.0, UNIFORM, UNIFORM))
    assert load.ttft_ms(99) < 4 * load.ttft_ms(50)
    assert load.worst_stall < 5


def test_a_long_prompt_stalls_no_stream() -> None:
    streams = [Arrival(at_s=0.03 * i, num_prompt=500, num_output=500) for i in range(64)]
    long = Arrival(at_s=3.0, num_prompt=30_000, num_output=10)
    figures = run(limits(), Costs(), [*streams, long])
    assert figures.worst_stall < 5


def test_many_requests_at_once_lose_no_throughput_to_the_budget_of_mixed_steps() -> None:
    unbounded = limits(max_mixed_prompt_tokens=SPEC.max_step_tokens)
    for arrivals in (
        at_once(256, UNIFORM, UNIFORM),
        at_once(32, (1024, 1024), (256, 256)),
        at_once(128, (512, 512), (256, 256)),
    ):
        rate = run(limits(), Costs(), arrivals).tokens_per_s
        assert rate > 0.99 * run(unbounded, Costs(), arrivals).tokens_per_s


def test_prompts_take_a_whole_step_unless_few_wait_and_others_decode() -> None:
    assert prompt_budget(1000, 100, num_decoding=0, num_waiting=0) == 1000
    assert prompt_budget(1000, 100, num_decoding=1, num_waiting=LONG_QUEUE) == 100
    assert prompt_budget(1000, 100, num_decoding=1, num_waiting=LONG_QUEUE + 1) == 999
    assert prompt_budget(1000, 100, num_decoding=950, num_waiting=0) == 50
