"""Whole steps as CUDA graphs, one for each of a ladder of shapes.

    columns ─▶ ┌ look up ─▶ layers ─▶ logits ─▶ draw ─▶ append, advance ┐ ─▶ tokens
               └───────────── captured once, launched as one ───────────┘

All graphs work on the same static tensors and in one memory pool: they run one
after the other on one stream.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokenloom.worker.steps.batch import StepShape
    from tokenloom.worker.steps.shapes import Computed, FixedSteps
    from tokenloom.worker.steps.slots import Changes


class StepGraphs:
    """Steps in fixed shapes, captured."""

    def __init__(self, steps: FixedSteps, device: torch.device) -> None:
        """`capture` comes next."""
        self._steps = steps
        self._device = device
        self._captured: dict[StepShape, tuple[torch.cuda.CUDAGraph, Computed]] = {}

    def capture(self, report: Callable[[float], None]) -> None:
        """Captures all shapes; `report` is told the fraction that is done."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        pool = torch.cuda.graph_pool_handle()
        gc.collect()
        # The largest first: the others then fit in the memory that it left in the pool.
        shapes = self._steps.shapes
        for shape in shapes:
            self._steps.rehearse(shape)
        torch.cuda.synchronize(self._device)
        for index, shape in enumerate(shapes):
            self._steps.clear(shape)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream), _garbage_kept():
                # What other threads do, who copy weights meanwhile, is no concern of it.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    computed = self._steps.compute(shape)
                finally:
                    graph.capture_end()
            self._captured[shape] = graph, computed
            report((index + 1) / len(shapes))
        torch.cuda.synchronize(self._device)

    def place(self, changes: Changes) -> Callable[[], Computed] | None:
        """Puts a step, which has at least one span, where a graph finds it.

        Returns:
            What queues the graph and returns the rows that sample, to be read before the next
            step is placed; None if no shape holds the step.
        """
        shape = self._steps.place(changes)
        if shape is None:
            return None
        return partial(self._replay, shape, int(changes.span_samples.sum()))

    def _replay(self, shape: StepShape, num_rows: int) -> Computed:
        graph, computed = self._captured[shape]
        graph.replay()
        return computed.first(num_rows)


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Within it, nothing dies of a collection: a graph or an event that did would end a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
