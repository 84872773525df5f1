"""How many tokens a tenant may still use in this minute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

WINDOW_S = 60.0


@dataclass(slots=True)
class TokenBucket:
    """Tokens that a tenant may still use: fills up within a minute and holds no more.

    It may be overdrawn, because a completion's length shows only when it is there: who takes
    something finds a level above 0 and leaves it where it may be, and the next one waits.
    """

    per_minute: int
    level: float
    at_s: float

    @classmethod
    def of(cls, per_minute: int | None, now: float, *, old: Self | None) -> Self | None:
        """Returns a bucket for a limit, full or as full as the `old` one; None: no limit."""
        if per_minute is None:
            return None
        if old is None:
            return cls(per_minute=per_minute, level=float(per_minute), at_s=now)
        old.refill(now)
        return cls(per_minute=per_minute, level=min(old.level, float(per_minute)), at_s=now)

    def refill(self, now: float) -> None:
        """Adds what the time since the last call brings."""
        gained = self.per_minute * max(0.0, now - self.at_s) / WINDOW_S
        self.level = min(float(self.per_minute), self.level + gained)
        self.at_s = max(self.at_s, now)

    def take(self, num_tokens: int) -> None:
        """Uses tokens, be they there or not."""
        self.level -= num_tokens

    def wait_s(self) -> float:
        """Returns how long it takes until there is a token; 0: there is one."""
        if self.level >= 1:
            return 0.0
        return math.ceil(1000 * WINDOW_S * (1 - self.level) / self.per_minute) / 1000
