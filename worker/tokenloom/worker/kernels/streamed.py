"""Matrices times 2 to 128 rows, read at the memory's speed, in Gluon for Hopper.

The copy engine brings tiles of weights and rows to shared memory, several steps ahead,
and the matrix unit multiplies them there:

    program (tile, split)   64 or 128 lines of the matrix × all rows, over a share of the inputs

      stage 0   ├ weights ┤ · · · wait for the kernel before ├ rows ┤ multiply ├ weights, rows …
      stage 1   ├ weights ┤ · · ·                            ├ rows ┤          multiply ├ …
      stage 2   ├ weights ┤ · · ·                            ├ rows ┤                   multiply

A program takes half of a multiprocessor's shared memory, so that the next kernel's programs
find room and bring their first weights while this one's last are on the way. Matrices with
too few lines to keep the memory busy are split by inputs; then the sums of each split are
left for whoever normalizes next to add, in the order of the splits.

Gate and up are taken 8 lines of one and 8 of the other in turn, so that a lane has
both sums of an output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenloom.worker.kernels.overlap import generation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenloom.worker.weights.linears import DenseLinear

_HOPPER = 9
"""Alone multiplies with `wgmma`"""
_MAX_ROWS = 128
_MAX_LARGE_ROWS = 64
_SMALL_BYTES = 16 * 1024**2
"""That a matrix has at most, if it is not large"""
_PROGRAM_BYTES = 112 * 1024
"""Of shared memory: half a multiprocessor's"""
_NUM_MULTIPROCESSORS = 132
_NUM_PROGRAMS = 192
"""That a kernel has at least, if its matrix can be split into so many"""
_MIN_SPLIT_INPUTS = 256
_TURN_LINES = 8
"""Of gate, before as many of up"""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """What a program takes of a matrix and its rows."""

    num_rows: int
    """Room for rows: a power of two from 8 to 128"""
    num_lines: int
    """Of the matrix: outputs, or gates and ups"""
    num_inputs: int
    """In a step"""
    num_stages: int
    """Steps whose weights and rows are under way or in use"""
    num_splits: int
    """Programs that share a line's inputs"""


def choose_tiling(
    num_rows: int, linear: DenseLinear, *, gated: bool = False, in_parts: bool = False
) -> Tiling | None:
    """Returns how this kernel multiplies so many rows with a matrix; None: it does not.

    With `gated`, the matrix is gate and up; with `in_parts`, partial sums will do. Measured on
    an H200 in bfloat16, microseconds of a layer without attention, the dense library's
    matmuls with four more kernels beside this one with two:

        rows                    2           8          16          32          64
        Llama-3.1-8B    120 → 110   121 → 112   123 → 115   127 → 118   131 → 124
        Qwen3-0.6B    32.5 → 14.7   26 → 15.0   27 → 15.7   28 → 17.3   29 → 20.1

    Each program reads all rows, so more of them cost more than the weights. With small matrices
    launches still weigh more, up to 128 rows (96: 29.8 → 27.7, 128: 30.6 → 28.1); with large ones
    gate and up alone gain, and with a full tile of 128 (143.5 → 136.8; 96: 138.2 → 143.9).
    The library multiplies the others.

    The host takes 56 µs for a call, 14 for the library's. That counts where steps of so few rows
    are no CUDA graphs.
    """
    num_outputs, num_inputs = linear.shape
    most = _MAX_ROWS if linear.weight.nbytes <= _SMALL_BYTES else _MAX_LARGE_ROWS
    pays = 2 <= num_rows <= most or (gated and num_rows == _MAX_ROWS)
    fits = num_inputs % 8 == 0 and num_outputs % (2 * _TURN_LINES if gated else 1) == 0
    if not (pays and fits and linear.weight.dtype.itemsize == 2):
        return None
    if generation(linear.weight.device) != _HOPPER:
        return None
    return tile(num_rows, num_outputs, num_inputs, in_parts=in_parts)


def tile(num_rows: int, num_lines: int, num_inputs: int, *, in_parts: bool) -> Tiling:
    """Returns a program's share of [num_lines, num_inputs] and so many rows.

    How lines are split does not depend on the rows, nor do a row's sums on how many there are.
    """
    room = max(8, triton.next_power_of_2(num_rows))
    # More lines read the rows less often, if there are enough for all multiprocessors.
    lines = 128 if num_lines >= 128 * _NUM_MULTIPROCESSORS else 64
    inputs = 128 if room <= 64 else 64
    num_splits = 1
    if in_parts:
        num_tiles = triton.cdiv(num_lines, lines)
        while (
            num_tiles * num_splits < _NUM_PROGRAMS
            and num_inputs >= 2 * num_splits * _MIN_SPLIT_INPUTS
        ):
            num_splits *= 2
    return Tiling(
        num_rows=room,
        num_lines=lines,
        num_inputs=inputs,
        num_stages=_PROGRAM_BYTES // ((lines + room) * inputs * 2),
        num_splits=num_splits,
    )


