"""A fake worker that notes how long the core takes to answer.

    python bench/fake_worker.py ENDPOINT STEP_MS VOCAB_SIZE REPORT

The answer time is from the result of step n to the arrival of step n + 2:
ZeroMQ and a wake-up each way, apply and plan. As long as it is shorter than a
step, the worker never waits. A result's compute_s bears the time of sending, for
timed_core.py. At the end (time, answer time, wait for work) of each step in
seconds goes to REPORT as JSON.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tokenloom.wire.messages import Configure, Ready, Step, StepDone
from tokenloom.wire.started import process_start_s
from tokenloom.worker.fake import FakeConfig, FakeModel
from tokenloom.worker.loop import serve
from tokenloom.worker.phases import Phases


@dataclass(frozen=True, kw_only=True)
class TimedPending:
    """A step whose result is due at a time."""

    runner: TimedRunner
    done: StepDone
    due_s: float

    def remaining_s(self) -> float:
        """Returns the seconds until the step has had its time."""
        return self.due_s - time.monotonic()

    def result(self) -> StepDone:
        """Returns the result, which is sent at once."""
        now_s = time.monotonic()
        self.runner.sent_s.append(now_s)
        return msgspec.structs.replace(self.done, compute_s=now_s)


class TimedRunner:
    """Gives each step its time and notes when the next but one came."""

    def __init__(self, config: FakeConfig, step_s: float) -> None:
        self.sent_s: deque[float] = deque(maxlen=1)
        self.steps: list[tuple[float, float, float]] = []
        self._model = FakeModel(config)
        self._step_s = step_s
        self._busy_until_s = 0.0

    def configure(self, configure: Configure, report: Callable[[str, float], None]) -> Ready:
        """Opens an epoch."""
        report("pretending to load", 1.0)
        return self._model.configure(configure)

    def launch(self, step: Step) -> TimedPending:
        """Computes a step and notes how long the core took for it."""
        now_s = time.monotonic()
        if self.sent_s:
            wait_s = max(0.0, now_s - self._busy_until_s)
            self.steps.append((now_s, now_s - self.sent_s[-1], wait_s))
        self._busy_until_s = max(self._busy_until_s, now_s) + self._step_s
        return TimedPending(runner=self, done=self._model.step(step), due_s=self._busy_until_s)


def main(endpoint: str, step_ms: str, vocab_size: str, report: str) -> int:
    """Serves until the core shuts it down; returns the exit code."""
    logging.basicConfig(level=logging.WARNING)
    config = FakeConfig(vocab_size=int(vocab_size), num_blocks=65536, max_model_tokens=4096)
    runner = TimedRunner(config, float(step_ms) / 1000)
    phases = Phases("imports", process_start_s())
    status = serve(runner, endpoint=endpoint, rank=0, device="fake", phases=phases)
    Path(report).write_text(json.dumps(runner.steps))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
