"""`python -m tokenloom.worker` is the `worker` command."""

import sys

from tokenloom.worker.cli import worker

sys.exit(worker())
