"""`python -m tokenloom.worker.plan` is the `plan` command."""

import sys

from tokenloom.worker.plan.cli import plan

sys.exit(plan())
