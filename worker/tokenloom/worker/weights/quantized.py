"""Matrices as bitsandbytes stores them: several tensors each, told by their names.

    q_proj.weight                                     U8   codes, two a byte, row after row
    q_proj.weight.absmax                              F32  a scale a block; U8: a code for it
    q_proj.weight.quant_map                                the codebook, which the type implies
    q_proj.weight.nested_absmax, .nested_quant_map    F32  a scale a block of codes; what they mean
    q_proj.weight.quant_state.bitsandbytes__nf4       U8   JSON: block sizes, shape, offset

    q_proj.weight                                     I8   whole numbers
    q_proj.SCB                                        F32  a row's largest value
    q_proj.weight_format                              U8   0: row after row

Source: bitsandbytes.functional.QuantState and bitsandbytes.nn.Linear8bitLt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from tokenloom.worker.errors import CheckpointError, UnsupportedModelError
from tokenloom.worker.weights.formats import (
    BLOCK_SIZES,
    CODEBOOKS,
    EightBits,
    Format,
    FourBits,
    fits,
)
from tokenloom.worker.weights.stored import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

_STATE = ".quant_state.bitsandbytes__"
_STATS = ".SCB"
_WEIGHT = ".weight"
_WEIGHT_FORMAT = ".weight_format"
_COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_NESTED_CODES = 256


@dataclass(frozen=True, kw_only=True)
class Nested:
    """What codes for scales mean: `quant_map[code] * absmax[block of codes] + offset`."""

    absmax: StoredTensor
    """F32 [num_scales / block_size]"""
    quant_map: StoredTensor
    """F32 [256]"""
    block_size: int
    offset: float
    first: int
    """The number, in the whole matrix, of the scale that its rows at hand begin with."""
    step: int
    """From a row of scales to the next, in such numbers."""


@dataclass(frozen=True, kw_only=True)
class StoredFourBit:
    """A matrix of 4 bits. Its blocks run over the ends of rows if those are no multiple."""

    shape: tuple[int, int]
    """Outputs and inputs, whose number is even."""
    format: FourBits
    codes: StoredTensor
    """U8 [num_outputs, num_inputs / 2]"""
    absmax: StoredTensor
    """F32, nested U8 [num_outputs, num_inputs / block_size]; [num_blocks, 1] where blocks run
    over the ends of rows"""
    nested: Nested | None

    @property
    def aligned_rows(self) -> int:
        """The fewest rows that are whole blocks."""
        return self.format.block_size // math.gcd(self.format.block_size, self.shape[1])

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """What is to be read: codes, scales, nested ones and what they mean."""
        own = (self.codes, self.absmax)
        return own if self.nested is None else (*own, self.nested.absmax, self.nested.quant_map)

    def rows(self, first: int, last: int) -> StoredFourBit:
        """Returns a range of rows that begins with a block."""
        assert first % self.aligned_rows == 0
        num_inputs, size = self.shape[1], self.format.block_size
        scales = (first, last)
        if not fits(self.format, num_inputs):
            scales = (first * num_inputs // size, math.ceil(last * num_inputs / size))
        nested = self.nested
        if nested is not None:
            nested = replace(nested, first=nested.first + scales[0] * nested.step)
        return replace(
            self,
            shape=(last - first, num_inputs),
            codes=self.codes.rows(first, last),
            absmax=self.absmax.rows(*scales),
            nested=nested,
        )

    def columns(self, first: int, last: int) -> StoredFourBit:
        """Returns a range of inputs: all, or whole blocks."""
        num_outputs, num_inputs = self.shape
        if last - first == num_inputs:
            return self
        size = self.format.block_size
        assert fits(self.format, num_inputs)
        assert first % size == last % size == 0
        nested = self.nested
        if nested is not None:
            nested = replace(nested, first=nested.first + first // size)
        return replace(
            self,
            shape=(num_outputs, last - first),
            codes=self.codes.columns(first // 2, last // 2),
            absmax=self.absmax.columns(first // size, last // size),
            nested=nested,
        )


@dataclass(frozen=True, kw_only=True)
class StoredEightBit:
    """A matrix of 8 bits."""

    codes: StoredTensor
    """I8 [num_outputs, num_inputs]"""
    stats: StoredTensor
    """F32 [num_outputs]: 127 times the scale"""

    @property
    def shape(self) -> tuple[int, ...]:
        """Outputs and inputs."""
        return self.codes.shape

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """What is to be read: codes, stats."""
        return self.codes, self.stats

    def rows(self, first: int, last: int) -> StoredEightBit:
        """Returns a range of rows."""
        return replace(self, codes=self.codes.rows(first, last), stats=self.stats.rows(first, last))

    def columns(self, first: int, last: int) -> StoredEightBit:
        """Returns a range of inputs, with the scales of whole rows."""
        return replace(self, codes=self.codes.columns(first, last))

    @property
    def format(self) -> EightBits:
        """That of all such matrices."""
        return EightBits()


Stored: TypeAlias = StoredTensor | StoredFourBit | StoredEightBit


class _QuantState(msgspec.Struct, frozen=True):
    """The JSON beside a matrix of 4 bits."""

    quant_type: str
    blocksize: int
    shape: tuple[int, int]
    nested_blocksize: int = 0
    nested_offset: float = 0.0


def stored_format(stored: Stored) -> Format | None:
    """Returns the format of what is stored; None is dense."""
    return None if isinstance(stored, StoredTensor) else stored.format


def gathered(tensors: Mapping[str, StoredTensor]) -> dict[str, Stored]:
    """Returns the tensors with each quantized matrix as one, by the name of its weight.

    Raises:
        CheckpointError: What belongs together does not fit.
        UnsupportedModelError: A layout that bitsandbytes no longer writes.
    """
    found: dict[str, Stored] = dict(tensors)
    for name in tensors:
        weight, is_state, _ = name.partition(_STATE)
        if is_state and weight in tensors:
            found[weight] = _four_bit(weight, name, tensors)
            for companion in (name, *(weight + suffix for suffix in _COMPANIONS)):
                found.pop(companion, None)
        elif name.endswith(_STATS) and (module := name.removesuffix(_STATS)) + _WEIGHT in tensors:
            found[module + _WEIGHT] = _eight_bit(module, tensors)
            found.pop(name)
            found.pop(module + _WEIGHT_FORMAT, None)
    return found


def _four_bit(name: str, state_name: str, tensors: Mapping[str, StoredTensor]) -> StoredFourBit:
    try:
        state = msgspec.json.decode(tensors[state_name].read(), type=_QuantState)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"tensor {state_name} cannot be read: {error}") from error
    num_outputs, num_inputs = state.shape
    if state.quant_type not in CODEBOOKS or not state_name.endswith("__" + state.quant_type):
        raise CheckpointError(f"tensor {state_name} says quant_type = {state.quant_type!r}")
    if state.blocksize not in BLOCK_SIZES:
        raise CheckpointError(
            f"tensor {state_name} says blocksize = {state.blocksize}; it is one of {BLOCK_SIZES}"
        )
    if min(state.shape) < 1 or num_inputs % 2:
        raise UnsupportedModelError(
            f"tensor {name} has shape {state.shape}; an even number of inputs is supported"
        )
    codes, absmax = tensors[name], _companion(name, ".absmax", tensors)
    if codes.num_bytes != num_outputs * num_inputs // 2:
        raise CheckpointError(
            f"tensor {name} has {codes.num_bytes} bytes; shape {state.shape} of 4 bits takes"
            f" {num_outputs * num_inputs // 2}"
        )
    num_blocks = math.ceil(num_outputs * num_inputs / state.blocksize)
    format_ = FourBits(codebook=state.quant_type, block_size=state.blocksize)
    num_rows = num_outputs if fits(format_, num_inputs) else num_blocks
    nested = _nested(name, state, num_rows, num_blocks, tensors)
    _expect(name + ".absmax", absmax, "F32" if nested is None else "U8", num_blocks)
    return StoredFourBit(
        shape=state.shape,
        format=format_,
        codes=codes.viewed("U8", num_outputs, num_inputs // 2),
        absmax=absmax.viewed(absmax.dtype, num_rows, num_blocks // num_rows),
        nested=nested,
    )


def _nested(
    name: str,
    state: _QuantState,
    num_rows: int,
    num_scales: int,
    tensors: Mapping[str, StoredTensor],
) -> Nested | None:
    if state.nested_blocksize == 0:
        return None
    if state.nested_blocksize < 0:
        raise CheckpointError(f"tensor {name} has nested_blocksize = {state.nested_blocksize}")
    absmax = _companion(name, ".nested_absmax", tensors)
    _expect(name + ".nested_absmax", absmax, "F32", math.ceil(num_scales / state.nested_blocksize))
    quant_map = _companion(name, ".nested_quant_map", tensors)
    _expect(name + ".nested_quant_map", quant_map, "F32", _NESTED_CODES)
    return Nested(
        absmax=absmax,
        quant_map=quant_map,
        block_size=state.nested_blocksize,
        offset=state.nested_offset,
        first=0,
        step=num_scales // num_rows,
    )


def _eight_bit(module: str, tensors: Mapping[str, StoredTensor]) -> StoredEightBit:
    codes, stats = tensors[module + _WEIGHT], tensors[module + _STATS]
    if codes.dtype != "I8" or len(codes.shape) != 2:
        raise CheckpointError(
            f"tensor {module}{_WEIGHT} is of type {codes.dtype} and shape {codes.shape}; beside"
            f" {module}{_STATS} a matrix of I8 is expected"
        )
    _expect(module + _STATS, stats, "F32", codes.shape[0])
    layout = tensors.get(module + _WEIGHT_FORMAT)
    if layout is not None and any(layout.read()):
        raise UnsupportedModelError(
            f"tensor {module}{_WEIGHT_FORMAT} is {list(layout.read())}; supported is 0, row after"
            " row"
        )
    return StoredEightBit(codes=codes, stats=stats)


def _companion(name: str, suffix: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    if name + suffix not in tensors:
        raise CheckpointError(f"tensor {name}{suffix} is missing, which {name} needs")
    return tensors[name + suffix]


def _expect(name: str, stored: StoredTensor, dtype: str, size: int) -> None:
    if (stored.dtype, stored.shape) != (dtype, (size,)):
        raise CheckpointError(
            f"tensor {name} is of type {stored.dtype} and shape {stored.shape}; {dtype} of"
            f" {(size,)} is expected"
        )
