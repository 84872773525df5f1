"""Steps in fixed shapes: what a CUDA graph can hold.

A graph repeats what was captured, on tensors of the same sizes at the same places. So
a step is put in the smallest shape that holds it; what is left over is the idle slot's.

    kind      is                                     its shape has room for
    decodes   one token of every slot, all sampled   rows
    mixed     spans of any length, some prompts      decodes, a few spans more, and tokens

Decodes stand where the device left them: a step of the slots of the step before brings
nothing. A mixed step is described by the host, in one copy. Its tokens lie close
together however few of them are decodes, so room for all decodes costs no more than the
head and the draw of rows that are nobody's, some 0.1 ms; without decodes there is a
shape without that room.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tokenloom.worker.steps.batch import StepShape
from tokenloom.worker.steps.slots import Changes
from tokenloom.worker.steps.transfer import packed_size, staged, upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tokenloom.worker.loading import LoadedModel
    from tokenloom.worker.model import Decoder
    from tokenloom.worker.steps.batch import Batch, Int32Array
    from tokenloom.worker.steps.sampling import Sampler
    from tokenloom.worker.steps.slots import Limits

NUM_OTHERS = 16
"""Spans that a mixed step may have behind its decodes."""
_MOST_TOKENS = 2048
"""Of a mixed step. The launches of a longer one hide behind its kernels: 2,048 prompt tokens take
Qwen3-0.6B 8 ms on an H200, and the host some 15 to launch."""


def ladder(max_rows: int) -> list[int]:
    """Returns the sizes of decode steps, ascending: a fifth of a large one at most is padding."""
    sizes = [1, 2, 4, 8, 16, *range(24, 64, 8), *range(64, 256, 16), *range(256, 512, 32)]
    sizes += range(512, max_rows, 64)
    return [size for size in sizes if size < max_rows] + [max_rows]


def mixed_ladder(max_tokens: int) -> list[int]:
    """Returns the sizes of mixed steps in tokens, ascending.

    The dense library computes tiles of 64 or 128 rows whether they are full or not, so
    finer sizes would gain next to nothing.
    """
    sizes = [*range(64, 1024, 64), *range(1024, _MOST_TOKENS + 1, 128)]
    return sizes[: bisect_left(sizes, max_tokens) + 1]


@dataclass(frozen=True, kw_only=True)
class Computed:
    """The rows of a step that sample, on the device. The next in a fixed shape overwrites them."""

    slots: Tensor
    """int64 [num_rows]"""
    ends: Tensor
    """int64 [num_rows] positions that the sampled tokens get"""
    logits: Tensor
    """[num_rows, vocab_size]"""
    tokens: Tensor | None = None
    """int32 [num_rows] drawn and appended, as `Batch.advance` says it; None: not drawn yet"""

    def first(self, num_rows: int) -> Computed:
        """Returns the leading rows."""
        rows = slice(num_rows)
        return Computed(
            slots=self.slots[rows],
            ends=self.ends[rows],
            logits=self.logits[rows],
            tokens=None if self.tokens is None else self.tokens[rows],
        )


class FixedSteps:
    """All fixed shapes of one model, batch and sampler. They share the memory of inputs and logits.

    `place` or `clear`, then `compute`: a graph holds the second alone.
    """

    def __init__(self, loaded: LoadedModel, batch: Batch, sampler: Sampler, limits: Limits) -> None:
        self._loaded = loaded
        self._excerpt = loaded.decoder.excerpt()
        self._batch = batch
        self._sampler = sampler
        self._decodes = [_decode_shape(size, limits) for size in ladder(limits.num_slots)]
        sizes = mixed_ladder(limits.max_step_tokens)
        self._mixed = {
            room: [_mixed_shape(room, size, limits) for size in sizes]
            for room in (0, limits.num_slots)
        }
        """By the decodes that they have room for"""
        device = batch.tokens.device
        self._placed = np.full(limits.num_slots, batch.idle_slot, dtype=np.int64)
        """What `_slots` holds."""
        self._slots = torch.from_numpy(self._placed.copy()).to(device)
        """int64 [num_slots] of decode steps"""
        mixed = [shape for shapes in self._mixed.values() for shape in shapes]
        num_numbers = max(packed_size(*batch.columns(_NOTHING, shape)) for shape in mixed)
        self._memory = torch.empty(num_numbers, dtype=torch.int32, device=device)
        """Of a mixed step's columns"""
        self._columns: dict[StepShape, tuple[Tensor, ...]] = {}
        """Where they lie in it, known of shapes that something was placed in"""
        embedding = loaded.decoder.embedding
        num_rows = max(shape.num_rows for shape in self.shapes)
        self._logits = torch.zeros(
            (num_rows, embedding.shape[0]), dtype=embedding.dtype, device=device
        )

    @property
    def shapes(self) -> list[StepShape]:
        """All, those with the most tokens first."""
        shapes = [*self._decodes, *(shape for shapes in self._mixed.values() for shape in shapes)]
        return sorted(shapes, key=lambda shape: shape.num_tokens, reverse=True)

    def place(self, changes: Changes) -> StepShape | None:
        """Puts a step, which has at least one span, where `compute` finds it.

        Returns:
            The shape to compute; None if the step is too large for all.
        """
        if changes.only_decodes:
            shape = _smallest(self._decodes, len(changes.span_slots))
            assert shape is not None, "more decodes than slots"
            self._place_decodes(changes.span_slots, shape)
            return shape
        num_decodes = changes.num_decodes
        if len(changes.span_slots) - num_decodes > NUM_OTHERS:
            return None
        room = next(room for room in self._mixed if room >= num_decodes)
        shape = _smallest(self._mixed[room], changes.num_tokens)
        if shape is not None:
            self._place_mixed(changes, shape)
        return shape

    def clear(self, shape: StepShape) -> None:
        """Puts a step of nobody in a shape, to be computed when it is captured."""
        if shape in self._decodes:
            self._place_decodes(_NOTHING.span_slots, shape)
        else:
            self._place_mixed(_NOTHING, shape)

    def compute(self, shape: StepShape) -> Computed:
        """Queues what was placed in a shape; all of its rows are drawn."""
        return self._compute(shape, self._loaded.decoder)

    def rehearse(self, shape: StepShape) -> None:
        """Launches for nobody, once each, the kernels of a shape: they and the libraries are ready.

        A captured launch must not be the first one of its kind.
        """
        self.clear(shape)
        self._compute(shape, self._excerpt)

    def _compute(self, shape: StepShape, decoder: Decoder) -> Computed:
        is_decode = shape in self._decodes
        return self._decode(shape, decoder) if is_decode else self._mix(shape, decoder)

    def _place_decodes(self, slots: Int32Array, shape: StepShape) -> None:
        wanted = np.full(shape.num_rows, self._batch.idle_slot, dtype=np.int64)
        wanted[: len(slots)] = slots
        if not np.array_equal(wanted, self._placed[: len(wanted)]):
            self._placed[: len(wanted)] = wanted
            self._slots[: len(wanted)].copy_(staged(wanted, self._slots.device), non_blocking=True)

    def _place_mixed(self, changes: Changes, shape: StepShape) -> None:
        columns = self._batch.columns(changes, shape)
        self._columns[shape] = upload(self._memory.device, *columns, memory=self._memory)

    def _decode(self, shape: StepShape, decoder: Decoder) -> Computed:
        loaded, batch, slots = self._loaded, self._batch, self._slots[: shape.num_rows]
        inputs = batch.decode_inputs(slots)
        logits = decoder.forward(
            inputs.tokens,
            inputs.positions,
            spans=inputs.spans,
            pages=loaded.pool.pages,
            attention=loaded.attention,
            out=self._logits[: shape.num_rows],
        )
        ends = inputs.positions + 1
        drawn = self._sampler.draw(logits, slots, ends)
        tokens = batch.advance(slots, inputs.positions, drawn)
        return Computed(slots=slots, ends=ends, logits=logits, tokens=tokens)

    def _mix(self, shape: StepShape, decoder: Decoder) -> Computed:
        loaded, batch = self._loaded, self._batch
        inputs = batch.look_up(self._columns[shape], shape)
        slots, ends = inputs.row_slots, inputs.row_ends
        logits = decoder.forward(
            inputs.tokens,
            inputs.positions,
            inputs.last_tokens,
            spans=inputs.spans,
            pages=loaded.pool.pages,
            attention=loaded.attention,
            out=self._logits[: shape.num_rows],
        )
        drawn = self._sampler.draw(logits, slots, ends)
        tokens = batch.advance(slots, ends - 1, drawn)
        return Computed(slots=slots, ends=ends, logits=logits, tokens=tokens)


