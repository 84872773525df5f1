"""A matrix times one row, with what comes before and after, as one Triton kernel.

Decoding one request reads every weight and computes next to nothing with it. Each lane
multiplies what it loaded and sums by itself; the sums meet at the end. That reads as fast as
the memory gives the weights, which may be whole numbers of 8 bits, widened on the way. But
its time would grow with each further row: for those the matrix unit multiplies.

The first weights are on their way before the kernel waits for the one ahead (`overlap`).
It sums in float32 and rounds where the twin rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from tokenloom.worker.kernels.overlap import let_next_start, overlaps, wait_for_previous
from tokenloom.worker.weights.linears import DenseLinear, EightBitLinear

_LANE_BYTES = 16 * 1024
"""Of weights that a program has under way"""
_NUM_PROGRAMS = 128
"""That a kernel has at least, if it can: about one a multiprocessor"""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What a program takes of a matrix: some outputs, and so many inputs at a time."""

    num_outputs: int
    num_inputs: int
    num_warps: int


def choose_cut(num_rows: int, linear: DenseLinear, *, gated: bool = False) -> Cut | None:
    """Returns how this kernel multiplies so many rows with a matrix; None: it does not.

    With `gated`, the matrix is gate and up. Measured on an H200 in bfloat16, microseconds of a
    layer without attention for one row, the dense library's matmuls and four more kernels
    beside four of this one: Llama-3.1-8B 124 → 110, Qwen3-0.6B 34 → 14.5.
    """
    if linear.weight.dtype.itemsize != 2 or num_rows != 1:
        return None
    num_outputs, num_inputs = linear.shape
    num_matrices = 2 if gated else 1
    num_outputs //= num_matrices
    sizes = (4096, 2048, 1024)[num_matrices - 1 :]
    at_once = next((size for size in sizes if num_inputs % size == 0), 1024)
    per_program = _LANE_BYTES // (2 * num_matrices * at_once)
    while per_program > 1 and num_outputs < per_program * _NUM_PROGRAMS:
        per_program //= 2
    return Cut(num_outputs=per_program, num_inputs=at_once, num_warps=min(at_once // 256, 8))


def _parts(linear: DenseLinear | EightBitLinear) -> tuple[Tensor, Tensor | None]:
    """Returns what rows are multiplied with, and what each output is then scaled by."""
    if isinstance(linear, DenseLinear):
        return linear.weight, None
    return linear.codes, linear.scales


def multiply(
    cut: Cut,
    row: Tensor,
    linear: DenseLinear | EightBitLinear,
    out: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Multiplies a [1, num_inputs] row with a matrix and returns [1, num_outputs] out.

    Args:
        cut: By `choose_cut`.
        row: Of float16 or bfloat16, as all tensors here.
        linear: The matrix; with `gated` [2 * num_outputs, num_inputs].
        out: Where the result goes. It may be the residual.
        norm: Weight [num_inputs] and eps of a norm of the row, if it is to be normalized.
        residual: [1, num_outputs] that the result is added to.
        gated: Whether the result is silu(gate) * up of what is multiplied.
    """
    num_outputs = out.shape[1]
    gain, eps = norm or (None, 0.0)
    weight, scales = _parts(linear)
    overlapped = overlaps(row.device)
    _multiply_by_lanes[(triton.cdiv(num_outputs, cut.num_outputs),)](
        row,
        weight,
        scales,
        linear.bias,
        gain,
        residual,
        out,
        num_outputs,
        eps,
        NUM_INPUTS=linear.shape[1],
        OUTPUTS=cut.num_outputs,
        INPUTS=cut.num_inputs,
        GATED=gated,
        OVERLAPPED=overlapped,
        num_warps=cut.num_warps,
        launch_pdl=overlapped,
    )
    return out


@triton.jit
def _load_weights(
    cells: tl.tensor, inputs: tl.tensor, begin: tl.constexpr, TILE: tl.constexpr, END: tl.constexpr
) -> tl.tensor:
    """Loads a tile that is read once: it leaves the cache first."""
    if begin + TILE <= END:
        return tl.load(cells + begin, eviction_policy="evict_first")
    return tl.load(
        cells + begin, mask=begin + inputs < END, other=0.0, eviction_policy="evict_first"
    )


@triton.jit
def _load_inputs(
    cells: tl.tensor, inputs: tl.tensor, begin: tl.constexpr, TILE: tl.constexpr, END: tl.constexpr
) -> tl.tensor:
    """Loads of the row, or of its gain, what belongs to a tile of weights."""
    if begin + TILE <= END:
        return tl.load(cells + begin)
    return tl.load(cells + begin, mask=begin + inputs < END, other=0.0)


@triton.jit
def _normalize(x: tl.tensor, scale: tl.tensor, gain: tl.tensor) -> tl.tensor:
    rounded = (x.to(tl.float32) * scale).to(x.dtype).to(tl.float32)
    return (rounded * gain.to(tl.float32)).to(x.dtype)


@triton.jit
def _finish(
    total: tl.tensor,
    up_total: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    output: tl.tensor,
    num_outputs: int,
    GATED: tl.constexpr,
) -> None:
    """Writes [OUTPUTS] sums."""
    dtype: tl.constexpr = out.dtype.element_ty
    there = output < num_outputs
    if bias is not None:
        total += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)
        if GATED:
            up_bias = tl.load(bias + num_outputs + output, mask=there, other=0.0)
            up_total += up_bias.to(tl.float32)
    result = total.to(dtype)
    if GATED:
        gate = result.to(tl.float32)
        activated = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
        result = (activated * up_total.to(dtype).to(tl.float32)).to(dtype)
    if residual is not None:
        before = tl.load(residual + output, mask=there, other=0.0).to(tl.float32)
        result = (before + result.to(tl.float32)).to(dtype)
    tl.store(out + output, result, mask=there)


@triton.jit
def _sum_products(
    x: tl.tensor, weights: tl.tensor, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr
) -> tl.tensor:
    """Returns [OUTPUTS, INPUTS / 8] sums of eight products each.

    A code is not converted: 2**15 of the bits of 384.0 stand for 1, so a code in its
    place, added to them, makes 384 + code. What that is too much comes off the sum.
    """
    if weights.dtype == tl.int8:
        bits = (weights.to(tl.int32) << 15) + 0x43C00000
        products = x * bits.to(tl.float32, bitcast=True)
    else:
        products = x * weights.to(tl.float32)
    sums = tl.sum(tl.reshape(products, [OUTPUTS, INPUTS // 8, 8]), 2)
    if weights.dtype == tl.int8:
        sums -= 384.0 * tl.sum(tl.reshape(x, [1, INPUTS // 8, 8]), 2)
    return sums


@triton.jit
def _scaled(total: tl.tensor, scales: tl.tensor, line: tl.tensor, num_lines: int) -> tl.tensor:
    """Returns [OUTPUTS] sums in the scales of their lines of the matrix, if it has any."""
    if scales is not None:
        total *= tl.load(scales + line, mask=line < num_lines, other=0.0)
    return total


@triton.jit
def _multiply_by_lanes(
    row: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    gain: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    num_outputs: int,
    eps: float,
    NUM_INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAPPED: tl.constexpr,
) -> None:
    """A program some outputs; tiles are [OUTPUTS, INPUTS]."""
    let_next_start(OVERLAPPED)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    # No lane loads more than 8 in a row, however narrow weights are.
    inputs = tl.max_contiguous(tl.arange(0, INPUTS), 8)[None, :]
    # Outputs past the end are the last one again: nothing is written for them.
    line = tl.minimum(output, num_outputs - 1).to(tl.int64)[:, None]
    cells = weight + line * NUM_INPUTS + inputs
    up_cells = cells + tl.cast(num_outputs, tl.int64) * NUM_INPUTS
    w = _load_weights(cells, inputs, 0, INPUTS, NUM_INPUTS)
    if GATED:
        u = _load_weights(up_cells, inputs, 0, INPUTS, NUM_INPUTS)
    if gain is not None:
        g = _load_inputs(gain + inputs, inputs, 0, INPUTS, NUM_INPUTS)
    wait_for_previous(OVERLAPPED)

    if gain is not None:
        squares = tl.zeros([1, INPUTS], tl.float32)
        for begin in tl.static_range(0, NUM_INPUTS, INPUTS):
            x = _load_inputs(row + inputs, inputs, begin, INPUTS, NUM_INPUTS).to(tl.float32)
            squares += x * x
        scale = tl.rsqrt(tl.sum(squares, 1) / NUM_INPUTS + eps)[:, None]
    # A lane loads 8 inputs at a time: it sums these by itself.
    sums = tl.zeros([OUTPUTS, INPUTS // 8], tl.float32)
    up_sums = tl.zeros([OUTPUTS, INPUTS // 8], tl.float32)
    for begin in tl.static_range(0, NUM_INPUTS, INPUTS):
        w_now = w
        if begin + INPUTS < NUM_INPUTS:
            w = _load_weights(cells, inputs, begin + INPUTS, INPUTS, NUM_INPUTS)
        if GATED:
            u_now = u
            if begin + INPUTS < NUM_INPUTS:
                u = _load_weights(up_cells, inputs, begin + INPUTS, INPUTS, NUM_INPUTS)
        x = _load_inputs(row + inputs, inputs, begin, INPUTS, NUM_INPUTS)
        if gain is not None:
            x = _normalize(x, scale, g)
            if begin + INPUTS < NUM_INPUTS:
                g = _load_inputs(gain + inputs, inputs, begin + INPUTS, INPUTS, NUM_INPUTS)
        x = x.to(tl.float32)
        sums += _sum_products(x, w_now, OUTPUTS, INPUTS)
        if GATED:
            up_sums += _sum_products(x, u_now, OUTPUTS, INPUTS)
    _finish(
        _scaled(tl.sum(sums, 1), scales, output, num_outputs),
        _scaled(tl.sum(up_sums, 1), scales, output + num_outputs, num_outputs * (1 + GATED)),
        bias,
        residual,
        out,
        output,
        num_outputs,
        GATED,
    )
