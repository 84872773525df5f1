"""The decoder's weights on a device, and where each tensor of a checkpoint goes.

Query, key and value projections are one matrix, gate and up projections
another, so that each is one matmul. The checkpoint's tensors are copied into
row ranges of them:

    qkv      [ q_proj: num_heads * head_dim | k_proj: num_kv_heads * head_dim | v_proj ]
    gate_up  [ gate_proj: intermediate_size | up_proj: intermediate_size ]

A matrix has the format that all its parts have. Rows are quantized by themselves, so a merged
matrix is exactly its parts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, TypeVar, assert_never

import torch
from torch import Tensor

from tokenloom.worker.weights.formats import EightBits, Format, FourBits, fits
from tokenloom.worker.weights.linears import (
    DenseLinear,
    EightBitLinear,
    FourBitLinear,
    Linear,
    codebook,
)
from tokenloom.worker.weights.matrices import DOWN, EMBEDDING, GATE_UP, HEAD, OUTPUT, QKV

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tokenloom.worker.config import ModelConfig
    from tokenloom.worker.weights.filling import Place

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One decoder layer."""

    attention_norm: Tensor
    """[hidden_size]"""
    qkv: Linear
    q_norm: Tensor | None
    """[head_dim]"""
    k_norm: Tensor | None
    """[head_dim]"""
    output: Linear
    mlp_norm: Tensor
    """[hidden_size]"""
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, kw_only=True)
class Weights:
    """All that a checkpoint brings."""

    embedding: Tensor
    """[vocab_size, hidden_size]"""
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    """[hidden_size]"""
    head: Linear
    """Shares its matrix with `embedding` where the checkpoint ties them and it is not quantized."""


