"""Kernels in Triton's interpreter beside their twins; started by a test, in a process of its own.

    TRITON_INTERPRET=1 python -m tests.worker.interpreted

The variable counts when Triton is imported, and would interpret the GPU's tests as well.
The interpreter does not multiply matrices of bfloat16, so all is float16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from tests.worker import kernel_cases
from tests.worker.kernel_cases import Heads
from tokenloom.worker.kernels.fused import FusedOperations

DTYPE, DEVICE = torch.float16, "cpu"


def round_codes_as_hardware_does() -> None:
    """Triton 3.6's interpreter lets a rounding to 8 bits get lost that reaches the exponent."""
    convert = interpreter._convert_float

    def rounded(numbers: Any, source: tl.dtype, target: tl.dtype, mode: Any) -> Any:  # noqa: ANN401 - Triton's own, without types
        if target != tl.float8e4nv:
            return convert(numbers, source, target, mode)
        codes = torch.from_numpy(np.ascontiguousarray(numbers)).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8).numpy()

    interpreter._convert_float = rounded


def main() -> None:
    round_codes_as_hardware_does()
    operations = FusedOperations()
    kernel_cases.assert_norms_like_its_twin(operations, 3, 100, DTYPE, DEVICE)
    kernel_cases.assert_activates_like_its_twin(operations, 3, 100, DTYPE, DEVICE)
    for coded in (False, True):
        kernel_cases.assert_places_heads_like_its_twin(
            operations,
            Heads(num_heads=9, num_kv_heads=3, head_dim=24),
            num_tokens=2,
            normed=True,
            dtype=DTYPE,
            device=DEVICE,
            coded=coded,
        )
    for num_rows, num_outputs, num_inputs, bias in (
        (1, 13, 40, False),
        (1, 6, 2100, True),
        (1, 21, 72, True),
        (1, 40, 1024, False),
    ):
        case = kernel_cases.linear_case(
            num_rows, num_outputs, num_inputs, bias=bias, dtype=DTYPE, device=DEVICE
        )
        kernel_cases.assert_multiplies_like_its_twin(operations, case)
        kernel_cases.assert_multiplies_like_its_twin(operations, case, kernel_cases.Twins())


if __name__ == "__main__":
    main()
