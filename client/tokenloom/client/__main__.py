"""`python -m tokenloom.client` is the `tokenloom` command."""

import sys

from tokenloom.client.cli import main

sys.exit(main())
