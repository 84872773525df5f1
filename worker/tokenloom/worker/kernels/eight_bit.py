"""Matrices of 8 bits: one row as it is, several as whole numbers on the matrix unit.

One row is multiplied by `linear`'s lanes, which widen the weights. Several are quantized,
each by its largest number, and multiplied without widening anything:

    rows ─ norm ─ quantize ─▶ codes, scales ─▶ multiply ─▶ * row's scale * output's scale, + bias
                                                           silu(gate) * up, or + residual

A number of a row becomes one byte, as bitsandbytes has it, or two: 256 * first + second. The
second costs a line more on the matrix unit, which has little to do while few rows wait for
weights, and what it keeps is more than bfloat16 does. Products and sums of codes are whole and
exact, so a row's result depends on nothing but the row and the bytes of its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tokenloom.worker.kernels.linear import Cut, multiply
from tokenloom.worker.kernels.overlap import let_next_start, overlaps, real, wait_for_previous
from tokenloom.worker.weights.linears import EightBitLinear

_MAX_TWO_BYTE_ROWS = 32
"""Whose numbers are of two bytes"""
_NUM_PROGRAMS = 128
"""That a kernel for one row has at least, if it can: about one a multiprocessor"""
_GROUP = 8
"""Tiles of rows that share a tile of weights in the cache"""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program computes, and how it goes through the inputs."""

    num_lines: int
    """Of codes: one a row and byte"""
    num_outputs: int
    """With gate and up, half of each"""
    num_inputs: int
    num_stages: int
    num_warps: int
    outputs_left: bool
    """Whether they are the unit's left side, of which it takes 64 at a time"""

    @property
    def stage_bytes(self) -> int:
        """Shared memory that a stage takes."""
        return (self.num_lines + self.num_outputs) * self.num_inputs


def _tile(lines: int, outputs: int, inputs: int, stages: int, *, outputs_left: bool) -> Tile:
    return Tile(
        num_lines=lines,
        num_outputs=outputs,
        num_inputs=inputs,
        num_stages=stages,
        num_warps=4,
        outputs_left=outputs_left,
    )


_FEW_LINES = (
    _tile(16, 64, 512, 3, outputs_left=True),
    _tile(32, 64, 256, 4, outputs_left=True),
    _tile(64, 64, 256, 4, outputs_left=True),
)
_SMALL = _tile(128, 64, 128, 5, outputs_left=True)
_LARGE = _tile(128, 128, 128, 3, outputs_left=False)


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Rows of whole numbers, each row scaled by one number."""

    codes: Tensor
    """int8 [num_rows, bytes of a number, num_inputs]"""
    scales: Tensor
    """float32 [num_rows]"""


def multiply_eight_bit(
    rows: Tensor,
    linear: EightBitLinear,
    out: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Multiplies [num_rows, num_inputs] rows with a matrix and returns [num_rows, num_outputs] out.

    One row is not quantized; up to 32 become numbers of two bytes, more of one. To widen weights
    for several rows, by lanes or for the matrix unit's floats, was slower from two rows on.

    Args:
        rows: Of one float type, as norm, residual and out.
        linear: The matrix; with `gated` [2 * num_outputs, num_inputs].
        out: Where the result goes. It may be the residual.
        norm: Weight [num_inputs] and eps of a norm of the rows, if they are to be normalized.
        residual: [num_rows, num_outputs] that the result is added to.
        gated: Whether the result is silu(gate) * up of what is multiplied.
    """
    if len(rows) == 0:
        return out
    if len(rows) == 1:
        cut = choose_cut(linear, gated=gated)
        return multiply(cut, rows, linear, out, norm=norm, residual=residual, gated=gated)
    num_bytes = 2 if len(rows) <= _MAX_TWO_BYTE_ROWS else 1
    tile = choose_tile(len(rows) * num_bytes, len(linear.codes), _num_processors(rows.device))
    quantized = quantize(rows, num_bytes, norm)
    return multiply_codes(tile, quantized, linear, out, residual=residual, gated=gated)


def choose_cut(linear: EightBitLinear, *, gated: bool = False) -> Cut:
    """Returns what a program takes of a matrix for one row.

    Measured on an H200, microseconds of a Llama-3-8B layer's four matrices: 71.0 with 2,048
    inputs at a time everywhere, 66.0 with the best of 37 cuts for each.
    """
    num_outputs, num_inputs = linear.shape
    num_matrices = 2 if gated else 1
    at_once = 4096 if gated and num_inputs % 4096 == 0 else 1024
    per_program = 4
    while per_program > 1 and num_outputs < per_program * num_matrices * _NUM_PROGRAMS:
        per_program //= 2
    return Cut(num_outputs=per_program, num_inputs=at_once, num_warps=4)


def choose_tile(num_lines: int, num_outputs: int, num_processors: int) -> Tile:
    """Returns the tile for so many lines of codes and, gate and up together, outputs.

    Few lines are one tile: each weight is read once. Of more, small tiles while there is a
    multiprocessor for each, else large ones, of which two share a multiprocessor.
    """
    for tile in _FEW_LINES:
        if num_lines <= tile.num_lines:
            return tile
    num_tiles = triton.cdiv(num_lines, _SMALL.num_lines) * triton.cdiv(
        num_outputs, _SMALL.num_outputs
    )
    return _SMALL if num_tiles <= num_processors else _LARGE


