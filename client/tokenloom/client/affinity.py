"""Sessions: requests of one key go to one replica, which has their common beginning in its cache.

    session "user-7"  ──▶  replicas, best first: b, c, a   (the same in every process: a hash)
                             b refused lately ──▶ c

So a session moves only while its replica turns requests away, and comes back after it; a replica
that is added or goes moves the sessions of its own share alone (rendezvous hashing).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

from tokenloom.client.errors import Overloaded, TokenloomError, Unavailable

SESSION_METADATA = "tokenloom-session"
"""Carries the key's digest, for proxies that hash it."""

_SHUN_S = 1.0
"""How long a replica is left alone at least that turned a request away."""


class Affinity:
    """Where the requests of sessions go."""

    def __init__(self, replicas: Sequence[str]) -> None:
        self._replicas = tuple(replicas)
        self._shunned_until_s = dict.fromkeys(replicas, 0.0)

    def replica_of(self, session: str, now_s: float) -> str | None:
        """Returns the first of the session's replicas that is not shunned; None: there is none."""
        open_now = (name for name in self._replicas if self._shunned_until_s[name] <= now_s)
        return max(open_now, key=lambda name: _digest(session, name), default=None)

    def is_turned_away(self, replica: str, error: TokenloomError, now_s: float) -> bool:
        """Returns whether a replica's refusal says: elsewhere there may be room.

        It is shunned from now on for as long as it asks for.
        """
        match error:
            case Overloaded(retry_after_s=float() as retry_after_s):
                shun_s = max(_SHUN_S, retry_after_s)
            case Unavailable():
                shun_s = _SHUN_S
            case _:
                return False
        self._shunned_until_s[replica] = now_s + shun_s
        return True


class Visit:
    """One request's way over the replicas of its session."""

    def __init__(self, affinity: Affinity, session: str | None) -> None:
        self._affinity = affinity
        self._session = session
        self._may_move = True
        self.replica: str | None = None
        """Where to call; None: wherever the balancing says."""
        self._go()

    def stays(self) -> None:
        """The replica has admitted the request."""
        self._may_move = False

    def moves_on(self, error: TokenloomError) -> bool:
        """Returns whether to call again after an error, at another `replica`."""
        if self.replica is None or not self._may_move:
            return False
        if not self._affinity.is_turned_away(self.replica, error, time.monotonic()):
            return False
        self._go()
        return True

    def _go(self) -> None:
        if self._session is not None:
            self.replica = self._affinity.replica_of(self._session, time.monotonic())


def session_metadata(session: str | None) -> tuple[tuple[str, str], ...]:
    """Returns what a call of a session bears."""
    return () if session is None else ((SESSION_METADATA, _digest(session).hex()),)


def _digest(*parts: str) -> bytes:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()
