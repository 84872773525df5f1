"""What a checkpoint stores, cut in pieces, and how a piece becomes rows of a matrix in memory.

    stored     rounded to     place      rows of a piece on their way
    dense      –              dense      copied, converted
    dense      4, 8 bits      the same   to the device, converted, quantized there
    4, 8 bits  –              the same   copied; scales made float32
    4, 8 bits  –              dense      to the device, made dense there
    dense      4, 8 bits      dense      to the device, quantized and made dense again

A piece is rows of one matrix, so it is a matrix itself: it is read in the form in which it is
stored, brought into the form that is wanted, and copied to its rows of the place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, assert_never

import torch
from torch import Tensor
from torch.nn import functional

from tokenloom.worker.errors import CheckpointError
from tokenloom.worker.weights.formats import Format
from tokenloom.worker.weights.linears import (
    DenseLinear,
    EightBitLinear,
    FourBitLinear,
    Linear,
    codebook,
)
from tokenloom.worker.weights.matrices import HEAD
from tokenloom.worker.weights.quantized import Stored, StoredEightBit, StoredFourBit
from tokenloom.worker.weights.rounding import quantized
from tokenloom.worker.weights.sharding import WHOLE, Part
from tokenloom.worker.weights.stored import StoredTensor

_WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")
_WIDENED = 12
"""Bytes that a byte of two codes takes while it is made dense, about."""

Place: TypeAlias = Tensor | Linear
"""Memory that a stored tensor goes to; a matrix may be quantized."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is read at a time, and what is done with it."""

    sources: tuple[StoredTensor, ...]
    put: Callable[..., None]
    """Takes the tensors of the sources on the host, which may be written to when all is done
    that was queued on the current stream."""

    @property
    def num_bytes(self) -> int:
        """What is read."""
        return sum(source.num_bytes for source in self.sources)


@dataclass(frozen=True, kw_only=True)
class Filling:
    """A stored tensor and the place for it, of the same shape."""

    stored: Stored
    place: Place
    dtype: torch.dtype
    """Of the activations: what dense values are rounded to first."""
    rounded_to: Format | None
    """What dense values are then rounded to."""

    @property
    def num_place_bytes(self) -> int:
        """What the place takes in memory."""
        return self.place.nbytes if isinstance(self.place, Tensor) else self.place.num_bytes

    def pieces(self, max_bytes: int, device: torch.device) -> Iterator[Piece]:
        """Yields pieces of at most `max_bytes`, unless rows that share a block take more."""
        stored, place = self.stored, self.place
        if isinstance(place, Tensor):
            assert isinstance(stored, StoredTensor)
            stored = stored.viewed(stored.dtype, place.numel(), 1)
            place = DenseLinear(weight=place.view(-1, 1), bias=None)
        if isinstance(stored, StoredFourBit) and isinstance(place, DenseLinear):
            max_bytes //= _WIDENED
        for first, last in _row_ranges(stored, max_bytes):
            rows = stored.rows(first, last)
            read: Callable[..., Linear]
            match rows:
                case StoredTensor():
                    read = partial(_read_dense, self.rounded_to, self.dtype, device)
                case StoredFourBit():
                    read = partial(_read_four_bit, rows, device)
                case StoredEightBit():
                    read = partial(_read_eight_bit, device)
                case _:
                    assert_never(rows)
            yield Piece(sources=rows.sources, put=partial(_put, read, place.rows(first, last)))


def match(
    stored: Mapping[str, Stored],
    places: Mapping[str, Place],
    *,
    parts: Mapping[str, Part],
    formats: Mapping[str, Format],
    dtype: torch.dtype,
) -> list[Filling]:
    """Returns what fills which place, in the order of what is stored.

    Args:
        stored: All that the checkpoint holds, by name.
        places: What is expected, by name.
        parts: By name, what a place has of a tensor; absent: all. Rows behind it are left.
        formats: By its name, the format that a matrix has or is rounded to.
        dtype: Of the activations.

    Raises:
        CheckpointError: A tensor is missing, unexpected, misshapen or of a type that weights
            do not have.
    """
    fillings = []
    for name, tensor in stored.items():
        if name not in places:
            if _is_superfluous(name):
                continue
            raise CheckpointError(f"tensor {name} is not expected")
        place, part = places[name], parts.get(name, WHOLE)
        _check(name, tensor, place, part)
        rounded_to = (
            formats.get(name.removesuffix(".weight")) if isinstance(tensor, StoredTensor) else None
        )
        own = tensor
        if part.rows is not None:
            own = own.rows(part.rows.first, part.rows.last)
            place = _first_rows(place, len(part.rows))
        if part.columns is not None:
            own = own.columns(part.columns.first, part.columns.last)
        fillings.append(Filling(stored=own, place=place, dtype=dtype, rounded_to=rounded_to))
    missing = sorted(places.keys() - stored.keys())
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing: {', '.join(missing[:3])} …")
    return fillings


