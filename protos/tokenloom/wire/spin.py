"""How core and worker wait for each other while steps are short: they look again and again.

Being woken takes tens of microseconds, several times on the way of a step and its result. A long
step hides that; between short ones the two stay awake, where CPUs are plenty.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

DEFAULT_SPIN_US = 1000
"""From steps of 1 ms on, being woken costs no steps (bench/README.md)."""
MIN_CPUS = 8
"""With fewer, those who look again and again take the CPUs from those who have work."""
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class Spin:
    """Tells whether to look again at once or to sleep."""

    def __init__(self, spin_us: int | None = None) -> None:
        """`spin_us` is how soon results must follow each other; None: as this host allows."""
        self._spin_s = (default_spin_us() if spin_us is None else spin_us) / 1e6
        self._last_s = -math.inf
        self._until_s = -math.inf

    def result(self) -> None:
        """A result came or went: soon after another, a third may be as soon."""
        now_s = time.monotonic()
        if now_s - self._last_s < self._spin_s:
            self._until_s = now_s + self._spin_s
        self._last_s = now_s

    def goes_on(self) -> bool:
        """Returns whether to look again at once."""
        return time.monotonic() < self._until_s


def default_spin_us() -> int:
    """Returns DEFAULT_SPIN_US where CPUs are plenty, else 0."""
    return DEFAULT_SPIN_US if num_cpus() >= MIN_CPUS else 0


def num_cpus() -> float:
    """Returns how many CPUs this process may use, by its affinity and its quota."""
    allowed = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = _CPU_QUOTA.read_text().split()
        return min(allowed, int(quota) / int(period))
    except (OSError, ValueError):  # there is no cgroup v2 here, or the quota is "max"
        return allowed
