"""What a fuzz target is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that strangers write to."""

    run: Callable[[bytes], None]
    """Takes any bytes; whatever it raises is a finding."""
    seeds: Sequence[bytes]
    """Inputs that reach far, made of the messages as they are now."""
    max_bytes: int = 4096
