"""Programs that are no Python packages and that some tests run."""

import os
import shutil
import sys
from pathlib import Path

import pytest

UNPACKED = Path(sys.prefix) / "prometheus/usr/bin"
"""Where `make test` puts Debian's."""


def prometheus_program(name: str) -> str:
    """Returns the path of `prometheus` or `promtool`; without it a test is skipped."""
    path = shutil.which(name) or shutil.which(name, path=UNPACKED)
    if path is None and os.environ.get("CI"):
        pytest.fail(f"{name} is neither on the PATH nor in {UNPACKED}; `make test` puts it there")
    if path is None:
        pytest.skip(f"{name} is neither on the PATH nor in {UNPACKED}")
    return path
