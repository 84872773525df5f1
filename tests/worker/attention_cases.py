"""Random spans over random pages, with the dense keys and values beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenloom.worker.attention import Pages, Scales, Spans
from tokenloom.worker.fp8 import CODE_DTYPE, to_codes

SPANS: dict[str, Sequence[tuple[int, int]]] = {
    "one decode": [(4099, 1)],
    "decodes": [(0, 1), (1, 1), (63, 1), (64, 1), (127, 1), (128, 1), (255, 1), (256, 1), (999, 1)],
    "short spans": [(0, 2), (300, 3), (126, 4), (1500, 1)],
    "prefills": [(0, 127), (0, 128), (0, 129), (0, 1), (0, 700)],
    "chunks": [(128, 128), (1, 127), (127, 2), (300, 513)],
    "places left empty": [(700, 1), (3, 1), (0, 0), (0, 0), (0, 0), (64, 65), (0, 300), (0, 0)],
    "decodes and chunks": [(700, 1), (1023, 1), (128, 1), (0, 300), (64, 65), (500, 1), (256, 256)],
}
"""(start, length) of each, about where blocks end; decodes first, as the core plans steps;
an empty span is (0, 0)"""


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    spans: Sequence[tuple[int, int]]
    """(start, length) of each"""
    queries: Tensor
    """[num_tokens, num_heads, head_dim]"""
    keys: list[Tensor]
    """of each span: [end, num_kv_heads, head_dim]"""
    values: list[Tensor]
    pages: Pages
    step: Spans


def as_codes(pages: Pages) -> Pages:
    """Returns the pages in 8 bits; what is NaN in them is so in codes and scales."""
    keys, key_scales = _coded(pages.keys)
    values, value_scales = _coded(pages.values)
    return Pages(keys=keys, values=values, scales=Scales(keys=key_scales, values=value_scales))


def _coded(numbers: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = to_codes(numbers)
    scales[numbers.isnan().all(-1)] = torch.nan
    assert codes.dtype == CODE_DTYPE
    return codes, scales.transpose(2, 3).contiguous()


def make_case(
    spans: Sequence[tuple[int, int]],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rest: float = 0.0,
    seed: int | None = None,
) -> AttentionCase:
    """Returns a case whose pages hold `rest` wherever no request has written."""
    rng = torch.Generator().manual_seed(len(spans) if seed is None else seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(dtype)

    starts = np.array([start for start, _ in spans], dtype=np.int32)
    lengths = np.array([length for _, length in spans], dtype=np.int32)
    ends = starts + lengths
    num_blocks = -(-ends // block_size)
    tables = np.zeros((len(spans), int(num_blocks.max())), dtype=np.int32)
    shuffled = np.random.default_rng(0).permutation(int(num_blocks.sum()) + 3)
    pages = Pages(
        keys=torch.full((2, len(shuffled), block_size, num_kv_heads, head_dim), rest).to(dtype),
        values=torch.full((2, len(shuffled), block_size, num_kv_heads, head_dim), rest).to(dtype),
    )
    keys, values, places = [], [], []
    taken = 0
    for span, end in enumerate(ends.tolist()):
        blocks = shuffled[taken : taken + num_blocks[span]]
        taken += num_blocks[span]
        tables[span, : len(blocks)] = blocks
        positions = np.arange(end)
        place = torch.from_numpy(blocks[positions // block_size] * block_size)
        place += torch.from_numpy(positions % block_size)
        keys.append(normal(end, num_kv_heads, head_dim))
        values.append(normal(end, num_kv_heads, head_dim))
        pages.keys[0].flatten(0, 1)[place] = keys[-1]
        pages.values[0].flatten(0, 1)[place] = values[-1]
        places.append(place[starts[span] :])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return AttentionCase(
        spans=spans,
        queries=normal(int(lengths.sum()), num_heads, head_dim).to(device),
        keys=keys,
        values=values,
        pages=Pages(keys=pages.keys.to(device), values=pages.values.to(device)),
        step=Spans(
            offsets=torch.from_numpy(offsets).to(device),
            kv_lengths=torch.from_numpy(ends).to(device),
            block_tables=torch.from_numpy(tables).to(device),
            places=torch.cat(places).to(device),
            num_decodes=next((i for i, each in enumerate(lengths) if each > 1), len(lengths)),
            max_length=int(lengths.max()),
            max_kv_length=int(ends.max()),
        ),
    )
