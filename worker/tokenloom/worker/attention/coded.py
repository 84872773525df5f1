"""Codes of keys and values (`fp8`) as our Triton kernels take them.

A matrix operand has to bring two numbers of its inner dimension together in a register.
For keys that is the head's, in which codes lie side by side. For values it is that of the
positions, a row apart: there two codes of a row are loaded as one number of 16 bits, which
the hardware transposes as such, and of which the low halves make one matrix and the high
ones another.

    a value's codes     0 1 2 3 …     loaded  01 23 …     two matrices  0 2 …  and  1 3 …
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def wide_type(dtype: torch.dtype) -> tl.dtype:
    """Returns the type that codes are widened to beside queries of `dtype`.

    The hardware widens to float16, which holds every code.
    """
    return tl.float32 if dtype == torch.float32 else tl.float16


@triton.jit
def exponent_of(scales: tl.tensor) -> tl.tensor:
    """Returns the logarithms, to the base 2, of float32 powers of two."""
    return ((scales.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)


@triton.jit
def reciprocal_of(scales: tl.tensor) -> tl.tensor:
    """Returns the reciprocals of float32 powers of two."""
    return ((254 << 23) - scales.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def widen_halves(pairs: tl.tensor, WIDE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Returns the codes in the low and those in the high halves of int16 numbers."""
    left = pairs.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    right = (pairs >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return left.to(WIDE), right.to(WIDE)
