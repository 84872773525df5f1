"""Bearer tokens are made here, away from what reads of them: a core draws nothing at random."""

from __future__ import annotations

import secrets

_NUM_BYTES = 32


def new_token() -> str:
    """Returns a bearer token that nobody can guess: URL-safe Base64 of 256 random bits."""
    return secrets.token_urlsafe(_NUM_BYTES)
