"""What is promised is kept in time: under too much load as many requests are done as under less."""

from __future__ import annotations

import os

from tests.simulation.deadlines import SHAPES, Tally, at_load, mean

NUM_SEEDS = int(os.environ.get("TOKENLOOM_DEADLINE_SEEDS", "2"))
BEST_LOAD = 1.0
"""Where goodput is the highest, by `python -m tests.simulation.deadlines`."""

SHAPE = SHAPES[0]
"""The other one has four times the steps, and the same figures by that command."""


def figures(load: float, *, deadline_admission: bool = True) -> Tally:
    """Returns the means over the seeds."""
    return mean(
        [
            at_load(SHAPE, load, seed, deadline_admission=deadline_admission).tally()
            for seed in range(NUM_SEEDS)
        ]
    )


def test_twice_the_load_that_saturates_costs_at_most_a_tenth_of_the_goodput() -> None:
    best, twice = figures(BEST_LOAD), figures(2.0)
    assert twice.goodput > 0.9 * best.goodput
    assert twice.late < 0.05  # what is taken is done in time
    assert (twice.num_past, twice.num_begun_past) == (0, 0)


def test_without_deadline_admission_twice_the_load_leaves_no_goodput() -> None:
    """So the figure above is not the simulation's own; and even then nothing is planned late."""
    without = figures(2.0, deadline_admission=False)
    assert without.in_time < 0.05
    assert without.num_past == 0


def test_where_all_can_be_in_time_nearly_nobody_is_refused() -> None:
    light = figures(0.5)
    assert light.refused < 0.01
    assert light.late == 0