def quantize(rows: Tensor, num_bytes: int, norm: tuple[Tensor, float] | None = None) -> Quantized:
    """Quantizes [num_rows, num_inputs] rows, or their norm by [num_inputs] weight and eps."""
    num_rows, size = rows.shape
    quantized = Quantized(
        codes=torch.empty((num_rows, num_bytes, size), dtype=torch.int8, device=rows.device),
        scales=torch.empty(num_rows, dtype=torch.float32, device=rows.device),
    )
    gain, eps = norm or (None, 0.0)
    columns = triton.next_power_of_2(size)
    overlapped = overlaps(rows.device)
    _quantize[(num_rows,)](
        rows,
        gain,
        quantized.codes,
        quantized.scales,
        size,
        eps,
        COLUMNS=columns,
        BYTES=num_bytes,
        OVERLAPPED=overlapped,
        num_warps=min(max(columns // 512, 1), 16),  # 16 numbers a thread, in 16-byte loads
        launch_pdl=overlapped,
    )
    return quantized


def multiply_codes(
    tile: Tile,
    rows: Quantized,
    linear: EightBitLinear,
    out: Tensor,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Multiplies what `quantize` returned by a tile of `choose_tile`.

    Others as in `multiply_eight_bit`.
    """
    num_rows, num_outputs = out.shape
    num_bytes, num_inputs = rows.codes.shape[1:]
    num_lines = num_rows * num_bytes
    num_matrices = 2 if gated else 1
    per_matrix = tile.num_outputs // num_matrices
    overlapped = overlaps(out.device)
    # From Hopper on the memory's own engine copies tiles, if lines start at whole 16 bytes.
    copied = overlapped and num_inputs % 16 == 0
    codes: Tensor | TensorDescriptor = rows.codes
    weight: Tensor | TensorDescriptor = linear.codes
    if copied:
        codes = TensorDescriptor(
            rows.codes, [num_lines, num_inputs], [num_inputs, 1], [tile.num_lines, tile.num_inputs]
        )
        weight = TensorDescriptor(
            linear.codes,
            [num_matrices, num_outputs, num_inputs],
            [num_outputs * num_inputs, num_inputs, 1],
            [num_matrices, per_matrix, tile.num_inputs],
        )
    grid = (triton.cdiv(num_lines, tile.num_lines) * triton.cdiv(num_outputs, per_matrix),)
    _multiply_codes[grid](
        codes,
        rows.scales,
        weight,
        linear.scales,
        linear.bias,
        residual,
        out,
        num_rows,
        num_outputs,
        num_inputs,
        LINES=tile.num_lines,
        OUTPUTS=tile.num_outputs,
        INPUTS=tile.num_inputs,
        STAGES=min(tile.num_stages, _shared_bytes(out.device) // tile.stage_bytes),
        BYTES=num_bytes,
        OUTPUTS_LEFT=tile.outputs_left,
        COPIED=copied,
        GATED=gated,
        GROUP=_GROUP,
        OVERLAPPED=overlapped,
        num_warps=tile.num_warps,
        launch_pdl=overlapped,
    )
    return out


@cache
def _num_processors(device: torch.device) -> int:
    device = real(device)
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _shared_bytes(device: torch.device) -> int:
    """Returns what a program may have of a multiprocessor's own memory, less what is not tiles."""
    device = real(device)
    if device.type != "cuda":
        return 64 * 1024
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) - 2048  # type: ignore[attr-defined]


@triton.jit
def _quantize(
    rows: tl.tensor,
    gain: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    size: int,
    eps: float,
    COLUMNS: tl.constexpr,
    BYTES: tl.constexpr,
    OVERLAPPED: tl.constexpr,
) -> None:
    """A program a row."""
    let_next_start(OVERLAPPED)
    columns = tl.arange(0, COLUMNS)
    inside = columns < size
    if gain is not None:
        g = tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAPPED)
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(rows + row * size + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    if gain is not None:
        scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
        wide = ((wide * scale).to(x.dtype).to(tl.float32) * g).to(x.dtype).to(tl.float32)
    # As whole numbers the bits of positive floats are in order, infinity and NaN last: a faulty
    # row's scale is faulty, and so is all that it is multiplied with.
    bits = tl.max(wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    largest = bits.to(tl.float32, bitcast=True)
    largest_code: tl.constexpr = 127 if BYTES == 1 else 127 * 256 + 127
    # Added to 1.5 * 2**23 a number is rounded to a whole one, halves to even.
    to_codes = largest_code / tl.where(largest == 0.0, 1.0, largest)
    code = (wide * to_codes + 12582912.0 - 12582912.0).to(tl.int32)
    cells = codes + row * BYTES * size + columns
    if BYTES == 1:
        tl.store(cells, code.to(tl.int8), mask=inside)
    else:
        first = (code + 128) >> 8
        tl.store(cells, first.to(tl.int8), mask=inside)
        tl.store(cells + size, (code - first * 256).to(tl.int8), mask=inside)
    tl.store(scales + row, largest / largest_code)


@triton.jit(do_not_specialize=["num_rows"])
def _multiply_codes(
    rows: tl.tensor,
    row_scales: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    LINES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    BYTES: tl.constexpr,
    OUTPUTS_LEFT: tl.constexpr,
    COPIED: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    OVERLAPPED: tl.constexpr,
) -> None:
    """A program a tile; programs in a row share what they read in the cache.

    Rows and weight are descriptors, if they are to be copied, else plain pointers.
    """
    let_next_start(OVERLAPPED)
    wait_for_previous(OVERLAPPED)
    ROWS: tl.constexpr = LINES // BYTES
    half: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    tile = tl.program_id(0)
    num_row_tiles = tl.cdiv(num_rows, ROWS)
    per_group = GROUP * tl.cdiv(num_outputs, half)
    first = tile // per_group * GROUP
    in_group = tl.minimum(num_row_tiles - first, GROUP)
    row_begin = (first + tile % per_group % in_group) * ROWS
    begin = tile % per_group // in_group * half

    sums = tl.zeros([OUTPUTS, LINES] if OUTPUTS_LEFT else [LINES, OUTPUTS], tl.int32)
    if not COPIED:
        # What is past the end is the last again: nothing is written for it.
        line = row_begin * BYTES + tl.arange(0, LINES)
        line = tl.minimum(line, num_rows * BYTES - 1).to(tl.int64)
        matrix = tl.arange(0, OUTPUTS) // half * num_outputs
        place = tl.minimum(begin + tl.arange(0, OUTPUTS) % half, num_outputs - 1)
        inputs = tl.arange(0, INPUTS)[None, :]
        row_cells = rows + line[:, None] * num_inputs + inputs
        cells = weight + (matrix + place).to(tl.int64)[:, None] * num_inputs + inputs
    for step in tl.range(0, tl.cdiv(num_inputs, INPUTS), num_stages=STAGES):
        input_begin = step * INPUTS
        if COPIED:
            x = rows.load([row_begin * BYTES, input_begin])
            w = tl.reshape(weight.load([0, begin, input_begin]), [OUTPUTS, INPUTS])
        else:
            inside = inputs < num_inputs - input_begin
            x = tl.load(row_cells + input_begin, mask=inside, other=0)
            w = tl.load(cells + input_begin, mask=inside, other=0)
        if OUTPUTS_LEFT:
            sums = tl.dot(w, x.T, sums, out_dtype=tl.int32)
        else:
            sums = tl.dot(x, w.T, sums, out_dtype=tl.int32)
    _finish(
        (tl.trans(sums) if OUTPUTS_LEFT else sums).to(tl.float32),
        row_scales,
        scales,
        bias,
        residual,
        out,
        row_begin + tl.arange(0, ROWS),
        begin + tl.arange(0, half),
        num_rows,
        num_outputs,
        BYTES,
        GATED,
    )


@triton.jit
def _finish(
    total: tl.tensor,
    row_scales: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    row: tl.tensor,
    output: tl.tensor,
    num_rows: int,
    num_outputs: int,
    BYTES: tl.constexpr,
    GATED: tl.constexpr,
) -> None:
    """Writes what comes of [LINES, OUTPUTS] sums, given the rows and the outputs they are of."""
    ROWS: tl.constexpr = row.shape[0]
    half: tl.constexpr = output.shape[0]
    if BYTES == 2:
        upper, lower = tl.split(tl.permute(tl.reshape(total, [ROWS, 2, total.shape[1]]), [0, 2, 1]))
        total = upper * 256.0 + lower

    dtype: tl.constexpr = out.dtype.element_ty
    there = output < num_outputs
    total *= tl.load(row_scales + row, mask=row < num_rows, other=0.0)[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(total, [ROWS, 2, half]), [0, 2, 1]))
        gate = _scale(gate, scales, bias, output, there).to(dtype).to(tl.float32)
        up_bias = None if bias is None else bias + num_outputs
        up = _scale(up, scales + num_outputs, up_bias, output, there).to(dtype).to(tl.float32)
        result = ((gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32) * up).to(dtype)
    else:
        result = _scale(total, scales, bias, output, there).to(dtype)
    results = row.to(tl.int64)[:, None] * num_outputs + output[None, :]
    wanted = (row < num_rows)[:, None] & there[None, :]
    if residual is not None:
        before = tl.load(residual + results, mask=wanted, other=0.0).to(tl.float32)
        result = (before + result.to(tl.float32)).to(dtype)
    tl.store(out + results, result, mask=wanted)


@triton.jit
def _scale(
    total: tl.tensor, scales: tl.tensor, bias: tl.tensor, output: tl.tensor, there: tl.tensor
) -> tl.tensor:
    total *= tl.load(scales + output, mask=there, other=0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)[None, :]
    return total
