"""In which numbers a matrix is kept, and which of them a checkpoint has. Pure: no torch, no files.

    name          a weight is                                          source
    nf4, fp4      one of 16 values, times the largest of its block     arXiv 2305.14314
    int8          a whole number up to 127, times one scale a row      arXiv 2208.07339

All are bitsandbytes' own, code for code. Dense matrices have no format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from tokenloom.worker.errors import CheckpointError, LoadError, UnsupportedModelError

BLOCK_SIZE = 64
"""What matrices are quantized with here; a checkpoint may have another."""
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Those of bitsandbytes."""

CODEBOOKS = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(
        sign * twelfths / 12
        for sign in (1, -1)
        for twelfths in (
            0,
            1 / 16,
            8,
            12,
            4,
            6,
            2,
            3,
        )  # sign, two bits of exponent, one of mantissa
    ),
}
"""What the codes 0 to 15 stand for."""


@dataclass(frozen=True, kw_only=True)
class FourBits:
    """Codes for 16 values, scaled by runs of inputs."""

    codebook: str
    """A key of CODEBOOKS."""
    block_size: int = BLOCK_SIZE
    """Weights that share a scale, row after row."""

    @property
    def name(self) -> str:
        """As options and config.json call it."""
        return self.codebook


@dataclass(frozen=True, kw_only=True)
class EightBits:
    """Whole numbers, scaled by rows."""

    @property
    def name(self) -> str:
        """As options call it."""
        return "int8"


Format: TypeAlias = FourBits | EightBits

_BY_NAME: Mapping[str, Format | None] = {
    "none": None,
    "nf4": FourBits(codebook="nf4"),
    "fp4": FourBits(codebook="fp4"),
    "int8": EightBits(),
}

FORMAT_NAMES = tuple(_BY_NAME)
"""What `--quantize` may be."""


def format_named(name: str) -> Format | None:
    """Returns what `--quantize` means; None is dense. Raises LoadError."""
    if name not in _BY_NAME:
        raise LoadError(f"quantize is {name!r}; it must be one of {', '.join(FORMAT_NAMES)}")
    return _BY_NAME[name]


def fits(wanted: Format | None, num_inputs: int) -> bool:
    """Returns whether each row of a matrix with so many inputs is whole blocks."""
    return not isinstance(wanted, FourBits) or num_inputs % wanted.block_size == 0


def stored_format_name(quantization_config: object) -> str | None:
    """Returns what the `quantization_config` of a config.json says: nf4, fp4, int8; None: dense.

    Which matrices are quantized, the checkpoint's tensors tell: those that the config lists as
    skipped are stored dense.

    Raises:
        UnsupportedModelError: It is not bitsandbytes' work.
        CheckpointError: It is no JSON object.
    """
    if quantization_config is None:
        return None
    if not isinstance(quantization_config, Mapping):
        raise CheckpointError(f"config.json has quantization_config = {quantization_config!r}")
    four_bit, eight_bit = (
        quantization_config.get(key) is True for key in ("load_in_4bit", "load_in_8bit")
    )
    # Old exports say what is loaded and not by what.
    default = "bitsandbytes" if four_bit or eight_bit else None
    method = quantization_config.get("quant_method", default)
    if method != "bitsandbytes" or four_bit == eight_bit:
        raise UnsupportedModelError(
            f"the checkpoint is quantized by {method!r} with load_in_4bit = {four_bit} and"
            f" load_in_8bit = {eight_bit}; supported is 'bitsandbytes' with one of them"
        )
    if eight_bit:
        return "int8"
    name = quantization_config.get("bnb_4bit_quant_type", "fp4")
    if name not in CODEBOOKS:
        raise UnsupportedModelError(
            f"bnb_4bit_quant_type {name!r} is not supported; supported are {', '.join(CODEBOOKS)}"
        )
    return str(name)
