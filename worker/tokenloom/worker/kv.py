"""The KV pool: how large it is, and its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tokenloom.worker.attention import Pages
from tokenloom.worker.errors import PoolError
from tokenloom.worker.options import CPU_KV_CACHE, parse_bytes

if TYPE_CHECKING:
    from tokenloom.worker.config import ModelConfig


SAMPLING_COPIES = 9
"""Of the logits in float32: 7.3 were measured on a GPU, with all edits and logprobs for every
row."""


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Returns the bytes that one block takes in all layers, keys and values together."""
    position = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return position * block_size * dtype.itemsize


def scratch_bytes(
    config: ModelConfig, *, num_rows: int, num_step_tokens: int, dtype: torch.dtype
) -> int:
    """Returns the bytes that the largest step needs beside weights and pool, generously.

    `num_rows` requests that sample with every restriction, `num_step_tokens`
    tokens under way in a layer.
    """
    sampling = SAMPLING_COPIES * num_rows * config.vocab_size * torch.float32.itemsize
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    widths = 4 * config.intermediate_size + 3 * heads + 8 * config.hidden_size
    return sampling + num_step_tokens * widths * dtype.itemsize


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
    return max(0, int((free - scratch) * memory_fraction))


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
        """Allocates the blocks that fit in `num_bytes`, and the spare. Raises PoolError below 2."""
        one = block_bytes(config, block_size, dtype)
        self.num_blocks = num_bytes // one
        if self.num_blocks < 2:
            raise PoolError(
                f"the KV pool has {num_bytes} bytes; 2 blocks of {block_size} positions take"
                f" {2 * one}"
            )
        self.num_bytes = self.num_blocks * one
        shape = (
            config.num_layers,
            self.num_blocks + 1,
            block_size,
            config.num_kv_heads,
            config.head_dim,
        )
        self.pages = Pages(
            keys=torch.zeros(shape, dtype=dtype, device=device),
            values=torch.zeros(shape, dtype=dtype, device=device),
        )

    def clear(self, blocks: torch.Tensor) -> None:
        """Zeroes int64 [num_cleared] blocks in all layers."""
        self.pages.keys.index_fill_(1, blocks, 0)
        self.pages.values.index_fill_(1, blocks, 0)
