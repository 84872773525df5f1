"""`python -m tokenloom.scheduler COMMAND …`, where no command is installed."""

from __future__ import annotations

import sys

from tokenloom.scheduler.cli import bearer_token, keys, scheduler, serve


def main(argv: list[str]) -> int:
    """Runs one of the commands. Returns the exit code."""
    commands = {
        "serve": serve,
        "scheduler": scheduler,
        "keys": keys,
        "bearer-token": bearer_token,
    }
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    sys.stderr.write(f"usage: python -m tokenloom.scheduler {{{','.join(commands)}}} [-h] ...\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
