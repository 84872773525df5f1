"""The decoder's weights on a device, and where each tensor of a checkpoint goes.

Query, key and value projections are one matrix, gate and up projections
another, so that each is one matmul. The checkpoint's tensors are copied into
row ranges of them:

    qkv      [ q_proj: num_heads * head_dim | k_proj: num_kv_heads * head_dim | v_proj ]
    gate_up  [ gate_proj: intermediate_size | up_proj: intermediate_size ]
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from tokenloom.worker.linears import DenseLinear

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenloom.worker.config import ModelConfig


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One decoder layer."""

    attention_norm: Tensor
    """[hidden_size]"""
    qkv: DenseLinear
    q_norm: Tensor | None
    """[head_dim]"""
    k_norm: Tensor | None
    """[head_dim]"""
    output: DenseLinear
    mlp_norm: Tensor
    """[hidden_size]"""
    gate_up: DenseLinear
    down: DenseLinear


@dataclass(frozen=True, kw_only=True)
class Weights:
    """All that a checkpoint brings."""

    embedding: Tensor
    """[vocab_size, hidden_size]"""
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    """[hidden_size]"""
    head: DenseLinear
    """Shares its matrix with `embedding` where the checkpoint ties them."""


def allocate_weights(config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> Weights:
    """Returns zeros of the right shapes, to be filled through `destinations`.

    Steps computed before they are filled give numbers, not what the memory held.
    """

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def linear(num_outputs: int, num_inputs: int, *, bias: bool) -> DenseLinear:
        return DenseLinear(
            weight=zeros(num_outputs, num_inputs), bias=zeros(num_outputs) if bias else None
        )

    hidden, head_dim = config.hidden_size, config.head_dim
    num_qkv = (config.num_heads + 2 * config.num_kv_heads) * head_dim
    layers = tuple(
        LayerWeights(
            attention_norm=zeros(hidden),
            qkv=linear(num_qkv, hidden, bias=config.qkv_bias),
            q_norm=zeros(head_dim) if config.qk_norm else None,
            k_norm=zeros(head_dim) if config.qk_norm else None,
            output=linear(hidden, config.num_heads * head_dim, bias=config.o_bias),
            mlp_norm=zeros(hidden),
            gate_up=linear(2 * config.intermediate_size, hidden, bias=config.mlp_bias),
            down=linear(hidden, config.intermediate_size, bias=config.mlp_bias),
        )
        for _ in range(config.num_layers)
    )
    embedding = zeros(config.vocab_size, hidden)
    head = embedding if config.tied_embeddings else zeros(config.vocab_size, hidden)
    return Weights(
        embedding=embedding,
        layers=layers,
        final_norm=zeros(hidden),
        head=DenseLinear(weight=head, bias=None),
    )


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


def destinations(config: ModelConfig, weights: Weights) -> dict[str, Tensor]:
    """Returns, by its name in the checkpoint, the memory that each tensor is copied to."""
    places = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": weights.final_norm,
    }
    if not config.tied_embeddings:
        places["lm_head.weight"] = weights.head.weight
    for index, layer in enumerate(weights.layers):
        for name, place in _layer_destinations(config, layer):
            places[f"model.layers.{index}.{name}"] = place
    return places


def _layer_destinations(config: ModelConfig, layer: LayerWeights) -> Iterator[tuple[str, Tensor]]:
    num_q, num_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "input_layernorm.weight", layer.attention_norm
    yield "post_attention_layernorm.weight", layer.mlp_norm
    if layer.q_norm is not None and layer.k_norm is not None:
        yield "self_attn.q_norm.weight", layer.q_norm
        yield "self_attn.k_norm.weight", layer.k_norm
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    yield from _split(layer.qkv, attention, (num_q, num_kv, num_kv))
    yield from _split(layer.output, ("self_attn.o_proj",), (config.hidden_size,))
    halves = (config.intermediate_size, config.intermediate_size)
    yield from _split(layer.gate_up, ("mlp.gate_proj", "mlp.up_proj"), halves)
    yield from _split(layer.down, ("mlp.down_proj",), (config.hidden_size,))


def _split(
    linear: DenseLinear, names: tuple[str, ...], sizes: tuple[int, ...]
) -> Iterator[tuple[str, Tensor]]:
    """Yields the parts of a merged projection by row ranges."""
    for name, part in zip(names, torch.split(linear.weight, list(sizes)), strict=True):
        yield f"{name}.weight", part
    if linear.bias is not None:
        for name, part in zip(names, torch.split(linear.bias, list(sizes)), strict=True):
            yield f"{name}.bias", part
