"""Memory of each GPU that the ranks on a machine write to themselves, for small sums.

    rank 0's board                rank 1's board
    turn 0   from 0   from 1      turn 0   from 0   from 1      a row's sums take turns
    turn 1   from 0   from 1      turn 1   from 0   from 1

A rank writes its part of a row to its place on every board, its own among them, and waits until
its own board has all parts. A cell that is not written holds -0.0, which is nobody's part: a rank
that has it writes 0.0. So each number says by itself that it is there, no flag has to be ordered
behind it, and a sum takes one way between the GPUs. Who has read a cell empties it.

A rank may be one sum ahead of another, hence two turns, but not two sums: for the one between it
needs the other's part, written by a kernel that began when the one before had ended and emptied
all that it read. Whose turn it is stands in the GPU's memory, for each row: a kernel in a graph
finds it there and hands it on, however many rows the sum before had.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, distributed

_MOST_ROWS = 2048
"""Beyond, a step is bound by what it computes."""
_MOST_BYTES = 16 * 1024**2
"""That a rank sends. It sends all of its part to each other rank, which pays while the way counts
for more than the bytes, and among two always does: with add and norm, two H200s take 3.1 µs for
8 KiB, 6.5 for 1 MiB and 51 for 16, NCCL and a norm 7.7, 15.3 and 91. A board takes four times that
of two ranks' memory.
"""
_WORDS = {2: torch.int16, 4: torch.int32}
"""What the cells of a number are compared as, by its bytes"""


@dataclass(frozen=True, kw_only=True)
class Board:
    """A rank's own board, and the others'."""

    rank: int
    cells: tuple[Tensor, ...]
    """int16 or int32 [2, num_ranks, num_rows, size] of each rank: bits of parts by turn, sender"""
    turns: Tensor
    """int32 [num_rows], 0 or 1: which turn a row's next sum has"""
    mapped: object = None
    """While it lives, the others' cells are there."""

    @property
    def own(self) -> Tensor:
        """The cells that the others write to and this rank reads."""
        return self.cells[self.rank]

    @property
    def num_ranks(self) -> int:
        """How many write to it."""
        return len(self.cells)

    @property
    def num_rows(self) -> int:
        """How many rows a sum may have."""
        return len(self.turns)

    @property
    def empty(self) -> int:
        """The bits of -0.0."""
        return empty_bits(self.own.dtype)


def empty_bits(word: torch.dtype) -> int:
    """Returns the bits of -0.0 in a float as wide as such a word."""
    return torch.iinfo(word).min


def most_rows(size: int, item_bytes: int, num_ranks: int) -> int:
    """Returns how many rows of a size a board has room for: larger sums are the library's."""
    return min(_MOST_ROWS, _MOST_BYTES // (size * item_bytes * (num_ranks - 1)))


def board_shape(num_rows: int, size: int, num_ranks: int) -> tuple[int, int, int, int]:
    """Returns the shape of its cells."""
    return 2, num_ranks, num_rows, size


def word_of(dtype: torch.dtype) -> torch.dtype:
    """Returns what the cells of a type are."""
    return _WORDS[dtype.itemsize]


def outlined_board(
    rank: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Board:
    """Returns a board on the meta device, whose kernels can be compiled."""
    cells = torch.empty(shape, dtype=word_of(dtype), device=device)
    turns = torch.zeros(shape[2], dtype=torch.int32, device=device)
    return Board(rank=rank, cells=(cells,) * shape[1], turns=turns)


def open_board(
    rank: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Board:
    """Returns an empty board; all ranks of the default group open theirs at once.

    It may be written to when all ranks are back. Raises RuntimeError if the GPUs cannot reach
    each other's memory.
    """
    # Nothing is sent to all at once: the switch need not be set up for that.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    from torch._C._distributed_c10d import _SymmetricMemory  # noqa: PLC0415 - of CUDA builds alone
    from torch.distributed import _symmetric_memory  # noqa: PLC0415 - imports slowly

    word = word_of(dtype)
    strides = torch.empty(shape, device="meta").stride()
    # Not out of the library's pool: what it has there may be mapped for a group that is no more.
    own = _SymmetricMemory.empty_strided_p2p(shape, strides, word, device)
    own.fill_(empty_bits(word))
    group = distributed.group.WORLD
    assert group is not None
    memory = _symmetric_memory.rendezvous(own, group)
    cells = tuple(
        own if each == rank else memory.get_buffer(each, shape, word) for each in range(shape[1])
    )
    turns = torch.zeros(shape[2], dtype=torch.int32, device=device)
    return Board(rank=rank, cells=cells, turns=turns, mapped=memory)


def machine() -> int:
    """Returns a number, from 0 on, that processes share which can hand each other memory."""
    names = [Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")]
    names += [str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("mnt", "pid")]
    return crc32(" ".join(names).encode())
