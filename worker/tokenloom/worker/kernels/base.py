"""The operations of a decoder layer that are no matmul and no attention.

A norm sums in float32, is rounded to the rows' own type and then multiplied with
its weight, as transformers does it; kernel and twin differ by the order of that
sum, and by how a product is rounded before it is added to another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Operations(Protocol):
    """Tensors are contiguous and of one type, angles and norms included."""

    name: str

    def norm(self, rows: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Returns [num_rows, size] rows over their root mean square, times [size] weight."""

    def add_norm(self, hidden: Tensor, update: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Adds update to hidden in place, [num_rows, size] both, and returns its norm."""

    def place_heads(
        self,
        qkv: Tensor,
        angles: Tensor,
        places: Tensor,
        keys: Tensor,
        values: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
    ) -> Tensor:
        """Normalizes and rotates queries and keys, and writes keys and values to the pool.

        Args:
            qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim].
            angles: [num_tokens, 2, head_dim / 2] cosines, sines.
            places: int64 [num_tokens] block * block_size + offset of each token.
            keys: [num_blocks, block_size, num_kv_heads, head_dim] of the layer.
            values: As keys.
            norms: [head_dim] weights of the norms of queries and of keys, if it has them.
            eps: Of those norms.

        Returns:
            Queries [num_tokens, num_heads, head_dim].
        """

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Returns silu(gate) * up, [num_rows, size], for [num_rows, 2 * size] gate and up."""