def _smallest(shapes: Sequence[StepShape], num_tokens: int) -> StepShape | None:
    """Returns the first of ascending shapes that holds so many tokens, if any."""
    index = bisect_left(shapes, num_tokens, key=lambda shape: shape.num_tokens)
    return shapes[index] if index < len(shapes) else None


def _decode_shape(size: int, limits: Limits) -> StepShape:
    return StepShape(
        num_tokens=size,
        num_spans=size,
        num_decodes=size,
        num_rows=size,
        max_length=1,
        max_kv_length=limits.max_model_tokens,
    )


def _mixed_shape(num_decodes: int, size: int, limits: Limits) -> StepShape:
    num_spans = num_decodes + NUM_OTHERS
    return StepShape(
        num_tokens=size,
        num_spans=num_spans,
        num_decodes=num_decodes,
        num_rows=num_spans,
        max_length=size,
        max_kv_length=limits.max_model_tokens,
    )


_NONE: Int32Array = np.empty(0, dtype=np.int32)
_NOTHING = Changes(
    epoch=0,
    step_id=0,
    released=_NONE,
    admitted=(),
    block_slots=_NONE,
    block_indices=_NONE,
    block_ids=_NONE,
    span_slots=_NONE,
    span_starts=_NONE,
    span_lengths=_NONE,
    span_samples=np.empty(0, dtype=np.bool_),
)
