"""`python -m tokenloom.scheduler serve|scheduler …`, where no command is installed."""

from __future__ import annotations

import sys

from tokenloom.scheduler.cli import scheduler, serve


def main(argv: list[str]) -> int:
    """Runs one of the two commands. Returns the exit code."""
    commands = {"serve": serve, "scheduler": scheduler}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    sys.stderr.write("usage: python -m tokenloom.scheduler {serve,scheduler} [-h] ...\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
