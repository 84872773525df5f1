"""Matrices times few rows, with what comes before and after, as one Triton kernel.

Decoding a few requests reads every weight and computes next to nothing with it. Two
kernels read them as fast as the memory gives them:

- `_multiply_by_lanes`: each lane multiplies what it loaded and sums by itself; the sums
  meet at the end. It reads faster than the dense library, but its time grows with each row.
  Weights may be whole numbers of 8 bits, widened on the way.
- `_multiply_by_tiles`: the matrix unit multiplies. A warp's plain 16-byte loads are its
  operand as they stand, since inputs are numbered in the order in which lanes load them:

      of 32 inputs, lane t of a quad loads 8 t … 8 t + 7; the unit is told that these are
      2 t, 2 t + 1, 2 t + 8, 2 t + 9 of its first 16 inputs, and the same of its second 16

  Weights and rows are numbered alike, so a sum has the same terms, and nothing moves
  between lanes.

Both load their first weights before they wait for the kernel ahead (`overlap`), and
both compute a row the same way whatever the others hold. They sum in float32 and round
where the twin rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from tokenloom.worker.kernels.overlap import let_next_start, overlaps, wait_for_previous
from tokenloom.worker.linears import DenseLinear, EightBitLinear

_MAX_ROWS = 16
_MAX_SHARED_BYTES = 16 * 1024**2
"""Of a matrix for several rows"""
_LANE_BYTES = 16 * 1024
"""Of weights that a program has under way"""
_TILE_INPUTS = 1024
_NUM_PROGRAMS = 128
"""That a kernel has at least, if it can: about one a multiprocessor"""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What a program takes of a matrix: some outputs, and so many inputs at a time."""

    matrix_unit: bool
    num_outputs: int
    num_inputs: int
    num_warps: int


