"""`python -m tokenloom.scheduler serve|scheduler|keys|token …`, where no command is installed."""

from __future__ import annotations

import sys

from tokenloom.scheduler.cli import keys, scheduler, serve, token


def main(argv: list[str]) -> int:
    """Runs one of the commands. Returns the exit code."""
    commands = {"serve": serve, "scheduler": scheduler, "keys": keys, "token": token}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    sys.stderr.write("usage: python -m tokenloom.scheduler {serve,scheduler,keys,token} [-h] ...\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
