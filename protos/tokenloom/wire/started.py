"""When a process started: where the time until it serves is counted from."""

from __future__ import annotations

import os
import time
from pathlib import Path


def process_start_s(pid: int | None = None) -> float:
    """Returns when a process, this one without a `pid`, started, in seconds of `time.monotonic`.

    From the kernel's own account, to a hundredth of a second, so that the start of the
    interpreter is in it; where there is none, the time of the call. Source: proc_pid_stat(5).
    """
    now_s = time.monotonic()
    try:
        stat = Path(f"/proc/{pid or os.getpid()}/stat").read_text(encoding="utf-8")
        # The second field is the program's name in parentheses and may hold blanks.
        start_ticks = int(stat.rpartition(")")[2].split()[19])
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return now_s
    return now_s - max(0.0, age_s)
