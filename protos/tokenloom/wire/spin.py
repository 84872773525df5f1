"""How core and worker wait for each other: for a while they look again and again, then they sleep.

Being woken takes tens of microseconds, several times on the way of a step and its result. That is
hidden behind a long step and not behind a short one, so where CPUs are plenty the two stay awake.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

DEFAULT_SPIN_US = 2000
"""Longer than a short step; a longer one hides the way of its result."""
MIN_CPUS = 8
"""With fewer, those who look again and again take the CPUs from those who have work."""
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class Spin:
    """Tells whether to look again at once or to sleep."""

    def __init__(self, spin_us: int | None = None) -> None:
        """`spin_us` is how long to look after the last news; None: as this host allows."""
        self._spin_s = (default_spin_us() if spin_us is None else spin_us) / 1e6
        self._until_s = 0.0

    def news(self) -> None:
        """Something came: what follows may come soon."""
        if self._spin_s:
            self._until_s = time.monotonic() + self._spin_s

    def goes_on(self) -> bool:
        """Returns whether the last news are fresh enough to look again at once."""
        return self._spin_s > 0 and time.monotonic() < self._until_s


def default_spin_us() -> int:
    """Returns DEFAULT_SPIN_US where CPUs are plenty, else 0."""
    return DEFAULT_SPIN_US if num_cpus() >= MIN_CPUS else 0


def num_cpus() -> float:
    """Returns how many CPUs this process may use: those of its affinity, or of its quota if less."""
    allowed = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = _CPU_QUOTA.read_text().split()
        return min(allowed, int(quota) / int(period))
    except (OSError, ValueError):  # there is no cgroup v2 here, or the quota is "max"
        return allowed
