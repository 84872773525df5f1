"""Matrices of 4 bits times rows: which kernel, how it is cut, and its launch.

    rows    kernel, of sources/four_bit.cu                     fused with it
    few     lanes' loads are the matrix unit's operands        norm, residual, silu(gate) * up
    some    `wgmma`, codes and rows through shared memory      residual, silu(gate) * up
    many    made dense, then the dense library's matmul

Where that begins and ends, and how a matrix is cut, was measured: `tuned/` has a table a GPU.
"""

from __future__ import annotations

import ctypes
import logging
import math
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar, TypeAlias

import msgspec
import torch
from torch import Tensor

from tokenloom.worker.kernels import cuda
from tokenloom.worker.kernels.overlap import real
from tokenloom.worker.weights.linears import FourBitLinear, multiply_in_parts

_log = logging.getLogger(__name__)

_BLOCK_SIZE = 64
_TILE_LINES = 128
_TUNED = Path(__file__).parent / "tuned"
_TABLE_BYTES = 32 * 1024
_PROGRAM_BYTES = 1024
"""Of shared memory that each program takes beside what it asks for"""

Clusters: TypeAlias = tuple[tuple[int, int], ...]
"""(programs of a cluster, clusters that stand at once if a multiprocessor has one of them)"""


@dataclass(frozen=True, kw_only=True)
class Few:
    """Warps with their own lines' inputs; the names are those of the kernel."""

    name: ClassVar = "multiply_few"

    rows: int
    """At most"""
    warps: int
    depth: int
    programs: int
    """On a multiprocessor"""

    @property
    def instance(self) -> str:
        """What is compiled."""
        return f"FEW({self.rows}, {self.warps}, {self.depth}, {self.programs})"

    def shared_bytes(self, num_inputs: int) -> int:
        """Returns a program's: table, sums of 8 tiles for each warp, rows."""
        staged = math.ceil(num_inputs / 256) * 512
        return _TABLE_BYTES + 8 * self.warps * 256 + self.rows * staged

    def grid(self, num_lines: int, num_inputs: int, num_processors: int) -> cuda.Grid:
        """Returns a program for each place on the device, and each warp 256 inputs at least."""
        return cuda.Grid(
            programs=(min(self.programs * num_processors, math.ceil(num_lines / 16)), 1, 1),
            num_threads=32 * min(self.warps, math.ceil(num_inputs / 256)),
            shared_bytes=self.shared_bytes(num_inputs),
            overlapped=True,
        )


@dataclass(frozen=True, kw_only=True)
class Wide:
    """Tiles of 128 lines, whose inputs a cluster shares; the names are those of the kernel."""

    name: ClassVar = "multiply_wide"

    rows: int
    """Of a program"""
    runs: int = 1
    """Of so many rows, each with programs of its own, at most"""
    step: int
    stages: int
    programs: int
    """On a multiprocessor"""
    splits: int = 1
    """Programs that share a tile's inputs, by `choose`"""

    @property
    def instance(self) -> str:
        """What is compiled."""
        return f"WIDE({self.rows}, {self.step}, {self.stages}, {self.programs})"

    @property
    def shared_bytes(self) -> int:
        """A program's: table, then a ring and its barriers or, in their place, sums."""
        stage = (_TILE_LINES * (32 + 4) + self.rows * 128) * self.step + 16
        return _TABLE_BYTES + max(self.stages * stage, self.rows * (_TILE_LINES + 4) * 4)

    @property
    def codes_box(self) -> cuda.Box:
        """What a copy brings of the codes."""
        return cuda.Box(num_lines=64, line_bytes=32 * self.step)

    @property
    def rows_box(self) -> cuda.Box:
        """What a copy brings of the rows: a block of 64 inputs."""
        return cuda.Box(num_lines=self.rows, line_bytes=128)

    def grid(self, num_rows: int, num_lines: int) -> cuda.Grid:
        """Returns the programs of each tile, and of each run of rows."""
        return cuda.Grid(
            programs=(math.ceil(num_lines / _TILE_LINES), self.splits, self.num_runs(num_rows)),
            num_threads=384,
            shared_bytes=self.shared_bytes,
            cluster=self.splits,
            overlapped=True,
        )

    def num_runs(self, num_rows: int) -> int:
        """Returns how many runs so many rows are."""
        return math.ceil(num_rows / self.rows)

    def split(self, clusters: Clusters, num_rows: int, num_lines: int, num_inputs: int) -> Wide:
        """Returns it with as many splits as stand on the device at once and have two steps each."""
        num_tiles = math.ceil(num_lines / _TILE_LINES) * self.num_runs(num_rows)
        most = num_inputs // (2 * _BLOCK_SIZE * self.step)
        sizes = (
            size
            for size, at_once in clusters
            if size <= most and num_tiles <= self.programs * at_once
        )
        return replace(self, splits=next(sizes, 1))


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was measured on a kind of GPU, in the order in which it is preferred."""

    shared_bytes: int
    """Of a multiprocessor"""
    few: tuple[Few, ...]
    wide: tuple[Wide, ...] = ()
    clusters: Clusters = ()


@cache
def tuned_for(name: str, capability: tuple[int, int]) -> Tuned:
    """Returns the table of a GPU by its name, of its generation, or the one for all others."""
    candidates = (name.lower().replace(" ", "-"), "nvidia-h200" if capability == (9, 0) else "")
    paths = (_TUNED / f"{candidate}.toml" for candidate in candidates)
    path = next((path for path in paths if path.exists()), _TUNED / "default.toml")
    _log.info("matrices of 4 bits on %s: kernels as tuned in %s", name, path.name)
    return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Tuned)


def choose(tuned: Tuned, num_rows: int, num_lines: int, num_inputs: int) -> Few | Wide | None:
    """Returns what multiplies so many rows with [num_lines, num_inputs]; None: the library."""
    for few in tuned.few:
        own_bytes = few.shared_bytes(num_inputs) + _PROGRAM_BYTES
        if num_rows <= few.rows and few.programs * own_bytes <= tuned.shared_bytes:
            return few
    for wide in tuned.wide:
        if num_rows <= wide.runs * wide.rows:
            return wide.split(tuned.clusters, num_rows, num_lines, num_inputs)
    return None


def has_kernels(linear: FourBitLinear, dtype: torch.dtype) -> bool:
    """Returns whether kernels of ours multiply rows of a type with a matrix; else its twin does."""
    return (
        linear.block_size == _BLOCK_SIZE
        and linear.shape[1] % _BLOCK_SIZE == 0
        and dtype in {torch.float16, torch.bfloat16}
        and _has_kernels(real(linear.codes.device))
    )


@cache
def _has_kernels(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    capability = torch.cuda.get_device_capability(device)
    reason = cuda.why_not()
    if capability < (8, 0):
        reason = f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if reason is not None:
        _log.warning("matrices of 4 bits are multiplied slowly, without kernels: %s", reason)
    return reason is None


def choose_for(num_rows: int, linear: FourBitLinear) -> Few | Wide | None:
    """Returns what multiplies so many rows on the matrix's device; None: the library."""
    return choose(_tuned(real(linear.codes.device)), num_rows, *linear.shape)


