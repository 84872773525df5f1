"""`tokenloom serve` with fake workers: `python -m tests.chaos.fake_serve serve … -- OPTIONS`.

What comes first is for `tokenloom serve`, the options go to each fake worker.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tokenloom.scheduler import cli
from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.supervise import Child


def main(argv: list[str]) -> int:
    """Serves until SIGTERM; returns the exit code."""
    end = argv.index("--")
    real_stages = cli.stages

    def stages(
        config: SchedulerConfig, workers: Sequence[tuple[str, ...]], *, stand_by: bool
    ) -> list[list[Child]]:
        command = (sys.executable, "-m", "tokenloom.worker.fake")
        fake = (*command, f"--connect={config.worker_endpoint}", *argv[end + 1 :])
        return real_stages(config, [fake for _ in workers], stand_by=stand_by)

    vars(cli)["stages"] = stages
    return cli.serve(argv[1:end])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
