"""The decoder: one forward pass over the tokens of a step, all requests flattened.

The arithmetic follows transformers' Llama, Mistral, Qwen2 and Qwen3 operation
for operation (norms in float32, rotation in the model's type), so that greedy
output agrees token for token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from tokenloom.worker.kernels import Residual
from tokenloom.worker.ranks import ALONE
from tokenloom.worker.weights.merged import form, outline

if TYPE_CHECKING:
    from tokenloom.worker.attention import Attention, Pages, Spans
    from tokenloom.worker.config import ModelConfig
    from tokenloom.worker.kernels import Operations
    from tokenloom.worker.ranks import Ranks
    from tokenloom.worker.weights.merged import Weights


class Decoder:
    """Embedding, layers, head. It holds no state of any request."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        rotary: Tensor,
        operations: Operations,
        ranks: Ranks = ALONE,
    ) -> None:
        """Takes what a rank has of a decoder, and the ranks that have the rest.

        `config` and `weights` are the rank's own; `rotary` is the table
        [num_positions, 2, head_dim / 2] of `rotary_table`.
        """
        self._config = config
        self.operations = operations
        self.ranks = ranks
        self._weights = weights
        self._rotary = rotary.to(weights.embedding.dtype)

    def among(self, ranks: Ranks) -> Decoder:
        """Returns the same decoder in another group."""
        return Decoder(self._config, self._weights, self._rotary, self.operations, ranks)

    @property
    def embedding(self) -> Tensor:
        """Rows of the tokens, [vocab_size, hidden_size]; of a rank, those of its own tokens."""
        return self._weights.embedding

    def excerpt(self) -> Decoder:
        """Returns a decoder of one layer of each kind: it launches all that this one does, once."""
        kinds = {
            (window, form(layer)): index
            for index, (layer, window) in enumerate(
                zip(self._weights.layers, self._config.windows, strict=True)
            )
        }
        indices = sorted(kinds.values())
        config = replace(
            self._config,
            num_layers=len(indices),
            windows=tuple(self._config.windows[index] for index in indices),
        )
        layers = tuple(self._weights.layers[index] for index in indices)
        weights = replace(self._weights, layers=layers)
        return Decoder(config, weights, self._rotary, self.operations, self.ranks)

    def outline(self) -> Decoder:
        """Returns the decoder on torch's meta device: shapes without content."""
        return Decoder(
            self._config,
            outline(self._weights),
            self._rotary.to("meta"),
            self.operations,
            self.ranks,
        )

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
            [num_rows, vocab_size] logits in the model's type; of a rank, those of its own tokens.
        """
        eps, ops = self._config.rms_norm_eps, self.operations
        residual = self._embed(tokens)
        angles = self._rotary[positions]  # [num_tokens, 2, head_dim / 2]
        for index, layer in enumerate(self._weights.layers):
            # Rows of num_heads + 2 * num_kv_heads heads, side by side.
            qkv = ops.norm_linear(residual, layer.attention_norm, eps, layer.qkv)
            norms = None
            if layer.q_norm is not None and layer.k_norm is not None:
                norms = (layer.q_norm, layer.k_norm)
            queries = ops.place_heads(qkv, angles, spans.places, pages, index, norms, eps)
            mixed = attention.attend(pages, index, queries, spans, self._config.windows[index])
            ops.add_linear(residual, mixed.flatten(1), layer.output)
            activated = ops.norm_gate_up(residual, layer.mlp_norm, eps, layer.gate_up)
            ops.add_linear(residual, activated, layer.down)
        if rows is not None:
            residual = residual.at(rows)
        return ops.norm_linear(residual, self._weights.final_norm, eps, self._weights.head, out)

    def _embed(self, tokens: Tensor) -> Residual:
        """Returns [num_tokens, hidden_size] rows of [num_tokens] ids."""
        own = self.embedding
        if self.ranks.num_ranks == 1:
            return Residual(functional.embedding(tokens, own))
        places = tokens - self.ranks.rank * len(own)
        elsewhere = (places < 0) | (places >= len(own))
        rows = functional.embedding(places.masked_fill(elsewhere, 0), own)
        rows.masked_fill_(elsewhere[:, None], 0)
        return Residual(torch.zeros_like(rows), rows, ranks=self.ranks)