@cache
def _tuned(device: torch.device) -> Tuned:
    capability = torch.cuda.get_device_capability(device)
    return tuned_for(torch.cuda.get_device_name(device), capability)


class _Arguments(ctypes.Structure):
    """As the kernels have it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "codes", "absmax", "codebook", "bias")),
        *((name, ctypes.c_void_p) for name in ("gain", "residual", "out")),
        *((name, ctypes.c_int) for name in ("num_rows", "num_outputs", "num_inputs", "gated")),
        ("eps", ctypes.c_float),
    )


def multiply_four_bit(
    way: Few | Wide,
    rows: Tensor,
    linear: FourBitLinear,
    out: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Multiplies [num_rows, num_inputs] rows with a matrix and returns [num_rows, num_outputs] out.

    Args:
        way: By `choose_for`.
        rows: Of float16 or bfloat16, as norm, residual and out; contiguous, in memory that begins
            at a multiple of 16 bytes.
        linear: The matrix; with `gated` [2 * num_outputs, num_inputs].
        out: Where the result goes. It may be the residual.
        norm: Weight [num_inputs] and eps of a norm of the rows, if they are to be normalized; for
            `Few` alone.
        residual: [num_rows, num_outputs] that the result is added to.
        gated: Whether the result is silu(gate) * up of what is multiplied.
    """
    num_lines, num_inputs = linear.shape
    if out is None:
        shape = len(rows), num_lines // 2 if gated else num_lines
        out = torch.empty(shape, dtype=rows.dtype, device=rows.device)
    if len(rows) == 0:
        return out
    gain, eps = norm or (None, 0.0)
    arguments = _arguments(linear, out, rows=rows, gain=gain, residual=residual)
    arguments.num_rows, arguments.num_outputs = out.shape
    arguments.gated, arguments.eps = gated, eps
    kernel = _kernel(way.name, way.instance, rows.dtype)
    if isinstance(way, Few):
        grid = way.grid(num_lines, num_inputs, _num_processors(rows.device))
        cuda.launch(kernel, grid, rows.device, [arguments])
    else:
        assert norm is None
        maps = (
            cuda.tensor_map(linear.codes, way.codes_box),
            cuda.tensor_map(rows, way.rows_box),
        )
        cuda.launch(kernel, way.grid(len(rows), num_lines), rows.device, [arguments, *maps])
    return out


def multiply_dense(rows: Tensor, linear: FourBitLinear, out: Tensor | None = None) -> Tensor:
    """Returns [num_rows, num_outputs], in `out` if given, for [num_rows, num_inputs].

    What is made dense, the library multiplies: kernels of ours read a matrix before they wait
    (`overlap`), and so before this one is there.
    """
    return multiply_in_parts(rows, linear, out, make_dense, rows.dtype.itemsize)


def make_dense(linear: FourBitLinear, dtype: torch.dtype) -> Tensor:
    """Returns [num_outputs, num_inputs] values: each product in float32, then rounded."""
    device = linear.codes.device
    out = torch.empty(linear.shape, dtype=dtype, device=device)
    arguments = _arguments(linear, out)
    arguments.num_outputs, arguments.num_inputs = linear.shape
    kernel = _kernel("make_dense", "DENSE", dtype)
    # A thread takes 4 words of 8 weights at a time.
    num_programs = min(4 * _num_processors(device), math.ceil(out.numel() / (8 * 4 * 256)))
    grid = cuda.Grid(programs=(num_programs, 1, 1), num_threads=256, shared_bytes=16 * 128)
    cuda.launch(kernel, grid, device, [arguments])
    return out


def _kernel(name: str, instance: str, dtype: torch.dtype) -> cuda.CudaKernel:
    return cuda.CudaKernel(source="four_bit.cu", name=name, instance=instance, dtype=dtype)


def _arguments(linear: FourBitLinear, out: Tensor, **others: Tensor | None) -> _Arguments:
    tensors = {
        "codes": linear.codes,
        "absmax": linear.absmax,
        "codebook": linear.codebook,
        "bias": linear.bias,
        "out": out,
        **others,
    }
    pointers = {name: each.data_ptr() for name, each in tensors.items() if each is not None}
    return _Arguments(num_inputs=linear.shape[1], **pointers)


@cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(real(device)).multi_processor_count
