"""What an attention backend is given and what it does.

span 0 of 3 tokens, slot's positions 4 … 6, block size 4

block table of the span    [ 7, 2, … ]
block 7  [ k0 k1 k2 k3 ]   block 2  [ k4 k5 k6 ·· ]
                                      └ written by this step before it attends: places 8, 9, 10
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Pages:
    """The KV pool."""

    keys: Tensor
    """[num_layers, num_blocks, block_size, num_kv_heads, head_dim]"""
    values: Tensor
    """[num_layers, num_blocks, block_size, num_kv_heads, head_dim]"""


@dataclass(frozen=True, kw_only=True)
class Spans:
    """The spans of a step: the device's side and what the host knows of them."""

    offsets: Tensor
    """int32 [num_spans + 1] where each span's tokens begin in the step"""
    kv_lengths: Tensor
    """int32 [num_spans] positions up to and with the span's last"""
    block_tables: Tensor
    """int32 [num_spans, max_blocks] blocks of the span's request"""
    places: Tensor
    """int64 [num_tokens] block * block_size + offset where each token's K and V go"""
    host_starts: npt.NDArray[np.int32]
    """[num_spans] position of each span's first token"""
    host_lengths: npt.NDArray[np.int32]
    """[num_spans]"""

    @property
    def max_length(self) -> int:
        """Tokens of the longest span."""
        return int(self.host_lengths.max())

    @property
    def max_kv_length(self) -> int:
        """Positions that the longest request attends to."""
        return int((self.host_starts + self.host_lengths).max())


class Attention(Protocol):
    """A backend. Token i of a span sees the positions up to its own, window permitting."""

    name: str
    block_size: int
    capturable: bool
    """Whether a launch depends on shapes alone, so that a CUDA graph can repeat it."""

    def attend(
        self, pages: Pages, layer: int, queries: Tensor, spans: Spans, window: int | None
    ) -> Tensor:
        """Returns [num_tokens, num_heads, head_dim] for queries of that shape.

        With a `window`, a token sees that many positions, its own among them.
        """
