"""A trace of some serving steps by torch's profiler, around any runner.

    steps    0 … skipped │ traced, each in a range of its own │ as without
                         └ the profiler starts                └ trace written, table logged

Results do not change. The server stands still while the profiler starts and while
the trace is written. A worker that ends before writes what it has.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tokenloom.wire.messages import Configure, Ready, Step
    from tokenloom.worker.loop import Pending, Runner

_log = logging.getLogger(__name__)

_NUM_ROWS = 10
_NAME_CHARS = 70


class ProfiledRunner:
    """A runner whose launches are traced: `num_steps` of them after the first `num_skipped`.

    To be used with `with`, whose end ends a trace under way.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        folder: Path,
        num_steps: int,
        num_skipped: int,
        device: torch.device,
    ) -> None:
        """The trace goes to `folder`, which is made if absent."""
        self._runner = runner
        self._folder = folder
        self._num_steps = num_steps
        self._num_skipped = num_skipped
        self._device = device
        self._num_launched = 0
        self._num_traced = 0
        self._profile: profile | None = None

    def configure(self, configure: Configure, report: Callable[[str, float], None]) -> Ready:
        """Configures the runner within, whose own steps to warm up do not count."""
        return self._runner.configure(configure, report)

    def launch(self, step: Step) -> Pending:
        """Launches a step of the runner within."""
        if self._num_launched == self._num_skipped:
            self._profile = self._start()
        self._num_launched += 1
        if self._profile is None:
            return self._runner.launch(step)
        with record_function(f"step {step.step_id}"):
            pending = self._runner.launch(step)
        self._num_traced += 1
        if self._num_traced == self._num_steps:
            self._finish()
        return pending

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def _start(self) -> profile:
        _log.info("profiling %d steps", self._num_steps)
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self._device)  # steps before do not count
        started = profile(activities=activities)
        started.start()
        return started

    def _finish(self) -> None:
        """Ends a trace and writes it; a disk that is full is told, and serving goes on."""
        if self._profile is None:
            return
        traced, self._profile = self._profile, None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        traced.stop()
        path = self._folder / f"steps-{time.strftime('%Y%m%d-%H%M%S')}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            traced.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            _log.error("the trace cannot be written: %s", error)
            return
        _log.info("trace of %d steps in %s\n%s", self._num_traced, path, self._table(traced))

    def _table(self, traced: profile) -> str:
        """Returns where most of the time went: kernels on a GPU, operations on a CPU."""
        on_gpu = self._device.type == "cuda"
        kind = "CUDA" if on_gpu else "CPU"
        rows = [
            (row.self_device_time_total if on_gpu else row.self_cpu_time_total, row.count, row.key)
            for row in traced.key_averages()
            if row.device_type.name == kind and not row.is_user_annotation
        ]  # microseconds, calls, name
        num_steps = max(1, self._num_traced)
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
