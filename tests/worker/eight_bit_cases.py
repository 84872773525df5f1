"""What the tests of 8-bit matmuls compare with, on a GPU and in Triton's interpreter."""

from __future__ import annotations

from torch import Tensor

from tests.worker.kernel_cases import ULP, LinearCase
from tokenloom.worker.kernels import Operations, Residual
from tokenloom.worker.kernels.twin import TorchOperations
from tokenloom.worker.weights.linears import EightBitLinear, Linear


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rows as whole numbers from -127 to 127, and [num_rows, 1] what a 1 stands for."""
    scales = rows.double().abs().amax(1, keepdim=True) / 127
    return (rows.double() / scales.masked_fill(scales == 0, 1)).round(), scales


def exact(rows: Tensor, linear: EightBitLinear) -> Tensor:
    """Returns float64 [num_rows, num_outputs] without any rounding but float64's own."""
    product = rows.double() @ linear.codes.double().T * linear.scales.double()
    return product if linear.bias is None else product + linear.bias.double()


class EightBitTwin(TorchOperations):
    """The operations in torch with exact products, of rows as they are or quantized before."""

    def __init__(self, *, quantizes: bool) -> None:
        self._quantizes = quantizes

    def norm_linear(
        self,
        residual: Residual,
        weight: Tensor,
        eps: float,
        linear: Linear,
        out: Tensor | None = None,
    ) -> Tensor:
        assert out is None
        return self._multiply(self.norm(residual.sum(), weight, eps), linear)

    def add_linear(self, residual: Residual, rows: Tensor, linear: Linear) -> None:
        residual.add_later(self._multiply(rows, linear))

    def _multiply(self, rows: Tensor, linear: Linear) -> Tensor:
        assert isinstance(linear, EightBitLinear)
        if self._quantizes:
            codes, scales = quantized(rows)
            return exact(codes * scales, linear).to(rows.dtype)
        return exact(rows, linear).to(rows.dtype)


def assert_multiplies_like_its_twin(operations: Operations, case: LinearCase) -> None:
    """Compares; of more than 32 rows each number is quantized to a byte on the way."""
    quantizes = len(case.hidden) > 32
    results = case.apply(operations), case.apply(EightBitTwin(quantizes=quantizes))
    for mine, expected in zip(*results, strict=True):
        assert mine.shape == expected.shape
        wrong = (mine.double() - expected.double()).norm(dim=1)
        scale = expected.double().norm(dim=1).clamp(min=mine.shape[1] ** 0.5)
        rounding = ULP[mine.dtype] * (2 if mine.shape[1] <= 2 else 0.5)
        far_off = wrong / scale > rounding
        # A number between two codes may become either, as the norm's sum is rounded. That is
        # seen in few rows, and is small beside what a row loses by being quantized.
        assert float(far_off.double().mean()) <= (0.2 if quantizes else 0)
        assert float((wrong / scale).max()) < max(rounding, 3e-2 if quantizes else 0)
