"""Kernels beside their twins: on a GPU as compiled, elsewhere in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.worker.attention_cases import AttentionCase, as_codes, make_case
from tokenloom.worker.attention import Attention, Pages, Scales
from tokenloom.worker.attention.reference import ReferenceAttention
from tokenloom.worker.kernels import Operations, Residual
from tokenloom.worker.kernels.twin import TorchOperations
from tokenloom.worker.ranks import ALONE, Alone, Ranks
from tokenloom.worker.weights.linears import DenseLinear, EightBitLinear, Linear

EPS = 1e-6
ATTENTION_ERROR = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 5e-6}
"""Of attention's result against float64, relative: what the type itself cannot say."""
ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20}
"""One step of the type, relative; for float32 what another order of a sum changes."""


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch hands out without content, so that every cell must be written."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 99)

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        return poison(empty(*args, **kwargs))  # type: ignore[call-overload]

    def poisoned_like(like: Tensor, **kwargs: object) -> Tensor:
        return poison(empty_like(like, **kwargs))  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", poisoned_like)


@dataclass(frozen=True, kw_only=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    head_dim: int


def attention_case(
    spans: Sequence[tuple[int, int]],
    heads: Heads,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: str,
    coded: bool = False,
) -> AttentionCase:
    """Returns a case with NaN wherever no request has written; its pages may be in 8 bits."""
    case = make_case(
        spans,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        block_size=block_size,
        dtype=dtype,
        device=device,
        rest=float("nan"),
        seed=sum(map(sum, spans)) + heads.num_heads + heads.head_dim,
    )
    return replace(case, pages=as_codes(case.pages)) if coded else case


def assert_attends_like_its_twin(
    attention: Attention, case: AttentionCase, window: int | None
) -> None:
    """Compares with the twin in float64."""
    exact = ReferenceAttention(block_size=attention.block_size).attend(
        _exact(case.pages),
        0,
        case.queries.double(),
        case.step,
        window,
    )
    mixed = attention.attend(case.pages, 0, case.queries, case.step, window)
    assert mixed.isfinite().all()
    error = (mixed.double() - exact).norm() / exact.norm()
    assert float(error) < ATTENTION_ERROR[case.queries.dtype]
    # No token is wrong on its own.
    token_errors = (mixed.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert float(token_errors.max()) < 4 * ATTENTION_ERROR[case.queries.dtype]


def wide(pages: Pages) -> tuple[Tensor, Tensor]:
    """Returns keys and values in float64."""
    keys, values = pages.keys.double(), pages.values.double()
    if pages.scales is not None:
        keys = keys * pages.scales.keys.transpose(2, 3)[..., None]
        values = values * pages.scales.values.transpose(2, 3)[..., None]
    return keys, values


def _exact(pages: Pages) -> Pages:
    """Returns what the pages say, in float64, with 0 where nobody wrote."""
    keys, values = wide(pages)
    return Pages(keys=keys.nan_to_num(), values=values.nan_to_num())


def finite(pages: Pages) -> Pages:
    """Returns coded pages with zeros where nobody wrote."""
    assert pages.scales is not None

    def zeroed(codes: Tensor) -> Tensor:
        return codes.float().nan_to_num().to(codes.dtype)

    scales = Scales(keys=pages.scales.keys.nan_to_num(1), values=pages.scales.values.nan_to_num(1))
    return Pages(keys=zeroed(pages.keys), values=zeroed(pages.values), scales=scales)


def assert_norms_like_its_twin(
    operations: Operations, num_rows: int, size: int, dtype: torch.dtype, device: str
) -> None:
    rng = torch.Generator().manual_seed(num_rows + size)
    hidden, update = (
        (3 * torch.randn(num_rows, size, generator=rng)).to(device, dtype) for _ in range(2)
    )
    weight = torch.randn(size, generator=rng).to(device, dtype)
    twin, expected = TorchOperations(), hidden.clone()
    torch.testing.assert_close(
        operations.norm(hidden, weight, EPS),
        twin.norm(hidden, weight, EPS),
        rtol=2 * ULP[dtype],
        atol=0,
    )
    expected_norm = twin.add_norm(expected, update, weight, EPS)
    normed = operations.add_norm(hidden, update, weight, EPS)
    assert torch.equal(hidden, expected)
    torch.testing.assert_close(normed, expected_norm, rtol=2 * ULP[dtype], atol=0)
    # Whole numbers: in which order they are added up makes no difference.
    partial_sums = torch.randint(-9, 9, (3, num_rows, size), generator=rng).to(device).float()
    expected_norm = twin.add_norm(expected, partial_sums, weight, EPS)
    normed = operations.add_norm(hidden, partial_sums, weight, EPS)
    assert torch.equal(hidden, expected)
    torch.testing.assert_close(normed, expected_norm, rtol=2 * ULP[dtype], atol=0)


def assert_places_heads_like_its_twin(
    operations: Operations,
    heads: Heads,
    *,
    num_tokens: int,
    normed: bool,
    dtype: torch.dtype,
    device: str,
    coded: bool = False,
) -> None:
    rng = torch.Generator().manual_seed(num_tokens + heads.num_heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(device, dtype)

    num_blocks, block_size = num_tokens // 16 + 2, 16
    qkv = normal(num_tokens, (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim)
    turns = 6.3 * torch.rand(num_tokens, heads.head_dim // 2, generator=rng)
    angles = torch.stack((turns.cos(), turns.sin()), dim=1).to(device, dtype)
    places = torch.randperm(num_blocks * block_size, generator=rng)[:num_tokens].to(device)
    shape = (1, num_blocks, block_size, heads.num_kv_heads, heads.head_dim)
    norms = (normal(heads.head_dim), normal(heads.head_dim)) if normed else None
    results = []
    for each in (operations, TorchOperations()):
        pages = Pages(
            keys=torch.zeros(shape, dtype=dtype, device=device),
            values=torch.zeros(shape, dtype=dtype, device=device),
        )
        pages = as_codes(pages) if coded else pages
        queries = each.place_heads(qkv, angles, places, pages, 0, norms, EPS)
        results.append((queries, *wide(pages)))
    (queries, keys, values), (expected_queries, expected_keys, expected_values) = results
    assert torch.equal(values, expected_values)
    # The kernel multiplies and adds in one instruction, so it rounds a product less than
    # the twin does; a difference of products brings that to the front.
    for mine, expected in ((queries, expected_queries), (keys, expected_keys)):
        atol = (32 if normed else 16) * ULP[dtype]
        # Of codes, what lies by half a rounding of theirs may fall on either side: some do, and of
        # few numbers it may be the largest.
        of_codes = coded and mine is keys
        torch.testing.assert_close(mine, expected, rtol=2**-3 if of_codes else 0, atol=atol)
        bound = expected.double().norm() * (2**-6 if of_codes else ULP[dtype])
        if of_codes:
            bound += expected.double().abs().max() / 8
        assert (mine - expected).double().norm() < bound


def assert_activates_like_its_twin(
    operations: Operations, num_rows: int, size: int, dtype: torch.dtype, device: str
) -> None:
    rng = torch.Generator().manual_seed(num_rows + size)
    gate_up = (4 * torch.randn(num_rows, 2 * size, generator=rng)).to(device, dtype)
    torch.testing.assert_close(
        operations.silu_mul(gate_up),
        TorchOperations().silu_mul(gate_up),
        rtol=2 * ULP[dtype],
        atol=2e-6,
    )


@dataclass(frozen=True, kw_only=True)
class LinearCase:
    """Rows, a matrix that takes them, one that takes gated halves of its result, and a norm."""

    hidden: Tensor
    norm_weight: Tensor
    wide: Linear
    """[2 * num_outputs, num_inputs]"""
    narrow: Linear
    """[num_inputs, num_outputs]"""

    def apply(self, operations: Operations, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what each operation with a matmul makes of it."""
        residual = Residual(self.hidden.clone(), ranks=ranks)
        product = operations.norm_linear(residual, self.norm_weight, EPS, self.wide)
        gated = operations.norm_gate_up(residual, self.norm_weight, EPS, self.wide)
        operations.add_linear(residual, product[:, : gated.shape[1]].contiguous(), self.narrow)
        return product, gated, residual.sum()


def linear_case(
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    *,
    bias: bool,
    dtype: torch.dtype,
    device: str,
) -> LinearCase:
    rng = torch.Generator(device).manual_seed(num_rows + num_outputs + num_inputs)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device)

    def linear(num_outputs: int, num_inputs: int) -> DenseLinear:
        weight = normal(num_outputs, num_inputs) * num_inputs**-0.5
        own = normal(num_outputs).to(dtype) if bias else None
        return DenseLinear(weight=weight.to(dtype), bias=own)

    return LinearCase(
        hidden=(3 * normal(num_rows, num_inputs)).to(dtype),
        norm_weight=(1 + 0.2 * normal(num_inputs)).to(dtype),
        wide=linear(2 * num_outputs, num_inputs),
        narrow=linear(num_inputs, num_outputs),
    )


def eight_bit_linear(
    num_outputs: int, num_inputs: int, *, bias: bool, dtype: torch.dtype, device: str
) -> EightBitLinear:
    """Returns a random matrix that leaves the size of numbers as it is."""
    rng = torch.Generator(device).manual_seed(num_outputs + num_inputs)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device)

    codes = (40 * normal(num_outputs, num_inputs)).round().clamp(-127, 127)
    own = normal(num_outputs).to(dtype) if bias else None
    spread = 0.5 + torch.rand(num_outputs, generator=rng, device=device)
    return EightBitLinear(
        codes=codes.to(torch.int8), scales=spread / 40 * num_inputs**-0.5, bias=own
    )


def eight_bit_case(
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    *,
    bias: bool,
    dtype: torch.dtype,
    device: str,
) -> LinearCase:
    """Returns a `linear_case` whose matrices are of 8 bits."""
    dense = linear_case(num_rows, 1, num_inputs, bias=bias, dtype=dtype, device=device)
    return replace(
        dense,
        wide=eight_bit_linear(2 * num_outputs, num_inputs, bias=bias, dtype=dtype, device=device),
        narrow=eight_bit_linear(num_inputs, num_outputs, bias=bias, dtype=dtype, device=device),
    )


class Twins(Alone):
    """One of two ranks, of which the other has the same part of each sum."""

    num_ranks = 2

    def sum(self, parts: Tensor) -> Tensor:
        return parts.mul_(2)


def assert_multiplies_like_its_twin(
    operations: Operations, case: LinearCase, ranks: Ranks = ALONE
) -> None:
    results = case.apply(operations, ranks), case.apply(TorchOperations(), ranks)
    for mine, expected in zip(*results, strict=True):
        assert mine.shape == expected.shape
        wrong = (mine.double() - expected.double()).norm(dim=1)
        # Few results fall on the other side of a rounding; no row is wrong on its own. A row of
        # a number or two has nothing to average that over, and what it lost by being small
        # (all are around 1) it lost to both; of matrices of one input the library rounds each
        # product before it adds the bias.
        few = min(mine.shape[1], case.narrow.shape[1]) <= 2
        bound = ULP[mine.dtype] * (2 if few else 0.5)
        scale = expected.double().norm(dim=1).clamp(min=mine.shape[1] ** 0.5)
        assert float((wrong / scale).max()) < bound
