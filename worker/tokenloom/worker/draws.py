"""Random numbers that are a pure function of (seed, position, token).

SplitMix64 (Steele, Lea and Flood, 2014), used as a counter-based generator: its
n-th output is a hash of key + n * golden, so any of them can be had alone and
on any device in the same bits. Each 64-bit output serves two tokens.

    key     = mix(mix(seed) + position)
    outputs   mix(key + golden) → tokens 0, 1    mix(key + 2 golden) → tokens 2, 3    …

torch has no unsigned 64-bit arithmetic: int64 wraps in the same way, and what a
right shift drags in from the sign is masked off.
"""

from __future__ import annotations

import torch
from torch import Tensor


def exponential(seeds: Tensor, positions: Tensor, num_tokens: int) -> Tensor:
    """Returns float32 [num_rows, num_tokens] numbers of the exponential distribution, rate 1.

    `seeds` and `positions` are int64 [num_rows]. All results are positive and finite.
    """
    keys = _mix(_mix(seeds) + positions)  # [num_rows]
    counters = torch.arange(1, (num_tokens + 1) // 2 + 1, device=seeds.device)
    bits = _mix(keys[:, None] + counters * _GOLDEN)  # [num_rows, ceil(num_tokens / 2)]
    halves = torch.stack((bits & _LOW_HALF, (bits >> 32) & _LOW_HALF), dim=-1)
    # Small numbers decide the race and keep their precision; the largest are cut short of 1.
    uniform = (halves.flatten(1)[:, :num_tokens].float() + 0.5) * 2.0**-32
    return -torch.log1p(-uniform.clamp_max(1 - 2.0**-24))


def _mix(values: Tensor) -> Tensor:
    values = (values ^ _shift(values, 30)) * _FIRST
    values = (values ^ _shift(values, 27)) * _SECOND
    return values ^ _shift(values, 31)


def _shift(values: Tensor, by: int) -> Tensor:
    return (values >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)
_LOW_HALF = 0xFFFFFFFF
