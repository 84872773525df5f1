"""Attention in plain torch: the CPU's backend, and the twin that kernels are tested against.

Spans of like shape are padded to a common one and computed as one batch. Shapes
are alike when span lengths and context lengths lie between the same powers of
two, so padding at most doubles either, and a step of 64 decoding requests is a
few calls. What the padding adds lies behind the last position of a request and
is never seen by it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tokenloom.worker.attention.base import Pages, Spans
from tokenloom.worker.fp8 import from_codes

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Spans that are computed as one padded batch."""

    tokens: Tensor
    """[num_rows, max_length] tokens of the step; padding repeats the span's last"""
    positions: Tensor
    """[num_rows, max_length] their places in their requests"""
    blocks: Tensor
    """[num_rows, num_blocks]"""
    filled: Tensor
    """[num_filled] indices into the flattened batch of what is no padding"""
    seen: dict[int | None, Tensor] = field(default_factory=dict)
    """By window: bool [num_rows, 1, max_length, num_keys], made once a step"""


class ReferenceAttention:
    """torch's scaled_dot_product_attention over gathered pages."""

    name = "torch"
    capturable = False
    num_widened = 0

    def __init__(self, block_size: int = 16) -> None:
        self.block_size = block_size
        self._spans: Spans | None = None
        self._groups: list[_Group] = []

    def load(self) -> None:
        """Has nothing to import."""

    def attend(
        self, pages: Pages, layer: int, queries: Tensor, spans: Spans, window: int | None
    ) -> Tensor:
        """Returns [num_tokens, num_heads, head_dim] for queries of that shape."""
        if queries.is_meta:
            return torch.empty_like(queries)
        if spans is not self._spans:  # the groups are the same in every layer
            self._spans, self._groups = spans, list(self._group(spans))
        mixed = torch.empty_like(queries)
        for group in self._groups:
            q = queries[group.tokens].transpose(1, 2)  # [num_rows, num_heads, max_length, head_dim]
            k, v = _gather(pages, layer, group.blocks, queries.dtype)
            if window not in group.seen:
                group.seen[window] = _seen(group.positions, k.shape[2], window)
            out = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=group.seen[window], enable_gqa=True
            )
            out = out.transpose(1, 2).flatten(0, 1)
            mixed[group.tokens.flatten()[group.filled]] = out[group.filled]
        return mixed

    def _group(self, spans: Spans) -> Iterator[_Group]:
        # On a GPU this waits for the device, once a step.
        bounds = spans.offsets.cpu().numpy().astype(np.int64)
        ends = spans.kv_lengths.cpu().numpy().astype(np.int64)
        offsets, lengths = bounds[:-1], np.diff(bounds)
        starts, num_blocks = ends - lengths, -(-ends // self.block_size)
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for span, shape in enumerate(zip(lengths.tolist(), num_blocks.tolist(), strict=True)):
            if shape[0]:  # an empty span has nothing to be computed
                alike[(shape[0] - 1).bit_length(), (shape[1] - 1).bit_length()].append(span)
        device = spans.places.device
        for rows in alike.values():
            steps = np.arange(lengths[rows].max())
            inside = np.minimum(steps, lengths[rows, None] - 1)  # [num_rows, max_length]
            filled = np.flatnonzero(steps < lengths[rows, None])
            blocks = spans.block_tables[rows, : int(num_blocks[rows].max())]
            yield _Group(
                tokens=torch.from_numpy(offsets[rows, None] + inside).to(device),
                positions=torch.from_numpy(starts[rows, None] + inside).to(device),
                blocks=blocks.long(),
                filled=torch.from_numpy(filled).to(device),
            )


def _gather(pages: Pages, layer: int, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns keys and values [num_rows, num_kv_heads, num_keys, head_dim] of blocks.

    `blocks` is [num_rows, num_blocks].
    """
    flat, shape = blocks.flatten(), (len(blocks), -1, *pages.keys.shape[3:])

    def gather(numbers: Tensor, scales: Tensor | None) -> Tensor:
        # index_select copies whole blocks; indexing with brackets goes element by element.
        gathered = numbers[layer].index_select(0, flat)
        if scales is not None:
            each = scales[layer].index_select(0, flat).transpose(1, 2)
            gathered = from_codes(gathered, each, dtype)
        return gathered.view(shape).transpose(1, 2)

    scales = pages.scales
    return (
        gather(pages.keys, None if scales is None else scales.keys),
        gather(pages.values, None if scales is None else scales.values),
    )


def _seen(positions: Tensor, num_keys: int, window: int | None) -> Tensor:
    """Returns bool [num_rows, 1, max_length, num_keys]: which keys each token sees."""
    keys = torch.arange(num_keys, device=positions.device)
    seen = keys <= positions[..., None]
    if window is not None:
        seen &= keys > positions[..., None] - window
    return seen.unsqueeze(1)
