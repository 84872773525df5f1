"""Runs the measurements that need no GPU: `make bench`, or one of them with `ARGS=streams`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MEASUREMENTS = {"core": "core_step.py", "streams": "streams.py"}


def main(argv: list[str]) -> int:
    """Runs one measurement with its options, or all with their defaults."""
    if argv and argv[0] not in MEASUREMENTS:
        print(f"there is no measurement {argv[0]}; there are {', '.join(MEASUREMENTS)}")
        return 2
    for name in argv[:1] or MEASUREMENTS:
        print(f"== {name}", flush=True)
        script = Path(__file__).parent / MEASUREMENTS[name]
        status = subprocess.run([sys.executable, script, *argv[1:]], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
