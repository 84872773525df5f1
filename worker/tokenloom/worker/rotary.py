"""Rotary position embedding: frequencies, the table, and its application.

The arithmetic follows transformers' `modeling_rope_utils` operation for
operation, so that greedy output agrees token for token.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import Tensor

from tokenloom.worker.config import Llama3Rope, PlainRope, Rope, YarnRope


def rotary_table(rope: Rope, *, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """Returns float32 [num_positions, 2, head_dim / 2]: cosines, sines."""
    frequencies, scale = _frequencies(rope, head_dim)
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = positions[:, None] * frequencies  # [num_positions, head_dim / 2]
    return torch.stack((angles.cos() * scale, angles.sin() * scale), dim=1).to(device)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [num_tokens, num_heads, head_dim] by [num_tokens, 1, head_dim / 2] angles."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """Returns float32 [head_dim / 2] inverse frequencies and the factor on cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    periods = rope.theta**exponents
    match rope:
        case PlainRope():
            return 1.0 / periods / rope.factor, 1.0
        case Llama3Rope():
            return _llama3(rope, 1.0 / periods), 1.0
        case YarnRope():
            return _yarn(rope, periods, head_dim), _yarn_attention_factor(rope)
        case _:
            assert_never(rope)


def _llama3(rope: Llama3Rope, frequencies: Tensor) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    longest = rope.original_max_tokens / rope.low_freq_factor
    shortest = rope.original_max_tokens / rope.high_freq_factor
    scaled = torch.where(wavelengths > longest, frequencies / rope.factor, frequencies)
    smooth = (rope.original_max_tokens / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smoothed = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(between, smoothed, scaled)


def _yarn(rope: YarnRope, periods: Tensor, head_dim: int) -> Tensor:
    def dimension(num_rotations: float) -> float:
        """Returns the dimension that turns so often within the original context."""
        turns = rope.original_max_tokens / (num_rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _yarn_attention_factor(rope: YarnRope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
