"""The operators' process: `python -m tokenloom.scheduler.admin CONFIG_JSON`."""

from __future__ import annotations

import asyncio
import logging
import sys

from tokenloom.scheduler.admin.server import run
from tokenloom.scheduler.config import ConfigError, SchedulerConfig


def main(argv: list[str]) -> int:
    """Serves operators until SIGTERM. Returns the exit code."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s admin %(levelname)s %(message)s", stream=sys.stderr
    )
    try:
        (text,) = argv
        asyncio.run(run(SchedulerConfig.from_json(text)))
    except (ConfigError, ValueError) as error:
        sys.stderr.write(f"the operators' service cannot start: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