def choose_cut(num_rows: int, linear: DenseLinear, *, gated: bool = False) -> Cut | None:
    """Returns how our kernels multiply so many rows with a matrix; None: the library does.

    With `gated`, the matrix is gate and up. Measured on an H200 in bfloat16, microseconds
    of a layer without attention, the library's matmuls and four more kernels beside four
    of ours:

        rows                       1            4            8            16
        Llama-3.1-8B    124.2 → 110.5  124.7 → 138  125.4 → 148  126.2 → 181
        Qwen3-0.6B        33.6 → 14.5  33.6 → 21.5  27.0 → 22.7  27.6 → 27.3

    So one row is ours always. With more, the library reads large matrices as fast as the
    memory gives them; small ones are a matter of launches and waits, where one kernel
    instead of two or three pays.
    """
    num_outputs, num_inputs = linear.weight.shape
    small = linear.weight.nbytes <= _MAX_SHARED_BYTES
    if linear.weight.dtype.itemsize != 2 or not 1 <= num_rows <= (_MAX_ROWS if small else 1):
        return None
    num_matrices = 2 if gated else 1
    num_outputs //= num_matrices
    if num_rows > 1:
        wide = num_outputs >= 16 * _NUM_PROGRAMS
        return Cut(
            matrix_unit=True,
            num_outputs=16 // num_matrices if wide else 8,
            num_inputs=_TILE_INPUTS,
            num_warps=4 if wide else 8,
        )
    sizes = (4096, 2048, 1024)[num_matrices - 1 :]
    at_once = next((size for size in sizes if num_inputs % size == 0), 1024)
    per_program = _LANE_BYTES // (2 * num_matrices * at_once)
    while per_program > 1 and num_outputs < per_program * _NUM_PROGRAMS:
        per_program //= 2
    return Cut(
        matrix_unit=False,
        num_outputs=per_program,
        num_inputs=at_once,
        num_warps=min(at_once // 256, 8),
    )


def _parts(linear: DenseLinear | EightBitLinear) -> tuple[Tensor, Tensor | None]:
    """Returns what rows are multiplied with, and what each output is then scaled by."""
    if isinstance(linear, DenseLinear):
        return linear.weight, None
    return linear.codes, linear.scales


def multiply(
    cut: Cut,
    rows: Tensor,
    linear: DenseLinear | EightBitLinear,
    out: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Multiplies [num_rows, num_inputs] rows with a matrix and returns [num_rows, num_outputs] out.

    Args:
        cut: By `choose_cut`.
        rows: Of float16 or bfloat16, as all tensors here.
        linear: The matrix; with `gated` [2 * num_outputs, num_inputs].
        out: Where the result goes. It may be the residual.
        norm: Weight [num_inputs] and eps of a norm of the rows, if they are to be normalized.
        residual: [num_rows, num_outputs] that the result is added to.
        gated: Whether the result is silu(gate) * up of what is multiplied.
    """
    num_rows, num_outputs = out.shape
    gain, eps = norm or (None, 0.0)
    weight, scales = _parts(linear)
    overlapped = overlaps(rows.device)
    kernel = _multiply_by_tiles if cut.matrix_unit else _multiply_by_lanes
    kernel[(triton.cdiv(num_outputs, cut.num_outputs),)](
        rows,
        weight,
        scales,
        linear.bias,
        gain,
        residual,
        out,
        num_rows,
        num_outputs,
        eps,
        NUM_INPUTS=weight.shape[1],
        ROWS=triton.next_power_of_2(max(num_rows, 8 if cut.matrix_unit else 1)),
        OUTPUTS=cut.num_outputs,
        INPUTS=cut.num_inputs,
        WARPS=cut.num_warps,
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
def _load_gain(
    gain: tl.tensor, inputs: tl.tensor, begin: tl.constexpr, TILE: tl.constexpr, END: tl.constexpr
) -> tl.tensor:
    if begin + TILE <= END:
        return tl.load(gain + begin + inputs)
    return tl.load(gain + begin + inputs, mask=begin + inputs < END, other=0.0)


@triton.jit
def _load_rows(
    cells: tl.tensor,
    inside: tl.tensor,
    inputs: tl.tensor,
    begin: tl.constexpr,
    TILE: tl.constexpr,
    END: tl.constexpr,
) -> tl.tensor:
    if begin + TILE > END:
        inside = inside & (begin + inputs < END)
    return tl.load(cells + begin, mask=inside, other=0.0)


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
    row: tl.tensor,
    output: tl.tensor,
    num_rows: int,
    num_outputs: int,
    GATED: tl.constexpr,
) -> None:
    """Writes sums of any shape, given each one's row and output."""
    dtype: tl.constexpr = out.dtype.element_ty
    there = output < num_outputs
    inside = (row < num_rows) & there
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
    cells = row.to(tl.int64) * num_outputs + output
    if residual is not None:
        before = tl.load(residual + cells, mask=inside, other=0.0).to(tl.float32)
        result = (before + result.to(tl.float32)).to(dtype)
    tl.store(out + cells, result, mask=inside)


@triton.jit
def _sum_products(
    x: tl.tensor,
    weights: tl.tensor,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
) -> tl.tensor:
    """Returns [ROWS, OUTPUTS, INPUTS / 8] sums of eight products each.

    A code is not converted: 2**15 of the bits of 384.0 stand for 1, so a code in its
    place, added to them, makes 384 + code. What that is too much comes off the sum.
    """
    if weights.dtype == tl.int8:
        bits = (weights.to(tl.int32) << 15) + 0x43C00000
        products = x * bits.to(tl.float32, bitcast=True)
    else:
        products = x * weights.to(tl.float32)
    sums = tl.sum(tl.reshape(products, [ROWS, OUTPUTS, INPUTS // 8, 8]), 3)
    if weights.dtype == tl.int8:
        sums -= 384.0 * tl.sum(tl.reshape(x, [ROWS, 1, INPUTS // 8, 8]), 3)
    return sums


@triton.jit
def _scaled(total: tl.tensor, scales: tl.tensor, line: tl.tensor, num_lines: int) -> tl.tensor:
    """Returns [ROWS, OUTPUTS] sums in the scales of their lines of the matrix, if it has any."""
    if scales is not None:
        total *= tl.load(scales + line, mask=line < num_lines, other=0.0)[None, :]
    return total


@triton.jit(do_not_specialize=["num_rows"])
def _multiply_by_lanes(
    rows: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    gain: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    num_rows: int,
    num_outputs: int,
    eps: float,
    NUM_INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    WARPS: tl.constexpr,  # noqa: ARG001  one signature for both kernels
    GATED: tl.constexpr,
    OVERLAPPED: tl.constexpr,
) -> None:
    """A program some outputs of all rows; tiles are [ROWS, OUTPUTS, INPUTS]."""
    let_next_start(OVERLAPPED)
    row = tl.arange(0, ROWS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    # No lane loads more than 8 in a row, however narrow weights are.
    inputs = tl.max_contiguous(tl.arange(0, INPUTS), 8)[None, None, :]
    # Outputs past the end are the last one again: nothing is written for them.
    line = tl.minimum(output, num_outputs - 1).to(tl.int64)[None, :, None]
    cells = weight + line * NUM_INPUTS + inputs
    up_cells = cells + tl.cast(num_outputs, tl.int64) * NUM_INPUTS
    w = _load_weights(cells, inputs, 0, INPUTS, NUM_INPUTS)
    if GATED:
        u = _load_weights(up_cells, inputs, 0, INPUTS, NUM_INPUTS)
    if gain is not None:
        g = _load_gain(gain, inputs, 0, INPUTS, NUM_INPUTS)
    wait_for_previous(OVERLAPPED)

    inside = (row < num_rows)[:, None, None]
    row_cells = rows + row[:, None, None] * NUM_INPUTS + inputs
    if gain is not None:
        squares = tl.zeros([ROWS, 1, INPUTS], tl.float32)
        for begin in tl.static_range(0, NUM_INPUTS, INPUTS):
            x = _load_rows(row_cells, inside, inputs, begin, INPUTS, NUM_INPUTS).to(tl.float32)
            squares += x * x
        scale = tl.rsqrt(tl.sum(squares, 2) / NUM_INPUTS + eps)[:, :, None]
    # A lane loads 8 inputs at a time: it sums these by itself.
    sums = tl.zeros([ROWS, OUTPUTS, INPUTS // 8], tl.float32)
    up_sums = tl.zeros([ROWS, OUTPUTS, INPUTS // 8], tl.float32)
    for begin in tl.static_range(0, NUM_INPUTS, INPUTS):
        w_now = w
        if begin + INPUTS < NUM_INPUTS:
            w = _load_weights(cells, inputs, begin + INPUTS, INPUTS, NUM_INPUTS)
        if GATED:
            u_now = u
            if begin + INPUTS < NUM_INPUTS:
                u = _load_weights(up_cells, inputs, begin + INPUTS, INPUTS, NUM_INPUTS)
        x = _load_rows(row_cells, inside, inputs, begin, INPUTS, NUM_INPUTS)
        if gain is not None:
            x = _normalize(x, scale, g)
            if begin + INPUTS < NUM_INPUTS:
                g = _load_gain(gain, inputs, begin + INPUTS, INPUTS, NUM_INPUTS)
        sums += _sum_products(x.to(tl.float32), w_now, ROWS, OUTPUTS, INPUTS)
        if GATED:
            up_sums += _sum_products(x.to(tl.float32), u_now, ROWS, OUTPUTS, INPUTS)
    _finish(
        _scaled(tl.sum(sums, 2), scales, output, num_outputs),
        _scaled(tl.sum(up_sums, 2), scales, output + num_outputs, num_outputs * (1 + GATED)),
        bias,
        residual,
        out,
        row[:, None],
        output[None, :],
        num_rows,
        num_outputs,
        GATED,
    )


@triton.jit
def _as_operand(
    tile: tl.tensor, LINES: tl.constexpr, INPUTS: tl.constexpr, WARPS: tl.constexpr
) -> tl.tensor:
    """Turns [8, INPUTS / 32, LINES / 8, 32] into [WARPS, LINES, INPUTS / WARPS].

    Each warp has its share of the inputs. Of 32 that lie together, the quad's lane t has
    8 t + 4 s + 2 h + i and the unit takes them as 16 s + 8 h + 2 t + i.
    """
    steps: tl.constexpr = INPUTS // (32 * WARPS)
    # By line % 8, step, warp, line // 8, t, s, h, i.
    cut = tl.reshape(tile, [8, steps, WARPS, LINES // 8, 4, 2, 2, 2])
    turned = tl.permute(cut, [2, 3, 0, 1, 5, 6, 4, 7])
    return tl.reshape(turned, [WARPS, LINES, steps * 32])


@triton.jit(do_not_specialize=["num_rows"])
def _multiply_by_tiles(
    rows: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,  # noqa: ARG001  one signature for both kernels
    bias: tl.tensor,
    gain: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    num_rows: int,
    num_outputs: int,
    eps: float,
    NUM_INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    WARPS: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAPPED: tl.constexpr,
) -> None:
    """A program some outputs of all rows; tiles are [8, INPUTS / 32, lines / 8, 32]."""
    let_next_start(OVERLAPPED)
    eighth = tl.arange(0, 8)[:, None, None, None]
    inputs = tl.arange(0, INPUTS // 32)[None, :, None, None] * 32
    inputs += tl.arange(0, 32)[None, None, None, :]
    first = tl.program_id(0) * OUTPUTS
    line = first + tl.arange(0, OUTPUTS // 8)[None, None, :, None] * 8 + eighth
    # Outputs past the end are the last one again: nothing is written for them.
    cells = weight + tl.minimum(line, num_outputs - 1).to(tl.int64) * NUM_INPUTS + inputs
    up_cells = cells + tl.cast(num_outputs, tl.int64) * NUM_INPUTS
    w = _load_weights(cells, inputs, 0, INPUTS, NUM_INPUTS)
    if GATED:
        u = _load_weights(up_cells, inputs, 0, INPUTS, NUM_INPUTS)
    if gain is not None:
        g = _load_gain(gain, inputs, 0, INPUTS, NUM_INPUTS)
    wait_for_previous(OVERLAPPED)

    row = tl.arange(0, ROWS // 8)[None, None, :, None] * 8 + eighth
    inside = row < num_rows
    row_cells = rows + row * NUM_INPUTS + inputs
    if gain is not None:
        squares = tl.zeros([8, INPUTS // 32, ROWS // 8, 32], tl.float32)
        for begin in tl.static_range(0, NUM_INPUTS, INPUTS):
            x = _load_rows(row_cells, inside, inputs, begin, INPUTS, NUM_INPUTS).to(tl.float32)
            squares += x * x
        mean = tl.sum(tl.sum(squares, 3), 1) / NUM_INPUTS
        scale = tl.rsqrt(mean + eps)[:, None, :, None]
    sums = tl.zeros([WARPS, OUTPUTS, ROWS], tl.float32)
    up_sums = tl.zeros([WARPS, OUTPUTS, ROWS], tl.float32)
    for begin in tl.static_range(0, NUM_INPUTS, INPUTS):
        left = _as_operand(w, OUTPUTS, INPUTS, WARPS)
        if begin + INPUTS < NUM_INPUTS:
            w = _load_weights(cells, inputs, begin + INPUTS, INPUTS, NUM_INPUTS)
        if GATED:
            up_left = _as_operand(u, OUTPUTS, INPUTS, WARPS)
            if begin + INPUTS < NUM_INPUTS:
                u = _load_weights(up_cells, inputs, begin + INPUTS, INPUTS, NUM_INPUTS)
        x = _load_rows(row_cells, inside, inputs, begin, INPUTS, NUM_INPUTS)
        if gain is not None:
            x = _normalize(x, scale, g)
            if begin + INPUTS < NUM_INPUTS:
                g = _load_gain(gain, inputs, begin + INPUTS, INPUTS, NUM_INPUTS)
        right = tl.permute(_as_operand(x, ROWS, INPUTS, WARPS), [0, 2, 1])
        sums = tl.dot(left, right, sums)
        if GATED:
            up_sums = tl.dot(up_left, right, up_sums)
    _finish(
        tl.sum(sums, 0),
        tl.sum(up_sums, 0),
        bias,
        residual,
        out,
        tl.arange(0, ROWS)[None, :],
        first + tl.arange(0, OUTPUTS)[:, None],
        num_rows,
        num_outputs,
        GATED,
    )
