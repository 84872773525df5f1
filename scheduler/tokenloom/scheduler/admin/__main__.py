"""The operators' process: `python -m tokenloom.scheduler.admin CONFIG_JSON`."""

from __future__ import annotations

import asyncio
import logging
import sys

from tokenloom.scheduler.admin.server import run
from tokenloom.scheduler.config import ConfigError, SchedulerConfig
from tokenloom.wire.logs import set_up_logs

_log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Serves operators until SIGTERM. Returns the exit code."""
    try:
        (text,) = argv
        config = SchedulerConfig.from_json(text)
        set_up_logs("admin", form=config.log_format, level=config.log_level)
        asyncio.run(run(config))
    except (ConfigError, ValueError) as error:
        _log.critical("the operators' service cannot start: %s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
