"""Dense values to codes and scales, by bitsandbytes: the one place that imports it.

Its import takes seconds, so it waits until something is to be quantized: a checkpoint that is
quantized already needs none of it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, assert_never

import torch
from torch import Tensor

from tokenloom.worker.errors import LoadError
from tokenloom.worker.formats import EightBits, Format, FourBits
from tokenloom.worker.linears import EightBitLinear, FourBitLinear, codebook

if TYPE_CHECKING:
    from types import ModuleType


def check_can_round() -> None:
    """Raises LoadError if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise LoadError("bitsandbytes is not installed; quantizing needs it")


def quantized(values: Tensor, wanted: Format) -> FourBitLinear | EightBitLinear:
    """Returns [num_outputs, num_inputs] values of 16 or 32 bits, quantized where they are.

    For FourBits the inputs are a multiple of the block size.
    """
    num_outputs, num_inputs = values.shape
    match wanted:
        case FourBits():
            codes, absmax = _operations().quantize_4bit.default(
                values, wanted.block_size, wanted.codebook, torch.uint8
            )
            return FourBitLinear(
                codes=codes.view(num_outputs, num_inputs // 2),
                absmax=absmax.view(num_outputs, num_inputs // wanted.block_size),
                codebook=codebook(wanted.codebook, values.device),
                bias=None,
            )
        case EightBits():
            # Rounded to float16 first, as bitsandbytes' own layer does.
            codes, stats, _ = _operations().int8_vectorwise_quant.default(values.half(), 0.0)
            return EightBitLinear(codes=codes, scales=stats / 127, bias=None)
        case _:
            assert_never(wanted)


def stored_form(name: str, values: Tensor, wanted: Format, *, nested: bool) -> dict[str, Tensor]:
    """Returns the tensors, by name, as which bitsandbytes stores a matrix that it quantizes.

    Args:
        name: Of the weight.
        values: [num_outputs, num_inputs] of 16 or 32 bits.
        wanted: The format.
        nested: Whether scales of 4 bits are kept in 8 bits.
    """
    match wanted:
        case FourBits():
            # Late, as its import takes seconds.
            from bitsandbytes.functional import quantize_4bit  # noqa: PLC0415

            codes, state = quantize_4bit(
                values,
                blocksize=wanted.block_size,
                quant_type=wanted.codebook,
                compress_statistics=nested,
            )
            companions = state.as_dict(packed=True)
            return {name: codes} | {f"{name}.{key}": each for key, each in companions.items()}
        case EightBits():
            codes, stats, _ = _operations().int8_vectorwise_quant.default(values.half(), 0.0)
            module = name.removesuffix(".weight")
            row_after_row = torch.tensor(0, dtype=torch.uint8)
            return {name: codes, f"{module}.SCB": stats, f"{module}.weight_format": row_after_row}
        case _:
            assert_never(wanted)


def _operations() -> ModuleType:
    # It registers them; late, as its import takes seconds.
    import bitsandbytes  # noqa: F401, PLC0415

    return torch.ops.bitsandbytes
