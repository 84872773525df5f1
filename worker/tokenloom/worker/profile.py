"""A trace of some serving steps by torch's profiler, around any runner.

    steps    0 … skipped │ traced, each in a range of its own │ as without
                         └ the profiler starts                └ trace written, or handed over

Results do not change. Steps wait while the profiler starts and stops, and while a trace is
written to a folder; one that an operator asked for is packed in a thread. A worker that ends
before writes what it has.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tokenloom.worker.loop import Recording

if TYPE_CHECKING:
    from tokenloom.wire.messages import Configure, Ready, Step
    from tokenloom.worker.loop import Pending, Runner

_log = logging.getLogger(__name__)

_NUM_ROWS = 10
_NAME_CHARS = 70


@dataclass(kw_only=True)
class _Wish:
    """Steps that somebody wants to see."""

    num_skipped: int
    num_steps: int
    take: Callable[[profile, int], None]
    """Gets the trace and how many steps it holds."""
    num_traced: int = 0


class ProfiledRunner:
    """A runner whose steps can be traced, one wish at a time.

    To be used with `with`, whose end ends a trace under way.
    """

    def __init__(self, runner: Runner, *, device: torch.device) -> None:
        self._runner = runner
        self._device = device
        self._wish: _Wish | None = None
        self._profile: profile | None = None
        self._recording: Recording | None = None

    def write(self, folder: Path, *, num_steps: int, num_skipped: int) -> None:
        """Wishes for a trace in `folder`, which is made if absent."""

        def take(traced: profile, num_traced: int) -> None:
            self._write(folder, traced, num_traced)

        self._wish = _Wish(num_skipped=num_skipped, num_steps=num_steps, take=take)

    def record(self, num_steps: int) -> None:
        """Wishes for a trace that `take` returns; 0 forgets that."""
        wish = self._wish
        if num_steps and wish is not None:
            left = wish.num_skipped + wish.num_steps - wish.num_traced
            self._recording = Recording(error=f"steps are traced already, {left} more of them")
            return
        self._recording = None
        if num_steps:
            self._wish = _Wish(num_skipped=0, num_steps=num_steps, take=self._hand_over)
        elif wish is not None and wish.take == self._hand_over:
            self._wish = None
            self._stop()

    def take(self) -> Recording | None:
        """Returns the trace that `record` wished for, once."""
        recording, self._recording = self._recording, None
        return recording

    def configure(self, configure: Configure, report: Callable[[str, float], None]) -> Ready:
        """Configures the runner within, whose own steps to warm up do not count."""
        return self._runner.configure(configure, report)

    def launch(self, step: Step) -> Pending:
        """Launches a step of the runner within."""
        wish = self._wish
        if wish is None:
            return self._runner.launch(step)
        if wish.num_skipped:
            wish.num_skipped -= 1
            return self._runner.launch(step)
        if self._profile is None:
            self._profile = self._start(wish.num_steps)
        with record_function(f"step {step.step_id}"):
            pending = self._runner.launch(step)
        wish.num_traced += 1
        if wish.num_traced == wish.num_steps:
            self._finish()
        return pending

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def _start(self, num_steps: int) -> profile:
        _log.info("profiling %d steps", num_steps)
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self._device)  # steps before do not count
        started = profile(activities=activities)
        started.start()
        return started

    def _stop(self) -> profile | None:
        traced, self._profile = self._profile, None
        if traced is not None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            traced.stop()
        return traced

    def _finish(self) -> None:
        """Ends a trace, and gives it to who wished for it."""
        wish, self._wish = self._wish, None
        traced = self._stop()
        if traced is not None and wish is not None:
            wish.take(traced, wish.num_traced)

    def _write(self, folder: Path, traced: profile, num_traced: int) -> None:
        """Writes a trace; a disk that is full is told, and serving goes on."""
        path = folder / f"steps-{time.strftime('%Y%m%d-%H%M%S')}.json.gz"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            traced.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            _log.error("the trace cannot be written: %s", error)
            return
        table = self._table(traced, num_traced)
        _log.info("trace of %d steps in %s\n%s", num_traced, path, table)

    def _hand_over(self, traced: profile, _: int) -> None:
        """Packs a trace beside the steps that follow."""

        def pack() -> None:
            self._recording = _packed(traced)

        Thread(target=pack, name="trace", daemon=True).start()

    def _table(self, traced: profile, num_traced: int) -> str:
        """Returns where most of the time went: kernels on a GPU, operations on a CPU."""
        on_gpu = self._device.type == "cuda"
        kind = "CUDA" if on_gpu else "CPU"
        rows = [
            (row.self_device_time_total if on_gpu else row.self_cpu_time_total, row.count, row.key)
            for row in traced.key_averages()
            if row.device_type.name == kind and not row.is_user_annotation
        ]  # microseconds, calls, name
        num_steps = max(1, num_traced)
        whole_us = sum(us for us, _, _ in rows) or 1
        lines = [
            f"{'µs a step':>12} {'calls':>8} {'share':>7}  {'kernel' if on_gpu else 'operation'}"
        ]
        lines += [
            f"{us / num_steps:12.1f} {count / num_steps:8.1f}"
            f" {us / whole_us:7.1%}  {name[:_NAME_CHARS]}"
            for us, count, name in sorted(rows, reverse=True)[:_NUM_ROWS]
        ]
        return "\n".join(lines)


def _packed(traced: profile) -> Recording:
    try:
        with tempfile.TemporaryDirectory(prefix="tokenloom-") as folder:
            path = Path(folder) / "steps.json.gz"
            traced.export_chrome_trace(str(path))
            return Recording(data=path.read_bytes())
    except (OSError, RuntimeError) as error:
        return Recording(error=f"the trace cannot be packed: {error}")
