"""Whole decode steps as CUDA graphs, one for each of a ladder of sizes.

    slots ─▶ ┌ gather ─▶ layers ─▶ logits ─▶ draw ─▶ append, advance ┐ ─▶ tokens
             └───────────── captured once, launched as one ──────────┘

A step of n requests runs in the smallest graph of at least n rows; those left
over are the batch's idle row. All graphs work on the same static tensors and in
one memory pool: they run one after the other on one stream.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

import numpy as np
import torch

from tokenloom.worker.transfer import pinned

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from tokenloom.worker.batch import Batch, Int32Array
    from tokenloom.worker.loading import LoadedModel
    from tokenloom.worker.sampling import Sampler


def ladder(max_rows: int) -> list[int]:
    """Returns the sizes to capture, ascending: a fifth of a large step at most is padding."""
    sizes = [1, 2, 4, 8, 16, *range(24, 64, 8), *range(64, 256, 16), *range(256, 512, 32)]
    sizes += range(512, max_rows, 64)
    return [size for size in sizes if size < max_rows] + [max_rows]


class DecodeGraphs:
    """The graphs of one model, batch and sampler."""

    def __init__(self, loaded: LoadedModel, batch: Batch, sampler: Sampler, max_rows: int) -> None:
        """`capture` comes next."""
        self._loaded = loaded
        self._batch = batch
        self._sampler = sampler
        self._sizes = ladder(max_rows)
        device = batch.tokens.device
        self._placed = np.full(max_rows, batch.idle_slot, dtype=np.int64)
        """What `_slots` holds."""
        self._slots = torch.from_numpy(self._placed.copy()).to(device)
        embedding = loaded.decoder.embedding
        self._logits = torch.zeros(
            (max_rows, embedding.shape[0]), dtype=embedding.dtype, device=device
        )
        self._results: dict[int, Tensor] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(self, report: Callable[[float], None]) -> None:
        """Captures all sizes; `report` is told the fraction that is done."""
        device = self._slots.device
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the others then fit in the memory that it left in the pool.
        for index, size in enumerate(reversed(self._sizes)):
            self._compute(size)  # kernels are compiled and libraries set up outside of a capture
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):
                # Not `torch.cuda.graph`: it collects garbage and empties caches each time.
                # What other threads do, who copy weights meanwhile, is no concern of it.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    self._results[size] = self._compute(size)
                finally:
                    graph.capture_end()
            self._graphs[size] = graph
            report((index + 1) / len(self._sizes))
        torch.cuda.synchronize(device)

    def replay(self, slots: Int32Array) -> tuple[Tensor, Tensor, Tensor]:
        """Queues a decode step of [num_rows] slots.

        Returns:
            The slots, their logits and what was drawn of them, as `Batch.advance`
            says it; [num_rows] each. The next replay overwrites them all.
        """
        num_rows = len(slots)
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        wanted = np.full(size, self._batch.idle_slot, dtype=np.int64)
        wanted[:num_rows] = slots
        if not np.array_equal(wanted, self._placed[:size]):
            self._placed[:size] = wanted
            self._slots[:size].copy_(pinned(wanted), non_blocking=True)
        self._graphs[size].replay()
        return self._slots[:num_rows], self._logits[:num_rows], self._results[size][:num_rows]

    def _compute(self, size: int) -> Tensor:
        loaded, batch, slots = self._loaded, self._batch, self._slots[:size]
        inputs = batch.decode_inputs(slots)
        logits = loaded.decoder.forward(
            inputs.tokens,
            inputs.positions,
            spans=inputs.spans,
            pages=loaded.pool.pages,
            attention=loaded.attention,
            out=self._logits[:size],
        )
        drawn = self._sampler.draw(logits, slots, inputs.positions + 1)
        return batch.advance(slots, inputs.positions, drawn)
