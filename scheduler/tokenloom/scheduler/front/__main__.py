"""The front's process: `python -m tokenloom.scheduler.front CONFIG_JSON`."""

from __future__ import annotations

import logging
import sys

import uvloop

from tokenloom.scheduler.config import ConfigError, SchedulerConfig
from tokenloom.scheduler.front.server import run
from tokenloom.scheduler.front.text import CheckpointError, load_text_model


def main(argv: list[str]) -> int:
    """Runs a front until SIGTERM. Returns the exit code."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s front[%(process)d] %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # the Hub's client logs each request
    try:
        (text,) = argv
        config = SchedulerConfig.from_json(text)
        model = load_text_model(config.model)
        uvloop.run(run(config, model))
    except (ConfigError, CheckpointError, ValueError) as error:
        sys.stderr.write(f"front cannot start: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
