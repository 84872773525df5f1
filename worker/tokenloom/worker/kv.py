"""The KV pool and its memory, out of what the weights leave of a device."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

import torch

from tokenloom.worker.attention import Pages, Scales
from tokenloom.worker.errors import PoolError
from tokenloom.worker.fp8 import CODE_DTYPE, SCALE_DTYPE
from tokenloom.worker.memory import FP8_BYTES, MIN_BLOCKS, KVBytes, block_bytes, pool_share
from tokenloom.worker.options import CPU_KV_CACHE, parse_bytes

if TYPE_CHECKING:
    from tokenloom.worker.config import ModelConfig


def pool_bytes(
    device: torch.device, *, fixed_bytes: int | None, memory_fraction: float, scratch: int
) -> int:
    """Returns the bytes for the pool, to be asked when the weights have their memory.

    A fixed size if there is one; else, on CUDA, a fraction of what is free and
    not scratch; else CPU_KV_CACHE.
    """
    if fixed_bytes is not None:
        return fixed_bytes
    if device.type != "cuda":
        return parse_bytes(CPU_KV_CACHE)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return pool_share(free, scratch=scratch, memory_fraction=memory_fraction)


class KVPool:
    """The blocks of all layers. Every block is zero until a request writes to it.

    Kernels read whole blocks and mask what a request has not written; a NaN left
    there by another request would survive the mask. Behind the `num_blocks` that
    requests share lies a spare one, where rows write that are nobody's.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_bytes: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocates the blocks that fit in `num_bytes`, and the spare. Raises PoolError.

        With CODE_DTYPE they have scales.
        """
        coded = dtype == CODE_DTYPE
        kv_bytes = FP8_BYTES if coded else KVBytes(item=dtype.itemsize)
        one = block_bytes(config, block_size, kv_bytes)
        self.num_blocks = num_bytes // one
        if self.num_blocks < MIN_BLOCKS:
            raise PoolError(
                f"the KV pool has {num_bytes} bytes; {MIN_BLOCKS} blocks of {block_size} positions"
                f" take {MIN_BLOCKS * one}"
            )
        self.num_bytes = self.num_blocks * one
        rows = (config.num_layers, self.num_blocks + 1, config.num_kv_heads, block_size)
        shape = (*rows[:2], block_size, config.num_kv_heads, config.head_dim)
        keys = torch.zeros(shape, dtype=dtype, device=device)
        values = torch.zeros(shape, dtype=dtype, device=device)
        scales = None
        if coded:
            scales = Scales(
                keys=torch.ones(rows, dtype=SCALE_DTYPE, device=device),
                values=torch.ones(rows, dtype=SCALE_DTYPE, device=device),
            )
        self.pages = Pages(keys=keys, values=values, scales=scales)

    def outline(self) -> KVPool:
        """Returns the pool on torch's meta device: shapes without content."""
        outlined = copy(self)
        outlined.pages = self.pages.outline()
        return outlined

    def clear(self, blocks: torch.Tensor) -> None:
        """Zeroes int64 [num_cleared] blocks in all layers."""
        for numbers in (self.pages.keys, self.pages.values):
            # torch fills no codes as such; they are bytes. Any scale of 0 is 0.
            filled = numbers if self.pages.scales is None else numbers.view(torch.uint8)
            filled.index_fill_(1, blocks, 0)
