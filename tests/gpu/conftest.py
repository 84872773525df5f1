from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# Triton comes with torch's CUDA builds alone. Without it these cannot be imported; without a GPU
# they would be skipped all the same.
_NEED_TRITON = [
    "test_decode_rows.py",
    "test_draw.py",
    "test_four_bit.py",
    "test_kernels.py",
    "test_linear.py",
    "test_triton_attention.py",
]
collect_ignore = [] if find_spec("triton") else _NEED_TRITON


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