def _first_rows(place: Place, num_rows: int) -> Place:
    return place[:num_rows] if isinstance(place, Tensor) else place.rows(0, num_rows)


def _check(name: str, stored: Stored, place: Place, part: Part) -> None:
    expected = part.whole(*place.shape)
    if tuple(stored.shape) != expected:
        raise CheckpointError(f"tensor {name} has shape {stored.shape}; {expected} is expected")
    if isinstance(stored, StoredTensor):
        if stored.dtype not in _WEIGHT_TYPES:
            raise CheckpointError(
                f"tensor {name} is of type {stored.dtype}; weights are of one of"
                f" {', '.join(_WEIGHT_TYPES)}"
            )
    elif isinstance(place, Tensor):
        raise CheckpointError(f"tensor {name} is quantized; only matrices of layers and head are")


def _is_superfluous(name: str) -> bool:
    """Returns whether a tensor that nothing expects is one that checkpoints carry without need."""
    # The head is not expected where the embedding is it; the other is a table of old exports.
    return name == f"{HEAD}.weight" or name.endswith(".rotary_emb.inv_freq")


def _row_ranges(stored: Stored, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields ranges of rows; no block begins before one."""
    num_rows = stored.shape[0]
    main = stored if isinstance(stored, StoredTensor) else stored.codes
    aligned = stored.aligned_rows if isinstance(stored, StoredFourBit) else 1
    step = max(1, max_bytes * num_rows // max(1, main.num_bytes * aligned)) * aligned
    for first in range(0, num_rows, step):
        yield first, min(first + step, num_rows)


def _read_dense(
    rounded_to: Format | None, dtype: torch.dtype, device: torch.device, values: Tensor
) -> Linear:
    if rounded_to is None:
        return DenseLinear(weight=values, bias=None)
    return quantized(values.to(device, non_blocking=True).to(dtype), rounded_to)


def _read_four_bit(
    stored: StoredFourBit,
    device: torch.device,
    codes: Tensor,
    absmax: Tensor,
    *nested: Tensor,
) -> Linear:
    """Returns a matrix of a block a row: those of the checkpoint may run over the ends of rows."""
    half_block = stored.format.block_size // 2
    codes = codes.to(device, non_blocking=True).view(-1)
    codes = functional.pad(codes, (0, -len(codes) % half_block))  # of the matrix's last block
    absmax = absmax.to(device, non_blocking=True)
    if stored.nested is not None:
        scales, quant_map = (each.to(device, non_blocking=True) for each in nested)
        rows, columns = (torch.arange(size, device=device) for size in absmax.shape)
        numbers = stored.nested.first + rows[:, None] * stored.nested.step + columns
        # bitsandbytes' own order: product, then sum, each rounded to float32.
        scale = scales[numbers // stored.nested.block_size]
        absmax = quant_map[absmax.int()] * scale + stored.nested.offset
    return FourBitLinear(
        codes=codes.view(-1, half_block),
        absmax=absmax.view(-1, 1),
        codebook=codebook(stored.format.codebook, device),
        bias=None,
    )


def _read_eight_bit(device: torch.device, codes: Tensor, stats: Tensor) -> Linear:
    codes, stats = (each.to(device, non_blocking=True) for each in (codes, stats))
    return EightBitLinear(codes=codes, scales=stats / 127, bias=None)


def _put(read: Callable[..., Linear], place: Linear, *staged: Tensor) -> None:
    rows = read(*staged)
    match place, rows:
        case DenseLinear(), DenseLinear():
            place.weight.copy_(rows.weight, non_blocking=True)
        case DenseLinear(), FourBitLinear() | EightBitLinear():
            values = rows.dense(place.weight.dtype).view(-1)[: place.weight.numel()]
            place.weight.copy_(values.view_as(place.weight))
        case FourBitLinear(), FourBitLinear():
            place.codes.copy_(rows.codes.view_as(place.codes))
            place.absmax.copy_(rows.absmax.view_as(place.absmax))
        case EightBitLinear(), EightBitLinear():
            place.codes.copy_(rows.codes)
            place.scales.copy_(rows.scales)
        case _:
            raise AssertionError(f"{type(rows).__name__} for a place of {type(place).__name__}")
