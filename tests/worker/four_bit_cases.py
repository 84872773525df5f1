"""Matrices of 4 bits and what multiplying with them is to give."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tests.worker import kernel_cases
from tests.worker.kernel_cases import EPS, LinearCase
from tokenloom.worker.kernels import Operations, Residual
from tokenloom.worker.kernels.twin import TorchOperations
from tokenloom.worker.weights.linears import DenseLinear, FourBitLinear, Linear, codebook

FLOAT32 = torch.float32


def four_bit_linear(
    num_outputs: int,
    num_inputs: int,
    *,
    name: str = "nf4",
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    block_size: int = 64,
) -> FourBitLinear:
    """Returns a random matrix that leaves the size of numbers about as it is."""
    rng = torch.Generator(device).manual_seed(num_outputs + num_inputs)
    spread = 0.5 + torch.rand(num_outputs, num_inputs // block_size, generator=rng, device=device)
    own = torch.randn(num_outputs, generator=rng, device=device).to(dtype) if bias else None
    shape = (num_outputs, num_inputs // 2)
    return FourBitLinear(
        codes=torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng, device=device),
        absmax=2 * num_inputs**-0.5 * spread,
        codebook=codebook(name, torch.device(device)),
        bias=own,
    )


def four_bit_case(
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    *,
    name: str = "nf4",
    bias: bool,
    dtype: torch.dtype,
    device: str = "cuda",
) -> LinearCase:
    """Returns a `linear_case` whose matrices are of 4 bits."""

    def linear(num_outputs: int, num_inputs: int) -> FourBitLinear:
        return four_bit_linear(
            num_outputs, num_inputs, name=name, bias=bias, dtype=dtype, device=device
        )

    dense = kernel_cases.linear_case(num_rows, 1, num_inputs, bias=bias, dtype=dtype, device=device)
    return replace(
        dense, wide=linear(2 * num_outputs, num_inputs), narrow=linear(num_inputs, num_outputs)
    )


def widened(linear: Linear) -> DenseLinear:
    """Returns a matrix of 4 bits in float32, as exact as its scales."""
    assert isinstance(linear, FourBitLinear)
    bias = None if linear.bias is None else linear.bias.float()
    return DenseLinear(weight=linear.dense(FLOAT32), bias=bias)


def exact(case: LinearCase, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns in float32 what operations make of a case, whose third begins with their product."""
    operations, norm = TorchOperations(), case.norm_weight.float()
    residual = Residual(case.hidden.float())
    wide = operations.norm_linear(residual, norm, EPS, widened(case.wide))
    gated = operations.norm_gate_up(residual, norm, EPS, widened(case.wide))
    rows = product[:, : gated.shape[1]].float()
    operations.add_linear(residual, rows, widened(case.narrow))
    return wide, gated, residual.sum()


def errors(operations: Operations, case: LinearCase) -> list[float]:
    """Returns how far each operation's result is from the exact one, relative."""
    results = case.apply(operations)
    return [
        float((mine.double() - right).norm() / right.double().norm())
        for mine, right in zip(results, exact(case, results[0]), strict=True)
    ]


def assert_as_exact_as_its_twin(operations: Operations, case: LinearCase) -> None:
    """The twin rounds each weight, as bitsandbytes does; rounding less is allowed, NaN is not."""
    mine, twins = errors(operations, case), errors(TorchOperations(), case)
    # Of few numbers some are lucky.
    allowed = 1.05 + 8 * len(case.hidden) ** -0.5 * case.narrow.shape[1] ** -0.5
    for own, twin in zip(mine, twins, strict=True):
        assert own < allowed * twin, (mine, twins)
