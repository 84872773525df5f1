"""A fake worker that notes how long the core takes to answer.

    python bench/fake_worker.py ENDPOINT STEP_MS VOCAB_SIZE REPORT [SPIN_US]

It costs next to nothing itself: its tokens are made up beforehand, and like a GPU's its
results are found by looking. The answer time is from the result of step n to the arrival of
step n + 2: ZeroMQ and a wake-up each way, apply and plan. As long as it is shorter than a
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

import numpy as np

from tokenloom.wire.messages import Configure, Ready, Step, StepDone
from tokenloom.wire.started import process_start_s
from tokenloom.worker.link import CoreAddress
from tokenloom.worker.loop import serve
from tokenloom.worker.phases import Phases

LOOK_S = 50e-6
"""What a worker sleeps between two looks at its device."""
NUM_BLOCKS = 65536
BLOCK_SIZE = 128
MAX_MODEL_TOKENS = 65536
MAX_STEP_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class TimedPending:
    """A step whose result is due at a time."""

    runner: TimedRunner
    step: Step
    due_s: float

    def remaining_s(self) -> float:
        """Returns 0 once the step has had its time."""
        return LOOK_S if time.monotonic() < self.due_s else 0.0

    def result(self) -> StepDone:
        """Returns the result, which is sent at once."""
        now_s = time.monotonic()
        self.runner.sent_s.append(now_s)
        return StepDone(
            epoch=self.step.epoch,
            step_id=self.step.step_id,
            tokens=self.runner.tokens[: 4 * self.step.span_samples.count(1)],
            logprobs=(),
            faulty_rows=b"",
            compute_s=now_s,
        )


class TimedRunner:
    """Gives each step its time and notes when the next but one came."""

    def __init__(self, vocab_size: int, step_s: float) -> None:
        self.sent_s: deque[float] = deque(maxlen=1)
        self.steps: list[tuple[float, float, float]] = []
        self.tokens = b""
        """int32 [max_num_requests]"""
        self._vocab_size = vocab_size
        self._step_s = step_s
        self._busy_until_s = 0.0

    def configure(self, configure: Configure, report: Callable[[str, float], None]) -> Ready:
        """Opens an epoch."""
        report("pretending to load", 1.0)
        random = np.random.default_rng(0)
        tokens = random.integers(0, self._vocab_size, configure.max_num_requests)
        self.tokens = tokens.astype(np.int32).tobytes()
        return Ready(
            epoch=configure.epoch,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            vocab_size=self._vocab_size,
            max_model_tokens=MAX_MODEL_TOKENS,
            max_step_tokens=max(MAX_STEP_TOKENS, configure.max_num_requests),
            weights_bytes=0,
            kv_bytes=0,
        )

    def launch(self, step: Step) -> TimedPending:
        """Takes a step and notes how long the core took for it."""
        now_s = time.monotonic()
        if self.sent_s:
            wait_s = max(0.0, now_s - self._busy_until_s)
            self.steps.append((now_s, now_s - self.sent_s[-1], wait_s))
        self._busy_until_s = max(self._busy_until_s, now_s) + self._step_s
        return TimedPending(runner=self, step=step, due_s=self._busy_until_s)


def main(endpoint: str, step_ms: str, vocab_size: str, report: str, spin_us: str = "") -> int:
    """Serves until the core shuts it down; returns the exit code."""
    logging.basicConfig(level=logging.WARNING)
    runner = TimedRunner(int(vocab_size), float(step_ms) / 1000)
    status = serve(
        runner,
        core=CoreAddress(endpoint=endpoint),
        device="fake",
        phases=Phases("imports", process_start_s()),
        spin_us=int(spin_us) if spin_us else None,
    )
    Path(report).write_text(json.dumps(runner.steps))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
