"""How a worker shares out a device's memory. Pure arithmetic, without torch.

    │ CUDA │ weights │ positions │ scratch │ KV pool │ left: graphs, rows │
                                 │← free once the weights are there ──────→│
                                           │← a fraction, and the rest ───→│

The worker allocates by it (`kv.py`), and `tokenloom plan` predicts by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenloom.worker.config import ModelConfig

CUDA_BYTES = 768 * 1024 * 1024
"""What CUDA's context and libraries take before a byte of the model is there: 0.72 and 0.75 GiB
were measured on an H200."""
CUDA_STEP_TOKENS = 8192
"""Long prompts are computed at the highest rate in steps of this size."""
CPU_STEP_TOKENS = 2048
"""A CPU computes longer steps no faster: others only wait longer for their end."""
DENSE_BYTES = 2**28
"""Of the room in which a matrix of codes is made dense, a part at a time."""
MAX_WEIGHT_BYTES = 6
"""Of a weight while it is made dense: in float32, beside its code or what it is rounded to."""
MIN_BLOCKS = 2
"""Of a KV pool."""
SAMPLING_COPIES = 9
"""Of the logits in float32: 7.3 were measured on a GPU, with all edits and logprobs for every
row."""
_FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class KVBytes:
    """What keys and values take."""

    item: int
    """Of a number"""
    scale: int = 0
    """Of what a head of a position is multiplied with"""


FP8_BYTES = KVBytes(item=1, scale=_FLOAT32_BYTES)


def block_bytes(config: ModelConfig, block_size: int, kv_bytes: KVBytes) -> int:
    """Returns the bytes that one block takes in all layers, keys and values together."""
    head = config.head_dim * kv_bytes.item + kv_bytes.scale
    return 2 * config.num_layers * config.num_kv_heads * block_size * head


def num_widened(*, max_model_tokens: int, num_step_tokens: int) -> int:
    """Returns how many positions of a layer in 8 bits are kept in the type of activations, too.

    flash-attn reads them there: one request, however long, and all tokens of a step beside it.
    """
    return max_model_tokens + num_step_tokens


def widened_bytes(config: ModelConfig, *, num_positions: int, item_bytes: int) -> int:
    """Returns the bytes of keys and values of so many positions of one layer."""
    return 2 * num_positions * config.num_kv_heads * config.head_dim * item_bytes


def scratch_bytes(
    config: ModelConfig,
    *,
    num_rows: int,
    num_step_tokens: int,
    item_bytes: int,
    makes_dense: bool = False,
) -> int:
    """Returns the bytes that the largest step needs beside weights and pool, generously.

    `num_rows` requests that sample with every restriction, `num_step_tokens`
    tokens under way in a layer, `item_bytes` an element of theirs. With `makes_dense`,
    some matrices are made dense; captured steps have memory of their own for that.
    """
    sampling = SAMPLING_COPIES * num_rows * config.vocab_size * _FLOAT32_BYTES
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    widths = 4 * config.intermediate_size + 3 * heads + 8 * config.hidden_size
    largest = max(2 * config.intermediate_size, config.vocab_size) * config.hidden_size
    made_dense = 2 * min(largest * MAX_WEIGHT_BYTES, DENSE_BYTES) if makes_dense else 0
    return sampling + num_step_tokens * widths * item_bytes + made_dense


def rotary_bytes(config: ModelConfig) -> int:
    """Returns the bytes of the table of positions: float32 cosines and sines."""
    return config.max_model_tokens * config.head_dim * _FLOAT32_BYTES


def pool_share(free_bytes: int, *, scratch: int, memory_fraction: float) -> int:
    """Returns the bytes for the KV pool out of what is free once the weights have their memory."""
    return max(0, int((free_bytes - scratch) * memory_fraction))
