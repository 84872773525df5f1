"""`python -m tokenloom.worker.saving` is the `quantize` command."""

import sys

from tokenloom.worker.saving.cli import quantize

sys.exit(quantize())
