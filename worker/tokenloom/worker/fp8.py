"""Keys and values in 8 bits: e4m3 codes, and a scale for each head of each position.

A scale is the least power of two by which the head's largest number fits into a code's
range, so that scaling rounds nothing: a code times its scale is the same number in
bfloat16, float16 and float32, and all kernels see the same. No scale depends on another
position, so none has to be known before.

    head of a position    0.31   -5.2   0.004 …    the largest is 5.2 <= 448 * 2^-6
    codes, scale            20   -320    0.25 …    2^-6

What is not finite becomes NaN and so stays noticed.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODE_DTYPE = torch.float8_e4m3fn
SCALE_DTYPE = torch.float32
LARGEST = 448 * 2.0**60
"""Larger numbers count as not finite."""
SMALLEST = 2.0**-51
"""A head of smaller numbers gets the scale of this one. Between the two, attention can fold
scales into the softmax without a number that float32 does not have."""


def to_codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns CODE_DTYPE [..., head_dim] for rows of that shape, and SCALE_DTYPE [...]."""
    wide = rows.to(SCALE_DTYPE)
    largest = wide.abs().amax(-1)
    finite = largest <= LARGEST
    mantissas, exponents = torch.frexp(largest.where(finite, 1).clamp(min=SMALLEST))
    exponents = exponents - 9 + (mantissas > 0.875).int()  # 448 is 0.875 * 2^9
    scales = ((exponents + 127) << 23).view(SCALE_DTYPE)  # a float's bits: exact everywhere
    scaled = (wide / scales[..., None]).where(finite[..., None], torch.nan)
    return scaled.to(CODE_DTYPE), scales


def from_codes(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns [..., head_dim] numbers for codes of that shape and [...] scales."""
    return (codes.to(SCALE_DTYPE) * scales[..., None]).to(dtype)
