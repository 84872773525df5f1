"""A step from changes to sampled tokens, on whatever device the tensors are.

    changes ─▶ put in place ─▶ a captured step, or inputs ─▶ decoder ─▶ sample ─▶ append ─▶ outcome

Nothing is read back: on CUDA the work is queued, on torch's meta device it is not done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenloom.worker.steps.batch import Batch, SampleRows
from tokenloom.worker.steps.results import Outcome
from tokenloom.worker.steps.sampling import Sampler
from tokenloom.worker.steps.shapes import Computed

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from tokenloom.worker.loading import LoadedModel
    from tokenloom.worker.model import Decoder
    from tokenloom.worker.steps.graphs import StepGraphs
    from tokenloom.worker.steps.slots import Changes, Limits, Slots


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What holds the requests on the device; it outlives epochs of the same limits."""

    limits: Limits
    batch: Batch
    sampler: Sampler
    graphs: StepGraphs | None = None
    """None where steps are not captured."""

    @staticmethod
    def empty(limits: Limits, decoder: Decoder, device: torch.device) -> Rows:
        """Returns rows without requests and without captured steps."""
        return Rows(
            limits=limits,
            batch=Batch(limits, decoder.operations, device),
            sampler=Sampler(limits.num_slots, limits.vocab_size, device, decoder.ranks),
        )


def compute(
    changes: Changes,
    loaded: LoadedModel,
    rows: Rows,
    slots: Slots,
    start: torch.cuda.Event | None = None,
) -> Outcome | None:
    """Queues all of a step that `slots` has applied; None if nothing is sampled.

    `start` is recorded when the host is done with the changes: while it is at them
    the device may be waiting.
    """
    rows.sampler.admit(changes.admitted)
    fresh_blocks = rows.batch.apply(changes)
    if fresh_blocks is not None:
        loaded.pool.clear(fresh_blocks)
    forward = _place(changes, loaded, rows) if len(changes.span_slots) else None
    if start is not None:
        start.record()
    computed = None if forward is None else forward()
    if computed is None or not changes.span_samples.any():
        return None
    plain = rows.sampler.is_plain(changes.sample_slots, changes.sample_ends)
    if plain and computed.tokens is not None:
        return Outcome(tokens=computed.tokens, logprobs=None)
    # What a captured step drew of rows that are not plain is drawn again.
    return _sample(changes, computed, rows, slots)


def _place(changes: Changes, loaded: LoadedModel, rows: Rows) -> Callable[[], Computed]:
    """Puts a step's inputs on the device; returns what queues the rest of it."""
    replay = None if rows.graphs is None else rows.graphs.place(changes)
    if replay is not None:
        return replay
    inputs = rows.batch.inputs(changes)

    def forward() -> Computed:
        logits = loaded.decoder.forward(
            inputs.tokens,
            inputs.positions,
            inputs.last_tokens,
            spans=inputs.spans,
            pages=loaded.pool.pages,
            attention=loaded.attention,
        )
        return Computed(slots=inputs.row_slots, ends=inputs.row_ends, logits=logits)

    return forward


def _sample(changes: Changes, computed: Computed, rows: Rows, slots: Slots) -> Outcome:
    sample_rows = SampleRows(
        slots=computed.slots,
        ends=computed.ends,
        host_slots=changes.sample_slots,
        host_ends=changes.sample_ends,
    )
    sampled = rows.sampler.sample(
        computed.logits, sample_rows, rows.batch.tokens, slots.num_prompt_tokens
    )
    rows.batch.append(computed.slots, computed.ends, sampled.tokens)
    return Outcome.of(sampled)
