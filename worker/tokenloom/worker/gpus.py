"""GPUs that a model can be planned for: memory and bandwidth, from vendor's datasheets.

Memory is what CUDA reports as the total (`torch.cuda.mem_get_info`), a few percent less than the
name says: with ECC on, and without what the driver keeps. Sources: for H200 a machine that was
measured, for the others what torch quotes in messages about exhausted memory. Bandwidth is
NVIDIA's datasheet of each; of the A100 and the H100 the SXM form unless the name says PCIe, of the
B200 an eighth of a DGX B200's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

CAPABILITY_FP8 = (8, 9)
"""Compute capability from which kernels write and read 8-bit floats."""
_CAPABILITY_BFLOAT16 = (8, 0)
FLASH4_GENERATIONS = (9, 10)
"""Major compute capabilities for which flash-attn-4 has kernels for paged keys and values."""
FLASH4_HEAD_DIMS = range(8, 129, 8)
"""And sizes of heads."""
_GIB = 1024**3
_COPY_SHARE = 4.3 / 4.8
"""Of the datasheet's bandwidth what a large copy reaches: measured on an H200, taken for all."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU, or, with only a memory, whichever has that."""

    name: str
    memory_bytes: int
    """As CUDA reports it."""
    datasheet_bytes_per_s: float | None
    """None: not known."""
    capability: tuple[int, int] | None = None
    """CUDA's compute capability. None: not known, taken for one that has everything."""

    @property
    def bytes_per_s(self) -> float | None:
        """What a kernel that is bound by memory can reach."""
        datasheet = self.datasheet_bytes_per_s
        return None if datasheet is None else datasheet * _COPY_SHARE

    @property
    def has_bfloat16(self) -> bool:
        """Turing has no units for it."""
        return self.capability is None or self.capability >= _CAPABILITY_BFLOAT16

    @property
    def has_fp8(self) -> bool:
        """Nor have it and Ampere instructions for 8-bit floats."""
        return self.capability is None or self.capability >= CAPABILITY_FP8

    @property
    def has_flash4(self) -> bool:
        """Hopper has, and Blackwell for servers."""
        return self.capability is None or self.capability[0] in FLASH4_GENERATIONS


def _gpu(name: str, memory_gib: float, gigabytes_per_s: float, capability: tuple[int, int]) -> Gpu:
    return Gpu(
        name=name,
        memory_bytes=int(memory_gib * _GIB),
        datasheet_bytes_per_s=gigabytes_per_s * 1e9,
        capability=capability,
    )


GPUS = (
    _gpu("T4", 14.56, 300, (7, 5)),
    _gpu("L4", 22.03, 300, (8, 9)),
    _gpu("A10G", 22.06, 600, (8, 6)),
    _gpu("RTX 3090", 23.68, 936, (8, 6)),
    _gpu("RTX 4090", 23.64, 1008, (8, 9)),
    _gpu("RTX 5090", 31.36, 1792, (12, 0)),
    _gpu("A100 40GB", 39.38, 1555, (8, 0)),
    _gpu("L40S", 44.39, 864, (8, 9)),
    _gpu("A100 80GB", 79.14, 2039, (8, 0)),
    _gpu("H100 PCIe", 79.11, 2000, (9, 0)),
    _gpu("H100", 79.11, 3350, (9, 0)),
    _gpu("H200", 139.80, 4800, (9, 0)),
    _gpu("B200", 178.35, 8000, (10, 0)),
)
"""Smaller ones first; of those with as much memory the slower ones."""


def find_gpu(name: str) -> Gpu:
    """Returns the GPU called `h200` or `A100-80GB`. Raises ValueError."""
    for gpu in GPUS:
        if _plain(gpu.name) == _plain(name):
            return gpu
    names = ", ".join(gpu.name for gpu in GPUS)
    raise ValueError(f"{name!r} is not in the list: {names}; for any other tell its --memory")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