def multiply_streamed(
    tiling: Tiling,
    rows: Tensor,
    linear: DenseLinear,
    out: Tensor | None = None,
    *,
    gated: bool = False,
) -> Tensor:
    """Multiplies rows with a matrix.

    Args:
        tiling: By `choose_tiling`.
        rows: [num_rows, num_inputs] of float16 or bfloat16, like the matrix.
        linear: The matrix; with `gated` [2 * num_outputs, num_inputs].
        out: [num_rows, num_outputs] where the result goes, if that matters.
        gated: Whether the result is silu(gate) * up of what is multiplied.

    Returns:
        [num_rows, num_outputs]; of more than one split float32 [num_splits, num_rows,
        num_outputs] partial sums.
    """
    num_rows, num_inputs = rows.shape
    num_outputs = linear.shape[0] // (2 if gated else 1)
    if tiling.num_splits > 1:
        shape = (tiling.num_splits, num_rows, num_outputs)
        out = torch.empty(shape, dtype=torch.float32, device=rows.device)
    elif out is None:
        out = rows.new_empty((num_rows, num_outputs))
    num_tiles = triton.cdiv(linear.shape[0], tiling.num_lines)
    _multiply_streamed[(num_tiles, tiling.num_splits)](
        describe_weight(linear.weight, tiling, gated=gated),
        _describe(rows, rows.shape, rows.stride(), (tiling.num_rows, tiling.num_inputs)),
        linear.bias,
        out,
        num_rows,
        num_outputs,
        triton.cdiv(num_inputs, tiling.num_inputs),
        STAGES=tiling.num_stages,
        TURN=_TURN_LINES if gated else 0,
        PARTS=tiling.num_splits > 1,
        num_warps=4,
        launch_pdl=True,
    )
    return out


def describe_weight(weight: Tensor, tiling: Tiling, *, gated: bool) -> TensorDescriptor:
    """Describes tiles of [lines, inputs], of gate and up [turns, 2, turn lines, inputs]."""
    lines, inputs = tiling.num_lines, tiling.num_inputs
    if not gated:
        return _describe(weight, weight.shape, weight.stride(), (lines, inputs))
    turned = weight.view(2, -1, _TURN_LINES, weight.shape[1]).transpose(0, 1)
    block = (lines // (2 * _TURN_LINES), 2, _TURN_LINES, inputs)
    return _describe(weight, turned.shape, turned.stride(), block)


def _describe(
    tensor: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]
) -> TensorDescriptor:
    """Tells the copy engine how a tensor lies; what a block has beyond the shape reads as zero."""
    layout = gl.NVMMASharedLayout(128, 16, len(block))
    return TensorDescriptor(tensor, list(shape), list(strides), list(block), layout)


