"""Norms of rows, with what is added to the rows before: one rank's updates, or the sums of all's.

A sum over ranks goes over their boards (`ranks/board.py`), in the pass that adds and normalizes:

    rank 0   part ─┬─▶ own board ─▶ wait for all parts, add them ─▶ add to the rows ─▶ norm
                   └─▶ the others'

Every rank adds the parts in the order of the ranks, in float32, so all have the same bits; a part
and the sum are rounded to the rows' own type, as the library does it for two ranks.

The ranks launch these kernels in the same order, for as many rows. A program writes its part
before it waits, and waits for the others' programs of its row alone. So all get on however late a
rank starts, and however few programs run at once, as they start in order. They keep the rules of
`overlap`: what they wait for is another GPU's, and the next kernel of this one may stand by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenloom.worker.kernels.overlap import let_next_start, overlaps, wait_for_previous

if TYPE_CHECKING:
    from tokenloom.worker.ranks.board import Board


def norm(rows: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Returns the norm of [num_rows, size] rows, to which an update is added in place before.

    Args:
        rows: Contiguous.
        update: As a `Residual` has it, if there is one.
        weight: [size] of the norm.
        eps: Of the norm.
    """
    normed = torch.empty_like(rows)  # [num_rows, size]
    num_rows, size = rows.shape
    columns = triton.next_power_of_2(size)
    num_splits = _num_splits(update)
    overlapped = overlaps(rows.device)
    _add_norm[(num_rows,)](
        rows,
        update,
        weight,
        normed,
        size,
        eps,
        COLUMNS=columns,
        SPLITS=num_splits,
        OVERLAPPED=overlapped,
        # 16 numbers a thread in 16-byte loads; of partial sums, which are many, 2.
        num_warps=min(max(columns // (64 if num_splits else 512), 1), 32),
        launch_pdl=overlapped,
    )
    return normed


def sum_norm(board: Board, rows: Tensor, update: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns the norm of the rows, to which the sum of all ranks' updates is added before.

    All ranks have the same rows, and `update` is this one's; others as for `norm`.
    """
    normed = torch.empty_like(rows)  # [num_rows, size]
    num_rows, size = rows.shape
    columns = triton.next_power_of_2(size)
    overlapped = overlaps(rows.device)
    _sum_add_norm[(num_rows,)](
        rows,
        update,
        weight,
        normed,
        board.cells,
        board.own,
        board.turns,
        board.rank,
        size,
        eps,
        RANKS=board.num_ranks,
        ROWS=board.num_rows,
        COLUMNS=columns,
        SPLITS=_num_splits(update),
        EMPTY=board.empty,
        OVERLAPPED=overlapped,
        # 8 numbers a thread, one 16-byte store to each rank; of partial sums, which are many, 2.
        num_warps=min(max(columns // (64 if update.dim() == 3 else 256), 1), 32),
        launch_pdl=overlapped,
    )
    return normed


def _num_splits(update: Tensor | None) -> int:
    return len(update) if update is not None and update.dim() == 3 else 0


@triton.jit
def _load_update(
    update: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    size: int,
    dtype: tl.constexpr,
    SPLITS: tl.constexpr,
) -> tl.tensor:
    """Loads a row of an update; partial sums are added up in their order and rounded once."""
    added = tl.load(update + row, mask=inside, other=0.0)
    if SPLITS:
        part = tl.num_programs(0).to(tl.int64) * size
        for split in tl.static_range(1, SPLITS):
            added += tl.load(update + split * part + row, mask=inside, other=0.0)
    return added.to(dtype)


@triton.jit
def _normalize(x: tl.tensor, gain: tl.tensor, size: int, eps: float) -> tl.tensor:
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    rounded = (wide * scale).to(x.dtype).to(tl.float32)
    return (gain * rounded).to(x.dtype)


@triton.jit
def _add_norm(
    hidden: tl.tensor,
    update: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    size: int,
    eps: float,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAPPED: tl.constexpr,
) -> None:
    """A program a row; with splits the update is float32 partial sums."""
    let_next_start(OVERLAPPED)
    columns = tl.arange(0, COLUMNS)
    inside = columns < size
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAPPED)
    row = tl.program_id(0).to(tl.int64) * size + columns
    x = tl.load(hidden + row, mask=inside, other=0.0)
    if update is not None:
        added = _load_update(update, row, inside, size, x.dtype, SPLITS)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
        tl.store(hidden + row, x, mask=inside)
    tl.store(normed + row, _normalize(x, gain, size, eps), mask=inside)


@triton.jit(do_not_specialize=["rank"])
def _sum_add_norm(
    hidden: tl.tensor,
    update: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    boards: tl.tuple,
    own: tl.tensor,
    turns: tl.tensor,
    rank: int,
    size: int,
    eps: float,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    EMPTY: tl.constexpr,
    OVERLAPPED: tl.constexpr,
) -> None:
    """A program a row; with splits the update is float32 partial sums."""
    let_next_start(OVERLAPPED)
    columns = tl.arange(0, COLUMNS)
    inside = columns < size
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAPPED)
    number = tl.program_id(0)
    turn = tl.load(turns + number)
    row = number.to(tl.int64) * size + columns
    x = tl.load(hidden + row, mask=inside, other=0.0)
    part = _load_update(update, row, inside, size, x.dtype, SPLITS)

    word: tl.constexpr = own.dtype.element_ty
    bits = part.to(word, bitcast=True)
    bits = tl.where(bits == EMPTY, 0, bits)
    cells = (turn * RANKS * ROWS + number) * size + columns
    sender = ROWS * size
    for index in tl.static_range(RANKS):
        tl.store(boards[index] + rank * sender + cells, bits, mask=inside)

    added = tl.zeros((COLUMNS,), tl.float32)
    missing = 1
    while missing > 0:
        added = tl.zeros((COLUMNS,), tl.float32)
        empty = tl.zeros((COLUMNS,), tl.int32)
        for index in tl.static_range(RANKS):
            found = tl.load(own + index * sender + cells, mask=inside, other=0, volatile=True)
            empty |= (found == EMPTY).to(tl.int32)
            added += found.to(x.dtype, bitcast=True).to(tl.float32)
        missing = tl.max(empty, 0)
    for index in tl.static_range(RANKS):
        tl.store(own + index * sender + cells, EMPTY, mask=inside)
    tl.store(turns + number, 1 - turn)

    x = (x.to(tl.float32) + added.to(x.dtype).to(tl.float32)).to(x.dtype)
    tl.store(hidden + row, x, mask=inside)
    tl.store(normed + row, _normalize(x, gain, size, eps), mask=inside)
