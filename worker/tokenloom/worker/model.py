"""The decoder: one forward pass over the tokens of a step, all requests flattened.

The arithmetic follows transformers' Llama, Mistral, Qwen2 and Qwen3 operation
for operation (norms in float32, rotation in the model's type), so that greedy
output agrees token for token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from tokenloom.worker.attention import Attention, Pages, Spans
    from tokenloom.worker.config import ModelConfig
    from tokenloom.worker.kernels import Operations
    from tokenloom.worker.weights import Weights


class Decoder:
    """Embedding, layers, head. It holds no state of any request."""

    def __init__(
        self, config: ModelConfig, weights: Weights, rotary: Tensor, operations: Operations
    ) -> None:
        """`rotary` is the table [num_positions, 2, head_dim / 2] of `rotary_table`."""
        self._config = config
        self.operations = operations
        self._weights = weights
        self._rotary = rotary.to(weights.embedding.dtype)

    @property
    def embedding(self) -> Tensor:
        """Rows of the tokens, [vocab_size, hidden_size]."""
        return self._weights.embedding

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        rows: Tensor | None = None,
        *,
        spans: Spans,
        pages: Pages,
        attention: Attention,
        out: Tensor | None = None,
    ) -> Tensor:
        """Computes a step: stores its keys and values, returns logits where it samples.

        Args:
            tokens: [num_tokens] ids, span after span.
            positions: [num_tokens] places in their requests.
            rows: [num_rows] tokens whose successors are wanted; None: all of them.
            spans: Which tokens belong together, and their block tables.
            pages: The KV pool.
            attention: The backend that reads and writes it.
            out: Where the logits go, if that matters.

        Returns:
            [num_rows, vocab_size] logits in the model's type.
        """
        eps, ops = self._config.rms_norm_eps, self.operations
        hidden = functional.embedding(tokens, self._weights.embedding)  # [num_tokens, hidden_size]
        angles = self._rotary[positions]  # [num_tokens, 2, head_dim / 2]
        update: Tensor | None = None  # what a layer adds to hidden, with the next one's norm
        for index, layer in enumerate(self._weights.layers):
            if update is None:
                normed = ops.norm(hidden, layer.attention_norm, eps)
            else:
                normed = ops.add_norm(hidden, update, layer.attention_norm, eps)
            keys, values = pages.keys[index], pages.values[index]
            norms = None
            if layer.q_norm is not None and layer.k_norm is not None:
                norms = (layer.q_norm, layer.k_norm)
            qkv = layer.qkv(normed)  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
            queries = ops.place_heads(qkv, angles, spans.places, keys, values, norms, eps)
            mixed = attention.attend(pages, index, queries, spans, self._config.windows[index])
            normed = ops.add_norm(hidden, layer.output(mixed.flatten(1)), layer.mlp_norm, eps)
            update = layer.down(ops.silu_mul(layer.gate_up(normed)))
        assert update is not None
        if rows is not None:
            hidden, update = hidden[rows], update[rows]
        last = ops.add_norm(hidden, update, self._weights.final_norm, eps)
        return self._weights.head(last, out)
