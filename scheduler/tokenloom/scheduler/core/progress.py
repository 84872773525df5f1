"""Shows how far the workers are with loading: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import NoReturn

from tqdm import tqdm

from tokenloom.wire.messages import Progress

log = logging.getLogger(__name__)

LOG_STEP = 0.25
"""A phase is logged each time it advanced by this much."""


class LoadingDisplay:
    """Follows one worker group from its configuration until it is ready."""

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None
        self._phase = ""
        self._logged = 0.0

    def show(self, progress: Progress) -> None:
        """Displays a phase and how much of it is done."""
        if progress.phase != self._phase:
            self.close()
            self._phase, self._logged = progress.phase, -LOG_STEP
            if sys.stderr.isatty():
                self._bar = tqdm(
                    desc=progress.phase,
                    total=1.0,
                    leave=False,
                    bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed}",
                )
        if self._bar is not None:
            self._bar.n = progress.fraction
            self._bar.refresh()
        elif progress.fraction >= min(1.0, self._logged + LOG_STEP) and self._logged < 1.0:
            self._logged = progress.fraction
            log.info("worker: %s %.0f %%", progress.phase, 100 * progress.fraction)

    def close(self) -> None:
        """Ends the display of the phase."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._phase = ""
