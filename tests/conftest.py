"""Settings for all tests."""

import os
from pathlib import Path

from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = [str(ROOT / part) for part in ("protos", "scheduler", "worker", "client")]

# The processes that tests start find the parts as pytest does, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [*SOURCE_ROOTS, *filter(None, [os.environ.get("PYTHONPATH")])]
)

# No test is about time: a busy machine must not fail one. What Hypothesis chooses by itself in
# CI (the same examples each time) stays.
settings.register_profile(
    "tokenloom",
    parent=settings(),
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tokenloom")
