"""How much of the time the device ran: what shows that nothing makes it wait."""

from __future__ import annotations

import logging
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

REPORT_S = 5.0
"""Of busy time, between two lines of the log."""
PAUSE_REPORT_S = 1.0
"""Of busy time, for a line when a pause ends."""
IDLE_S = 0.1
"""A longer gap between two steps is a time without requests."""


class StepClock:
    """Adds up steps and the gaps between them, from the device's own events."""

    def __init__(self) -> None:
        self._last_end: torch.cuda.Event | None = None
        self._steps_s: list[float] = []
        self._ran_s = 0.0
        self._gaps_s = 0.0

    def add(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Enters a step that is done; returns its seconds on the device."""
        step_s = _between_s(start, end)
        gap_s = 0.0 if self._last_end is None else _between_s(self._last_end, start)
        self._last_end = end
        if gap_s > IDLE_S:
            if self._ran_s + self._gaps_s >= PAUSE_REPORT_S:
                self._tell()
            gap_s = 0.0
        self._steps_s.append(step_s)
        self._ran_s += step_s
        self._gaps_s += gap_s
        if self._ran_s + self._gaps_s >= REPORT_S:
            self._tell()
        return step_s

    def _tell(self) -> None:
        whole_s = self._ran_s + self._gaps_s
        _log.info(
            "the GPU ran %.1f %% of %.2f s: %d steps, median %.3f ms",
            100 * self._ran_s / whole_s,
            whole_s,
            len(self._steps_s),
            1000 * median(self._steps_s),
        )
        self._steps_s.clear()
        self._ran_s = self._gaps_s = 0.0


def _between_s(earlier: torch.cuda.Event, later: torch.cuda.Event) -> float:
    elapsed_ms: float = earlier.elapsed_time(later)
    return elapsed_ms / 1000
