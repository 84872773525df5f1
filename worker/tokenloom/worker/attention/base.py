"""What an attention backend is given and what it does.

span 0 of 3 tokens, slot's positions 4 … 6, block size 4

block table of the span    [ 7, 2, … ]
block 7  [ k0 k1 k2 k3 ]   block 2  [ k4 k5 k6 ·· ]
                                      └ written by this step before it attends: places 8, 9, 10
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Scales:
    """By which codes are multiplied (`fp8`): powers of two, a block's of a head side by side."""

    keys: Tensor
    """float32 [num_layers, num_blocks, num_kv_heads, block_size]"""
    values: Tensor
    """float32 [num_layers, num_blocks, num_kv_heads, block_size]"""


@dataclass(frozen=True, kw_only=True)
class Pages:
    """The KV pool."""

    keys: Tensor
    """[num_layers, num_blocks, block_size, num_kv_heads, head_dim]"""
    values: Tensor
    """[num_layers, num_blocks, block_size, num_kv_heads, head_dim]"""
    scales: Scales | None = None
    """None: keys and values are numbers of the queries' type, no codes"""

    def outline(self) -> Pages:
        """Returns the pages on torch's meta device: shapes without content."""
        scales = self.scales
        if scales is not None:
            scales = Scales(keys=scales.keys.to("meta"), values=scales.values.to("meta"))
        return Pages(keys=self.keys.to("meta"), values=self.values.to("meta"), scales=scales)


@dataclass(frozen=True, kw_only=True)
class Spans:
    """The spans of a step. What the host knows of them are counts and bounds alone.

    So a captured step is described once: its tensors change while the graph
    lives, and the bounds hold for all that they may become. Places for spans that
    such a step does not need are empty: no token, and a kv_length of 0.
    """

    offsets: Tensor
    """int32 [num_spans + 1] where each span's tokens begin in the step"""
    kv_lengths: Tensor
    """int32 [num_spans] positions up to and with the span's last; 0 if it is empty"""
    block_tables: Tensor
    """int32 [num_spans, max_blocks] blocks of the span's request"""
    places: Tensor
    """int64 [num_tokens] block * block_size + offset where each token's K and V go"""
    num_decodes: int
    """Leading spans that are one token long; the last of them may be empty"""
    max_length: int
    """No span has more tokens"""
    max_kv_length: int
    """No request attends to more positions"""

    @property
    def num_spans(self) -> int:
        """All spans of the step."""
        return len(self.kv_lengths)

    @cached_property
    def decodes(self) -> Spans:
        """The leading spans of one token; span i has token i, unless it is empty."""
        if self.num_decodes == self.num_spans:
            return self
        return replace(
            self,
            offsets=self.offsets[: self.num_decodes + 1],
            kv_lengths=self.kv_lengths[: self.num_decodes],
            block_tables=self.block_tables[: self.num_decodes],
            max_length=1,
        )

    @cached_property
    def others(self) -> Spans:
        """The spans behind the decodes; their offsets stay those of the whole step."""
        if not self.num_decodes:
            return self
        return replace(
            self,
            offsets=self.offsets[self.num_decodes :],
            kv_lengths=self.kv_lengths[self.num_decodes :],
            block_tables=self.block_tables[self.num_decodes :],
            num_decodes=0,
        )

    @cached_property
    def kv_offsets(self) -> Tensor:
        """int32 [num_spans + 1] where each span's positions would begin, laid end to end."""
        return functional.pad(self.kv_lengths.cumsum(0, dtype=torch.int32), (1, 0))


class Attention(Protocol):
    """A backend. Token i of a span sees the positions up to its own, window permitting."""

    name: str
    block_size: int
    capturable: bool
    """Whether a launch depends on shapes alone, so that a CUDA graph can repeat it"""
    num_widened: int
    """Positions of a layer that it keeps in the queries' type, too, where the pool has codes"""

    def load(self) -> None:
        """Imports what is slow to import, which the first span would do otherwise."""

    def attend(
        self, pages: Pages, layer: int, queries: Tensor, spans: Spans, window: int | None
    ) -> Tensor:
        """Returns [num_tokens, num_heads, head_dim] for queries of that shape.

        With a `window`, a token sees that many positions, its own among them. The
        result of a token that belongs to no span is not defined. On torch's meta device
        nothing is computed and nothing loaded.
        """


class Decoding(Protocol):
    """A backend for spans of one token, of which span i has token i; the last may be empty."""

    name: str

    def attend(
        self,
        pages: Pages,
        layer: int,
        queries: Tensor,
        spans: Spans,
        window: int | None,
        mixed: Tensor,
    ) -> None:
        """Writes the first num_spans tokens of [num_tokens, num_heads, head_dim]."""
