"""What a decoder's weights take on one rank, by the form of each matrix. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from tokenloom.worker.config import ModelConfig
from tokenloom.worker.weights.formats import EightBits, Format, FourBits
from tokenloom.worker.weights.matrices import HEAD, Matrix, matrices

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_SCALE_BYTES = 4


Form: TypeAlias = Format | None
"""None: in the type of the activations."""


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """What a rank keeps."""

    layers: int
    """Matrices of the layers with their biases, and all norms."""
    embedding: int
    head: int
    """0 where the embedding serves as it is."""

    @property
    def total(self) -> int:
        """What a worker reports as `weights_bytes`."""
        return self.layers + self.embedding + self.head

    @property
    def read_a_step(self) -> int:
        """What a decode step reads: of an embedding that is no head, a row a token."""
        return self.layers + (self.head or self.embedding)


def weight_bytes(config: ModelConfig, forms: Mapping[str, Form], item_bytes: int) -> WeightBytes:
    """Returns what a rank keeps of the decoder that it computes.

    `forms` has the form of each matrix by name; `item_bytes` are an activation's.
    """
    num_norm_weights = config.hidden_size + config.num_layers * (
        2 * config.hidden_size + (2 * config.head_dim if config.qk_norm else 0)
    )
    layers, head = num_norm_weights * item_bytes, 0
    for matrix in matrices(config):
        form = forms[matrix.name]
        num_bytes = _matrix_bytes(matrix, form, item_bytes)
        if matrix.name != HEAD:
            layers += num_bytes
        elif not (config.tied_embeddings and form is None):
            head = num_bytes
    embedding = config.vocab_size * config.hidden_size * item_bytes
    return WeightBytes(layers=layers, embedding=embedding, head=head)


def all_dense(config: ModelConfig) -> dict[str, Form]:
    """Returns the forms of a decoder without quantization."""
    return {matrix.name: None for matrix in matrices(config)}


def num_weights(config: ModelConfig) -> int:
    """Returns the parameters of a checkpoint, those of a tied embedding once."""
    return weight_bytes(config, all_dense(config), 1).total


def _matrix_bytes(matrix: Matrix, form: Form, item_bytes: int) -> int:
    bias = matrix.num_outputs * item_bytes if matrix.has_bias else 0
    match form:
        case None:
            return matrix.num_weights * item_bytes + bias
        case FourBits():
            num_blocks = matrix.num_weights // form.block_size
            return matrix.num_weights // 2 + num_blocks * _SCALE_BYTES + bias
        case EightBits():
            return matrix.num_weights + matrix.num_outputs * _SCALE_BYTES + bias
        case _:
            assert_never(form)
