"""Replays one seed of the simulation with a trace: `python -m tests.simulation SEED`."""

from __future__ import annotations

import sys

from tests.simulation.world import World

World(int(sys.argv[1]), trace=print).run()
