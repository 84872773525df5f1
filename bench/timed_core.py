"""The core's process with a stop-watch: `python bench/timed_core.py REPORT CONFIG_JSON`.

The fake worker puts the time at which it sends a result into the result, both
on this host's monotonic clock. What passes until the core takes the result up
is the core's delay: ZeroMQ, the wake-up, and whatever the core was busy with.
At the end (time, delay) of each step in seconds goes to REPORT as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tokenloom.scheduler.core import __main__ as process
from tokenloom.scheduler.core.loop import CoreLoop
from tokenloom.wire.messages import StepDone

delays: list[tuple[float, float]] = []


class TimedLoop(CoreLoop):
    """Notes when each result is taken up."""

    def _on_step_done(self, rank: int, done: StepDone) -> None:
        now_s = time.monotonic()
        delays.append((now_s, now_s - done.compute_s))
        super()._on_step_done(rank, done)


def main(report: str, config: str) -> int:
    """Runs the core until SIGTERM; returns the exit code."""
    vars(process)["CoreLoop"] = TimedLoop
    status = process.main([config])
    Path(report).write_text(json.dumps(delays))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
