"""The core keeps its promises in thousands of seeded worlds; a failing seed is printed."""

from __future__ import annotations

import os

import pytest

from tests.simulation.world import World

NUM_SEEDS = int(os.environ.get("TOKENLOOM_SEEDS", "2400"))
SEEDS_PER_TEST = 200


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, SEEDS_PER_TEST))
def test_every_request_ends_once_with_the_tokens_of_an_undisturbed_run(first: int) -> None:
    for seed in range(first, min(first + SEEDS_PER_TEST, NUM_SEEDS)):
        World(seed).run()


def test_the_worlds_meet_what_they_are_to_judge() -> None:
    """Preemptions, deaths, refusals and each finish occur, so none is judged in vain."""
    ends: set[str] = set()
    num_preemptions = num_deaths = num_innocent_suspects = 0
    for seed in range(200):
        world = World(seed)
        world.run()
        ends |= {str(caller.end) for caller in world.callers.values()}
        num_preemptions += world.state.totals.num_preemptions
        num_deaths += world.epoch > 1
        num_innocent_suspects += sum(
            len(caller.deaths) > 1 and caller.end is not None and caller.end.value == "length"
            for caller in world.callers.values()
        )
    assert {"length", "stop_token", "stop_string", "cancelled", "fault", "crash"} <= ends
    assert {"queue_full", "too_long", "deadline", "deadline_unreachable"} <= ends
    assert num_preemptions > 50
    assert num_deaths > 5
    assert num_innocent_suspects > 20
