"""Dense values to codes and scales, by bitsandbytes: the one place that imports it.

It is imported when something is to be quantized: a checkpoint that is quantized needs none of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import assert_never

import torch
from torch import Tensor

from tokenloom.worker.errors import LoadError
from tokenloom.worker.weights.formats import EightBits, Format, FourBits
from tokenloom.worker.weights.linears import EightBitLinear, FourBitLinear, codebook


def load_bitsandbytes() -> None:
    """Makes the functions below work; to be called where no other thread imports anything.

    Raises:
        LoadError: It is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise LoadError("bitsandbytes is not installed; quantizing needs it")
    # Of a faster matmul on CPUs, which is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # What it wraps while it is imported are twins of its kernels; to prepare their compiling
    # takes seconds, to import the rest tenths of one.
    compile_function = torch.compile
    torch.compile = lambda function, **_: function  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401, PLC0415 - it registers torch.ops.bitsandbytes
    finally:
        torch.compile = compile_function


@contextmanager
def _in_order_with_default_stream(device: torch.device) -> Iterator[None]:
    """Puts what is launched within it between what the current stream was given and is given next.

    bitsandbytes quantizes blocks on the default stream, whichever is current
    (bitsandbytes-foundation/bitsandbytes#2052).
    """
    if device.type != "cuda":
        yield
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(current)
    yield
    current.wait_stream(default)


def quantized(values: Tensor, wanted: Format) -> FourBitLinear | EightBitLinear:
    """Returns [num_outputs, num_inputs] values of 16 or 32 bits, quantized where they are.

    For FourBits the inputs are a multiple of the block size.
    """
    num_outputs, num_inputs = values.shape
    match wanted:
        case FourBits():
            with _in_order_with_default_stream(values.device):
                codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
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
            codes, stats, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(
                values.half(), 0.0
            )
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
            # Not before `load_bitsandbytes`.
            from bitsandbytes.functional import quantize_4bit  # noqa: PLC0415

            with _in_order_with_default_stream(values.device):
                codes, state = quantize_4bit(
                    values,
                    blocksize=wanted.block_size,
                    quant_type=wanted.codebook,
                    compress_statistics=nested,
                )
            companions = state.as_dict(packed=True)
            return {name: codes} | {f"{name}.{key}": each for key, each in companions.items()}
        case EightBits():
            codes, stats, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(
                values.half(), 0.0
            )
            module = name.removesuffix(".weight")
            row_after_row = torch.tensor(0, dtype=torch.uint8)
            return {name: codes, f"{module}.SCB": stats, f"{module}.weight_format": row_after_row}
        case _:
            assert_never(wanted)
