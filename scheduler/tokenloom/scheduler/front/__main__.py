"""The front's process: `python -m tokenloom.scheduler.front CONFIG_JSON`."""

from __future__ import annotations

import logging
import sys

import uvloop

from tokenloom.scheduler.config import ConfigError, SchedulerConfig
from tokenloom.scheduler.front.server import run
from tokenloom.scheduler.front.text import CheckpointError, load_text_model
from tokenloom.wire.logs import set_up_logs

_log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Runs a front until SIGTERM. Returns the exit code."""
    try:
        (text,) = argv
        config = SchedulerConfig.from_json(text)
        # An exception here may quote a prompt.
        set_up_logs("front", form=config.log_format, level=config.log_level, tells_errors=False)
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # the Hub's client logs each request
        model = load_text_model(config.model)
        uvloop.run(run(config, model))
    except (ConfigError, CheckpointError, ValueError) as error:
        _log.critical("front cannot start: %s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
