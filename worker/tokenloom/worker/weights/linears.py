"""Matrices that rows of activations are multiplied with, in the forms in which they are kept.

    form      an output's weight for input k                    bytes a weight, Llama-3 8B
    dense     weight[k]                                          2
    4 bits    codebook[codes[k]] * absmax[k // block_size]       0.5 + 4 / 64
    8 bits    codes[k] * scale                                   1

Codes and scales are bitsandbytes' own. Called as they are, 4 and 8 bits are made dense in
float32, rounded to the rows' type and multiplied, some outputs at a time: what kernels are tested
against. 8 bits with a threshold are multiplied as bitsandbytes does it, which is slow and has no
kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from tokenloom.worker.memory import DENSE_BYTES, MAX_WEIGHT_BYTES
from tokenloom.worker.weights.formats import CODEBOOKS

_ALIGNED_OUTPUTS = 64
"""A part's products begin on whole 128 bytes: at other addresses the library has slow kernels."""


@dataclass(frozen=True, kw_only=True)
class DenseLinear:
    """A matrix in the type of the activations."""

    weight: Tensor
    """[num_outputs, num_inputs]"""
    bias: Tensor | None
    """[num_outputs]"""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        num_outputs, num_inputs = self.weight.shape
        return num_outputs, num_inputs

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return _num_bytes(self.weight, self.bias)

    def rows(self, first: int, last: int) -> DenseLinear:
        """Returns the matrix of a range of outputs, without bias, in the same memory."""
        return replace(self, weight=self.weight[first:last], bias=None)

    def __call__(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns [num_rows, num_outputs], in `out` if given, for [num_rows, num_inputs]."""
        return _multiply(rows, self.weight, self.bias, out)


@dataclass(frozen=True, kw_only=True)
class FourBitLinear:
    """A matrix of codes for 16 values, scaled by runs of inputs."""

    codes: Tensor
    """uint8 [num_outputs, num_inputs / 2]; of a byte's two inputs the first is the high nibble"""
    absmax: Tensor
    """float32 [num_outputs, num_inputs / block_size]"""
    codebook: Tensor
    """float32 [16] from -1 to 1, bitsandbytes' NF4 or FP4"""
    bias: Tensor | None
    """[num_outputs] in the type of the activations"""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        num_outputs, num_bytes = self.codes.shape
        return num_outputs, 2 * num_bytes

    @property
    def block_size(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // self.absmax.shape[1]

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return _num_bytes(self.codes, self.absmax, self.bias)

    def rows(self, first: int, last: int) -> FourBitLinear:
        """Returns the matrix of a range of outputs, without bias, in the same memory."""
        return replace(
            self, codes=self.codes[first:last], absmax=self.absmax[first:last], bias=None
        )

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Returns [num_outputs, num_inputs] values: each product in float32, then rounded."""
        pairs = torch.cartesian_prod(self.codebook, self.codebook)  # [256, 2] of each byte
        values = functional.embedding(self.codes.int(), pairs)  # [num_outputs, bytes, 2]
        blocks = values.view(*self.absmax.shape, self.block_size)
        return blocks.mul_(self.absmax[..., None]).view(self.shape).to(dtype)

    def __call__(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns [num_rows, num_outputs], in `out` if given, for [num_rows, num_inputs]."""
        return multiply_in_parts(rows, self, out, FourBitLinear.dense, MAX_WEIGHT_BYTES)


@dataclass(frozen=True, kw_only=True)
class EightBitLinear:
    """A matrix of whole numbers from -127 to 127, each output's scaled by one number."""

    codes: Tensor
    """int8 [num_outputs, num_inputs]"""
    scales: Tensor
    """float32 [num_outputs]: bitsandbytes' SCB / 127"""
    bias: Tensor | None
    """[num_outputs] in the type of the activations"""
    threshold: float = 0.0
    """Above 0, rows are quantized but for inputs where one of them reaches it"""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        num_outputs, num_inputs = self.codes.shape
        return num_outputs, num_inputs

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return _num_bytes(self.codes, self.scales, self.bias)

    def rows(self, first: int, last: int) -> EightBitLinear:
        """Returns the matrix of a range of outputs, without bias, in the same memory."""
        return replace(
            self, codes=self.codes[first:last], scales=self.scales[first:last], bias=None
        )

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Returns [num_outputs, num_inputs] values: each product in float32, then rounded."""
        return self.codes.float().mul_(self.scales[:, None]).to(dtype)

    def __call__(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns [num_rows, num_outputs], in `out` if given, for [num_rows, num_inputs]."""
        if self.threshold == 0:
            return multiply_in_parts(rows, self, out, EightBitLinear.dense, MAX_WEIGHT_BYTES)
        taken = _quantized_but_outliers(rows, self.threshold)
        if out is None:
            out = rows.new_empty((len(rows), self.shape[0]))
        for first, last in _parts(self.shape, MAX_WEIGHT_BYTES):
            bias = None if self.bias is None else self.bias[first:last].float()
            part = self.rows(first, last)
            out[:, first:last] = functional.linear(taken, part.dense(torch.float32), bias)
        return out


Linear: TypeAlias = DenseLinear | FourBitLinear | EightBitLinear
Coded = TypeVar("Coded", FourBitLinear, EightBitLinear)


def multiply_in_parts(
    rows: Tensor,
    linear: Coded,
    out: Tensor | None,
    make_dense: Callable[[Coded, torch.dtype], Tensor],
    weight_bytes: int,
) -> Tensor:
    """Returns [num_rows, num_outputs], in `out` if given, for [num_rows, num_inputs].

    As many outputs are made dense at a time as take DENSE_BYTES, and the library multiplies.

    Args:
        rows: Of the type in which is multiplied.
        linear: The matrix.
        out: Where the result goes, if that matters.
        make_dense: Returns a matrix's values, [num_outputs, num_inputs], in a type.
        weight_bytes: What it takes of memory for each.
    """
    parts = list(_parts(linear.shape, weight_bytes))
    if len(parts) == 1:
        return _multiply(rows, make_dense(linear, rows.dtype), linear.bias, out)
    if out is None:
        out = rows.new_empty((len(rows), linear.shape[0]))
    for first, last in parts:
        part, product = linear.rows(first, last), out[:, first:last]
        torch.mm(rows, make_dense(part, rows.dtype).T, out=product)  # no name: one at a time
    return out if linear.bias is None else out.add_(linear.bias)


def _parts(shape: tuple[int, int], weight_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields the ranges of outputs that are made dense at a time."""
    num_outputs, num_inputs = shape
    at_once = max(1, DENSE_BYTES // weight_bytes // num_inputs)
    if at_once < num_outputs:
        at_once -= at_once % min(at_once, _ALIGNED_OUTPUTS)
    for first in range(0, num_outputs, at_once):
        yield first, min(first + at_once, num_outputs)


@cache
def codebook(name: str, device: torch.device) -> Tensor:
    """Returns float32 [16]: what the codes of `nf4` or `fp4` stand for; all share it.

    To make one waits for the device. It stays: it is 64 bytes.
    """
    return torch.tensor(CODEBOOKS[name], dtype=torch.float32, device=device)


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if out is None:
        return functional.linear(rows, weight, bias)
    torch.mm(rows, weight.T, out=out)
    return out if bias is None else out.add_(bias)


def _num_bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _quantized_but_outliers(rows: Tensor, threshold: float) -> Tensor:
    """Returns float32 [num_rows, num_inputs]: what LLM.int8() multiplies (Dettmers et al., 2022).

    Numbers that reach the threshold count for no row's scale. Their inputs stay as they are in
    all rows, whose other numbers are rounded to -127 … 127 of the scale.
    """
    wide = rows.float()
    outliers = wide.abs() >= threshold
    scales = wide.masked_fill(outliers, 0).abs_().amax(1, keepdim=True) / 127
    # In place: of a long step, rows in float32 take as much as all else that is under way.
    taken = (wide / scales.masked_fill(scales == 0, 1)).round_().mul_(scales)
    return torch.where(outliers.any(0), wide, taken, out=taken)
