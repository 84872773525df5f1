"""How a token is drawn for each row, by its own temperature, top_k, top_p, min_p and seed.

    score   logit / temperature; of a temperature of 0 the largest logit is the token
    kept    the top_k largest, of these top_p, of these min_p,
            each with all that equal the smallest one kept
    token   argmax over what is kept of score - log E

E is exponential and a pure function of (seed, position, token): SplitMix64
(Steele, Lea and Flood, 2014), used as a counter-based generator. Its n-th output
is a hash of key + n * golden, so any of them can be had alone and on any device
in the same bits. Each 64-bit output serves two tokens.

    key     = mix(mix(seed) + position)
    outputs   mix(key + golden) → tokens 0, 1    mix(key + 2 golden) → tokens 2, 3    …

Kernel and twin differ by how logarithms and sums are rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

MIN_TEMPERATURE = 1e-6
"""Below it quotients could overflow; there only the likeliest token has a chance anyway."""


@dataclass(frozen=True, kw_only=True)
class DrawTable:
    """What each slot's draws go by, on the device."""

    floats: Tensor
    """float32 [num_slots, 3] temperature, top_p, min_p"""
    ints: Tensor
    """int32 [num_slots, 3] top_k, at most vocab_size, 0 for all; low and high half of the seed"""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What came of the rows."""

    tokens: Tensor
    """int32 [num_rows]"""
    faulty: Tensor
    """bool [num_rows] the logits were not finite; the token is 0"""


class Drawing(Protocol):
    """Work for the device alone, on tensors that lie there."""

    name: str

    def draw(
        self, logits: Tensor, table: DrawTable, slots: Tensor, ends: Tensor, *, masked: bool
    ) -> Drawn:
        """Draws a token for each row.

        Args:
            logits: [num_rows, vocab_size] of any floating type, contiguous.
            table: Of all slots.
            slots: Integers [num_rows] of the rows.
            ends: Integers [num_rows], the positions of the tokens to be drawn.
            masked: -inf means that a token cannot be drawn; else it is a fault.
        """
