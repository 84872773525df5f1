"""Runs the measurements that need no GPU: `make bench`, or one of them with `ARGS=streams`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MEASUREMENTS = {
    "core": "core_step",
    "round-trip": "round_trip",
    "streams": "streams",
    "recovery": "recovery",
    "balancing": "balancing",
    "deadlines": "deadlines",
}


def main(argv: list[str]) -> int:
    """Runs one measurement with its options, or all with their defaults."""
    if argv and argv[0] not in MEASUREMENTS:
        print(f"there is no measurement {argv[0]}; there are {', '.join(MEASUREMENTS)}")
        return 2
    for name in argv[:1] or MEASUREMENTS:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", f"bench.{MEASUREMENTS[name]}", *argv[1:]]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