@gluon.jit(do_not_specialize=["num_rows", "num_all_steps"])
def _multiply_streamed(
    weight: gl.tensor,
    rows: gl.tensor,
    bias: gl.tensor,
    out: gl.tensor,
    num_rows: int,
    num_outputs: int,
    num_all_steps: int,
    STAGES: gl.constexpr,
    TURN: gl.constexpr,
    PARTS: gl.constexpr,
) -> None:
    """A program a tile of lines and split of inputs; its sums are [lines, rows]."""
    ROWS: gl.constexpr = rows.block_shape[0]
    INPUTS: gl.constexpr = rows.block_shape[1]
    LINES: gl.constexpr = weight.block_shape[0] * (2 * TURN if TURN else 1)
    STEP_BYTES: gl.constexpr = (LINES + ROWS) * INPUTS * 2
    tile = gl.program_id(0)
    split = gl.program_id(1)
    begin = split * num_all_steps // gl.num_programs(1)
    num_steps = (split + 1) * num_all_steps // gl.num_programs(1) - begin

    tiles: gl.constexpr = [STAGES] + weight.block_shape  # noqa: RUF005  no star is compiled
    w = gl.allocate_shared_memory(weight.dtype, tiles, weight.layout)
    x = gl.allocate_shared_memory(rows.dtype, [STAGES, ROWS, INPUTS], rows.layout)
    landed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(landed.index(stage), count=1)
    for stage in gl.static_range(STAGES):
        asked = stage < num_steps
        mbarrier.expect(landed.index(stage), STEP_BYTES, asked)
        _fetch_weights(weight, tile, begin + stage, landed.index(stage), w.index(stage), asked)
    sums = _first_sums(bias, tile, split, num_outputs, ROWS, LINES, TURN)
    gdc_launch_dependents()

    gdc_wait()
    for stage in gl.static_range(STAGES):
        asked = stage < num_steps
        _fetch_rows(rows, begin + stage, landed.index(stage), x.index(stage), asked)
    for step in range(num_steps):
        slot = step % STAGES
        barrier = landed.index(slot)
        mbarrier.wait(barrier, step // STAGES & 1)
        left = w.index(slot)
        if TURN:
            left = left.reshape([LINES, INPUTS])
        sums = warpgroup_mma(left, x.index(slot).permute((1, 0)), sums, is_async=True)
        sums = warpgroup_mma_wait(num_outstanding=0, deps=(sums,))
        following = step + STAGES
        more = following < num_steps
        mbarrier.expect(barrier, STEP_BYTES, more)
        _fetch_weights(weight, tile, begin + following, barrier, w.index(slot), more)
        _fetch_rows(rows, begin + following, barrier, x.index(slot), more)
    if PARTS:
        out += split.to(gl.int64) * num_rows * num_outputs
    _write(sums, out, tile, num_rows, num_outputs, TURN)


@gluon.jit
def _fetch_weights(
    weight: gl.tensor,
    tile: gl.tensor,
    step: gl.tensor,
    barrier: gl.tensor,
    buffer: gl.tensor,
    asked: gl.tensor,
) -> None:
    first = tile * weight.block_shape[0]
    if len(weight.block_shape) == 4:
        cell = [first, 0, 0, step * weight.block_shape[3]]
        tma.async_copy_global_to_shared(weight, cell, barrier, buffer, asked)
    else:
        cell = [first, step * weight.block_shape[1]]
        tma.async_copy_global_to_shared(weight, cell, barrier, buffer, asked)


@gluon.jit
def _fetch_rows(
    rows: gl.tensor, step: gl.tensor, barrier: gl.tensor, buffer: gl.tensor, asked: gl.tensor
) -> None:
    cell = [0, step * rows.block_shape[1]]
    tma.async_copy_global_to_shared(rows, cell, barrier, buffer, asked)


@gluon.jit
def _first_sums(
    bias: gl.tensor,
    tile: gl.tensor,
    split: gl.tensor,
    num_outputs: int,
    ROWS: gl.constexpr,
    LINES: gl.constexpr,
    TURN: gl.constexpr,
) -> gl.tensor:
    """Returns the bias, if there is one, in the first split; else zeros."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    sums = gl.zeros([LINES, ROWS], gl.float32, layout)
    if bias is not None:
        line = gl.arange(0, LINES, gl.SliceLayout(1, layout))
        if TURN:
            output = tile * (LINES // 2) + line // (2 * TURN) * TURN + line % TURN
            place = output + line // TURN % 2 * num_outputs
        else:
            output = tile * LINES + line
            place = output
        once = (output < num_outputs) & (split == 0)
        sums += gl.load(bias + place, mask=once, other=0.0).to(gl.float32)[:, None]
    return sums


@gluon.jit
def _write(
    sums: gl.tensor,
    out: gl.tensor,
    tile: gl.tensor,
    num_rows: int,
    num_outputs: int,
    TURN: gl.constexpr,
) -> None:
    """Writes [lines, rows] sums, of gate and up their product, in the type of `out`."""
    dtype: gl.constexpr = out.dtype.element_ty
    LINES: gl.constexpr = sums.shape[0]
    ROWS: gl.constexpr = sums.shape[1]
    OUTPUTS: gl.constexpr = LINES // 2 if TURN else LINES
    if TURN:
        pairs = gl.permute(gl.reshape(sums, [LINES // (2 * TURN), 2, TURN, ROWS]), [0, 2, 3, 1])
        gate, up = gl.split(pairs)
        gate = gate.to(dtype).to(gl.float32)
        activated = (gate / (1 + gl.exp(-gate))).to(dtype).to(gl.float32)
        product = (activated * up.to(dtype).to(gl.float32)).to(dtype)
        result = gl.reshape(product, [OUTPUTS, ROWS])
    else:
        result = sums.to(dtype)
    VECTOR: gl.constexpr = 128 // dtype.primitive_bitwidth
    ACROSS: gl.constexpr = min(OUTPUTS // VECTOR, 32)
    layout: gl.constexpr = gl.BlockedLayout([VECTOR, 1], [ACROSS, 32 // ACROSS], [1, 4], [0, 1])
    output = tile * OUTPUTS + gl.arange(0, OUTPUTS, gl.SliceLayout(1, layout))
    row = gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    inside = (output < num_outputs)[:, None] & (row < num_rows)[None, :]
    cells = row[None, :] * num_outputs + output[:, None]
    gl.store(out + cells, gl.convert_layout(result, layout), mask=inside)
