"""The decoder: one forward pass over the tokens of a step, all requests flattened.

The arithmetic follows transformers' Llama, Mistral, Qwen2 and Qwen3 operation
for operation (norms in float32, rotation in the model's type), so that greedy
output agrees token for token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from tokenloom.worker.rotary import rotate

if TYPE_CHECKING:
    from tokenloom.worker.attention import Attention, Pages, Spans
    from tokenloom.worker.config import ModelConfig
    from tokenloom.worker.weights import LayerWeights, Weights


class Decoder:
    """Embedding, layers, head. It holds no state of any request."""

    def __init__(self, config: ModelConfig, weights: Weights, rotary: Tensor) -> None:
        """`rotary` is the table [num_positions, 2, head_dim / 2] of `rotary_table`."""
        self._config = config
        self._weights = weights
        self._rotary = rotary

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        rows: Tensor,
        *,
        spans: Spans,
        pages: Pages,
        attention: Attention,
    ) -> Tensor:
        """Computes a step: stores its keys and values, returns logits where it samples.

        Args:
            tokens: [num_tokens] ids, span after span.
            positions: [num_tokens] places in their requests.
            rows: [num_rows] tokens whose successors are wanted.
            spans: Which tokens belong together, and their block tables.
            pages: The KV pool.
            attention: The backend that reads and writes it.

        Returns:
            float32 [num_rows, vocab_size]
        """
        hidden = functional.embedding(tokens, self._weights.embedding)  # [num_tokens, hidden_size]
        angles = self._rotary[positions].to(hidden.dtype)  # [num_tokens, 2, head_dim / 2]
        cos, sin = angles.unsqueeze(2).unbind(1)  # each [num_tokens, 1, head_dim / 2]
        for index, layer in enumerate(self._weights.layers):
            normed = self._norm(hidden, layer.attention_norm)
            q, k, v = self._project(normed, layer, cos, sin)
            attention.store(pages, index, k, v, spans)
            mixed = attention.attend(pages, index, q, spans, self._config.windows[index])
            hidden = hidden + layer.output(mixed.flatten(1))
            hidden = hidden + self._mlp(self._norm(hidden, layer.mlp_norm), layer)
        last = self._norm(hidden[rows], self._weights.final_norm)
        return self._weights.head(last).float()

    def _project(
        self, normed: Tensor, layer: LayerWeights, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rotated queries and keys, and values: [num_tokens, heads, head_dim] each."""
        config = self._config
        heads = layer.qkv(normed).view(len(normed), -1, config.head_dim)
        parts = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        q, k, v = torch.split(heads, parts, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _mlp(self, normed: Tensor, layer: LayerWeights) -> Tensor:
        gate, up = layer.gate_up(normed).chunk(2, dim=-1)
        return layer.down(functional.silu(gate) * up)

    def _norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        wide = rows.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._config.rms_norm_eps)
        return weight * (wide * scale).to(rows.dtype)
