"""The matrices of a decoder, under their checkpoint's names. Pure: no torch.

Those of one matmul stand together, in the order in which they are merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tokenloom.worker.config import ModelConfig

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT = ("self_attn.o_proj",)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = ("mlp.down_proj",)


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A projection, under its checkpoint's name."""

    name: str
    num_outputs: int
    num_inputs: int
    has_bias: bool = False

    @property
    def num_weights(self) -> int:
        """Without the bias."""
        return self.num_outputs * self.num_inputs


def merged_with(name: str) -> tuple[str, ...]:
    """Returns the matrices that are one matrix in memory, of which `name` is a part."""
    for parts in (QKV, GATE_UP):
        for part in parts:
            if name.endswith(f".{part}"):
                return tuple(name.removesuffix(part) + each for each in parts)
    return (name,)


def matrices(config: ModelConfig) -> Iterator[Matrix]:
    """Yields the matrices of all layers and the head, which is there if it is tied, too."""
    hidden, width = config.hidden_size, config.intermediate_size
    num_q, num_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    merged = (
        (QKV, (num_q, num_kv, num_kv), hidden, config.qkv_bias),
        (OUTPUT, (hidden,), num_q, config.o_bias),
        (GATE_UP, (width, width), hidden, config.mlp_bias),
        (DOWN, (hidden,), width, config.mlp_bias),
    )
    shapes = [
        (name, num_outputs, num_inputs, has_bias)
        for names, sizes, num_inputs, has_bias in merged
        for name, num_outputs in zip(names, sizes, strict=True)
    ]
    for layer in range(config.num_layers):
        for name, num_outputs, num_inputs, has_bias in shapes:
            yield Matrix(
                name=f"model.layers.{layer}.{name}",
                num_outputs=num_outputs,
                num_inputs=num_inputs,
                has_bias=has_bias,
            )
    yield Matrix(name=HEAD, num_outputs=config.vocab_size, num_inputs=hidden)