def allocate_weights(
    config: ModelConfig,
    *,
    formats: Mapping[str, Format | None],
    int8_threshold: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Weights:
    """Returns zeros of the right shapes, to be filled through `destinations`.

    Steps computed before they are filled give numbers, not what the memory held.

    Args:
        config: The decoder.
        formats: By its name, what a matrix that is or will be quantized is kept in; None: its
            values, dense. Absent ones are dense, too.
        int8_threshold: Of matrices of 8 bits.
        dtype: Of the activations and of all that is not quantized.
        device: Where the memory is.
    """
    memory = _Memory(dtype, device, int8_threshold)
    zeros = memory.zeros

    def linear(
        layer: int, parts: tuple[str, ...], num_outputs: int, num_inputs: int, *, bias: bool
    ) -> Linear:
        own = {formats.get(f"model.layers.{layer}.{part}") for part in parts}
        common = own.pop() if len(own) == 1 else None
        return memory.linear(num_outputs, num_inputs, common, bias=bias)

    hidden, head_dim = config.hidden_size, config.head_dim
    num_qkv = (config.num_heads + 2 * config.num_kv_heads) * head_dim
    num_mixed, num_gate_up = config.num_heads * head_dim, 2 * config.intermediate_size
    layers = tuple(
        LayerWeights(
            attention_norm=zeros(hidden),
            qkv=linear(index, QKV, num_qkv, hidden, bias=config.qkv_bias),
            q_norm=zeros(head_dim) if config.qk_norm else None,
            k_norm=zeros(head_dim) if config.qk_norm else None,
            output=linear(index, OUTPUT, hidden, num_mixed, bias=config.o_bias),
            mlp_norm=zeros(hidden),
            gate_up=linear(index, GATE_UP, num_gate_up, hidden, bias=config.mlp_bias),
            down=linear(index, DOWN, hidden, config.intermediate_size, bias=config.mlp_bias),
        )
        for index in range(config.num_layers)
    )
    embedding = zeros(config.vocab_size, hidden)
    head: Linear
    if config.tied_embeddings and HEAD not in formats:
        head = DenseLinear(weight=embedding, bias=None)
    else:
        head = memory.linear(config.vocab_size, hidden, formats.get(HEAD), bias=False)
    return Weights(embedding=embedding, layers=layers, final_norm=zeros(hidden), head=head)


class _Memory:
    """Zeros on a device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, int8_threshold: float) -> None:
        self._dtype = dtype
        self._device = device
        self._int8_threshold = int8_threshold

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self._dtype, device=self._device)

    def linear(
        self, num_outputs: int, num_inputs: int, wanted: Format | None, *, bias: bool
    ) -> Linear:
        own_bias = self.zeros(num_outputs) if bias else None
        if not fits(wanted, num_inputs):
            wanted = None  # blocks run over the ends of rows
        match wanted:
            case None:
                return DenseLinear(weight=self.zeros(num_outputs, num_inputs), bias=own_bias)
            case FourBits():
                num_blocks = num_inputs // wanted.block_size
                return FourBitLinear(
                    codes=self.zeros(num_outputs, num_inputs // 2, dtype=torch.uint8),
                    absmax=self.zeros(num_outputs, num_blocks, dtype=torch.float32),
                    codebook=codebook(wanted.codebook, self._device),
                    bias=own_bias,
                )
            case EightBits():
                return EightBitLinear(
                    codes=self.zeros(num_outputs, num_inputs, dtype=torch.int8),
                    scales=self.zeros(num_outputs, dtype=torch.float32),
                    bias=own_bias,
                    threshold=self._int8_threshold,
                )
            case _:
                assert_never(wanted)


def linears(weights: Weights) -> Iterator[Linear]:
    """Yields the matrices that rows are multiplied with."""
    for layer in weights.layers:
        yield from (layer.qkv, layer.output, layer.gate_up, layer.down)
    yield weights.head


def form(weights: object) -> tuple[object, ...]:
    """Returns what launches depend on: kinds of matrices, types and sizes, not what they hold."""
    if isinstance(weights, Tensor):
        return weights.dtype, *weights.shape
    if is_dataclass(weights):
        return type(weights), *(form(getattr(weights, each.name)) for each in fields(weights))
    return (weights,)


def outline(weights: T) -> T:
    """Returns weights, or any part of them, on torch's meta device: without content."""
    outlined: object = weights
    if isinstance(weights, Tensor):
        outlined = weights.to("meta")
    elif isinstance(weights, tuple):
        outlined = tuple(map(outline, weights))
    elif is_dataclass(weights) and not isinstance(weights, type):
        parts = {each.name: outline(getattr(weights, each.name)) for each in fields(weights)}
        outlined = replace(weights, **parts)
    return outlined  # type: ignore[return-value]


def destinations(config: ModelConfig, weights: Weights) -> dict[str, Place]:
    """Returns, by its name in the checkpoint, the memory that each tensor goes to."""
    places: dict[str, Place] = {
        f"{EMBEDDING}.weight": weights.embedding,
        "model.norm.weight": weights.final_norm,
    }
    if not (isinstance(weights.head, DenseLinear) and weights.head.weight is weights.embedding):
        places[f"{HEAD}.weight"] = weights.head
    for index, layer in enumerate(weights.layers):
        for name, place in _layer_destinations(config, layer):
            places[f"model.layers.{index}.{name}"] = place
    return places


def _layer_destinations(config: ModelConfig, layer: LayerWeights) -> Iterator[tuple[str, Place]]:
    num_q, num_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "input_layernorm.weight", layer.attention_norm
    yield "post_attention_layernorm.weight", layer.mlp_norm
    if layer.q_norm is not None and layer.k_norm is not None:
        yield "self_attn.q_norm.weight", layer.q_norm
        yield "self_attn.k_norm.weight", layer.k_norm
    yield from _split(layer.qkv, QKV, (num_q, num_kv, num_kv))
    yield from _split(layer.output, OUTPUT, (config.hidden_size,))
    yield from _split(layer.gate_up, GATE_UP, (config.intermediate_size,) * 2)
    yield from _split(layer.down, DOWN, (config.hidden_size,))


def _split(
    linear: Linear, names: tuple[str, ...], sizes: tuple[int, ...]
) -> Iterator[tuple[str, Place]]:
    """Yields the parts of a merged projection by row ranges."""
    first = 0
    for name, size in zip(names, sizes, strict=True):
        yield f"{name}.weight", linear.rows(first, first + size)
        if linear.bias is not None:
            yield f"{name}.bias", linear.bias[first : first + size]
        first += size
