"""The persistent batch on the device: tokens and block tables of every slot.

A step brings changes alone. They travel as one packed copy and are put in place
by index; what the model needs is then gathered on the device, where the tokens
are that the step before sampled and the host has not seen yet.

    slot      tokens [num_slots + 1, max_tokens]   ends   tables [num_slots + 1, max_slot_blocks]
    3         t0 t1 t2 t3 | t4 ·                   4      7 2 · ·
                            └ appended by `append`, read by the next step
    idle      0 0 · · · ·                          0      spare spare · ·

The row behind the slots is nobody's: it fills a captured step up to its shape. It
computes position 0 of the pool's spare block again and again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from tokenloom.worker.attention import Spans
from tokenloom.worker.steps.transfer import upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tokenloom.worker.drawing import Drawn
    from tokenloom.worker.kernels import Operations
    from tokenloom.worker.steps.slots import Admitted, Changes, Limits

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class SampleRows:
    """The spans of a step that sample."""

    slots: Tensor
    """int64 [num_rows]"""
    ends: Tensor
    """int64 [num_rows] position that the sampled token gets"""
    host_slots: Int32Array
    """[num_rows]"""
    host_ends: Int32Array
    """[num_rows]"""

    def part(self, rows: slice) -> SampleRows:
        """Returns a run of them."""
        return SampleRows(
            slots=self.slots[rows],
            ends=self.ends[rows],
            host_slots=self.host_slots[rows],
            host_ends=self.host_ends[rows],
        )


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """How much room a step has, and bounds of what is in it."""

    num_tokens: int
    num_spans: int
    num_decodes: int
    """Leading spans of at most one token"""
    num_rows: int
    """Spans that sample"""
    max_length: int
    """No span has more tokens"""
    max_kv_length: int
    """No request attends to more positions"""

    @staticmethod
    def of(changes: Changes) -> StepShape:
        """Returns the room that a step, which has at least one span, just fills."""
        return StepShape(
            num_tokens=changes.num_tokens,
            num_spans=len(changes.span_slots),
            num_decodes=changes.num_decodes,
            num_rows=int(changes.span_samples.sum()),
            max_length=int(changes.span_lengths.max()),
            max_kv_length=int((changes.span_starts + changes.span_lengths).max()),
        )


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """A step as the model takes it."""

    tokens: Tensor
    """int32 [num_tokens] span after span"""
    positions: Tensor
    """int64 [num_tokens]"""
    spans: Spans
    last_tokens: Tensor
    """int64 [num_rows] tokens of the step whose successors are sampled"""
    row_slots: Tensor
    """int64 [num_rows]"""
    row_ends: Tensor
    """int64 [num_rows] position that the sampled token gets"""


@dataclass(frozen=True, kw_only=True)
class DecodeInputs:
    """A step of one token a row, known to the device alone."""

    tokens: Tensor
    """int32 [num_rows] each slot's last token"""
    positions: Tensor
    """int64 [num_rows] its position"""
    spans: Spans


class Batch:
    """The device's side of all slots. `Slots` has checked what comes here."""

    def __init__(self, limits: Limits, operations: Operations, device: torch.device) -> None:
        self._operations = operations
        self._block_size = limits.block_size
        self._device = device
        self.idle_slot = limits.num_slots
        """The row that is nobody's."""
        num_rows = limits.num_slots + 1
        self.tokens = torch.zeros(
            (num_rows, max(2, limits.max_model_tokens)), dtype=torch.int32, device=device
        )
        self._ends = torch.zeros(num_rows, dtype=torch.int64, device=device)
        """[num_slots + 1] tokens computed: the position that a decode computes next"""
        self._tables = torch.zeros(
            (num_rows, limits.max_slot_blocks), dtype=torch.int32, device=device
        )
        self._tables[self.idle_slot] = limits.num_blocks  # the pool's spare block
        self._offsets = torch.arange(num_rows, dtype=torch.int32, device=device)
        self._num_cached = np.zeros(limits.num_slots, dtype=np.int32)
        """[num_slots] positions that lay in cached blocks when the slot was admitted"""

    def apply(self, changes: Changes) -> Tensor | None:
        """Puts admitted tokens and new blocks in place.

        Returns:
            int64 [num_fresh] blocks that come without content and are to be
            cleared; None if there are none.
        """
        if changes.admitted:
            self._admit(changes.admitted)
        if not len(changes.block_ids):
            return None
        first_fresh = -(-self._num_cached[changes.block_slots] // self._block_size)
        slots, indices, ids, fresh = upload(
            self._device,
            changes.block_slots,
            changes.block_indices,
            changes.block_ids,
            changes.block_ids[changes.block_indices >= first_fresh],
        )
        self._tables[slots.long(), indices.long()] = ids
        return fresh.long() if len(fresh) else None

    def _admit(self, admitted: Sequence[Admitted]) -> None:
        lengths = [len(each.tokens) for each in admitted]
        slots = np.array([each.slot for each in admitted], dtype=np.int32)
        self._num_cached[slots] = [each.num_computed for each in admitted]
        rows, columns, tokens, device_slots, ends = upload(
            self._device,
            np.repeat(slots, lengths),
            np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
            np.concatenate([each.tokens for each in admitted]),
            slots,
            self._num_cached[slots],
        )
        self.tokens[rows.long(), columns.long()] = tokens
        self._ends[device_slots.long()] = ends.long()

    def inputs(self, changes: Changes) -> StepInputs:
        """Returns what the model needs to compute the spans, at least one, of a step."""
        shape = StepShape.of(changes)
        return self.look_up(upload(self._device, *self.columns(changes, shape)), shape)

    def columns(self, changes: Changes, shape: StepShape) -> tuple[Int32Array, ...]:
        """Returns what `look_up` has to be told of a step that fits in a shape.

        The spans that are no decodes begin at the shape's own num_decodes; places
        before and behind them are empty spans of the idle slot. So are the tokens
        behind the last one, which belong to no span, and the rows.

            decodes      others       tokens               rows that sample
            3 1 5 · ·    2 4 · ·      3 1 5 2 2 2 4 4 · ·  3 1 5 2 · · · · ·
        """
        slots, starts, lengths = changes.span_slots, changes.span_starts, changes.span_lengths
        at = np.arange(len(slots))  # [num_spans] the places of spans in the shape
        at[changes.num_decodes :] += shape.num_decodes - changes.num_decodes
        offsets = np.zeros(shape.num_spans + 1, dtype=np.int32)
        np.cumsum(_spread(lengths, at, shape.num_spans, 0), out=offsets[1:])
        begins = offsets[at]
        num_tokens, idle = int(offsets[-1]), self.idle_slot
        tokens, samples = slice(num_tokens), changes.span_samples
        positions = np.arange(num_tokens, dtype=np.int32) + np.repeat(starts - begins, lengths)
        rows = slice(int(samples.sum()))
        return (
            _spread(np.repeat(slots, lengths), tokens, shape.num_tokens, idle),
            _spread(positions, tokens, shape.num_tokens, 0),
            offsets,
            _spread(starts + lengths, at, shape.num_spans, 0),
            _spread(slots, at, shape.num_spans, idle),
            _spread((begins + lengths - 1)[samples], rows, shape.num_rows, 0),
            _spread(slots[samples], rows, shape.num_rows, idle),
            _spread((starts + lengths)[samples], rows, shape.num_rows, 1),
        )

    def look_up(self, columns: Sequence[Tensor], shape: StepShape) -> StepInputs:
        """Returns what the model needs to compute a step of which the device has `columns`.

        It may be captured: nothing depends on what the columns hold.
        """
        token_slots, token_positions, offsets, kv_lengths = columns[:4]
        span_slots, last_tokens, row_slots, row_ends = columns[4:]
        slots, positions, owners = token_slots.long(), token_positions.long(), span_slots.long()
        self._ends[owners] = kv_lengths.long()
        blocks = self._tables[slots, positions // self._block_size].long()
        max_blocks = -(-shape.max_kv_length // self._block_size)
        return StepInputs(
            tokens=self.tokens[slots, positions],
            positions=positions,
            spans=Spans(
                offsets=offsets,
                kv_lengths=kv_lengths,
                block_tables=self._tables[owners, :max_blocks],
                places=blocks * self._block_size + positions % self._block_size,
                num_decodes=shape.num_decodes,
                max_length=shape.max_length,
                max_kv_length=shape.max_kv_length,
            ),
            last_tokens=last_tokens.long(),
            row_slots=row_slots.long(),
            row_ends=row_ends.long(),
        )

    def append(self, slots: Tensor, ends: Tensor, tokens: Tensor) -> None:
        """Writes int32 [num_rows] sampled tokens behind their slots' last ones."""
        self.tokens[slots, ends] = tokens

    def decode_inputs(self, slots: Tensor) -> DecodeInputs:
        """Returns what computes the next token of int64 [num_rows] slots; nothing is copied.

        It may be captured: the shapes are those of the largest requests.
        """
        num_rows = len(slots)
        rows = self._operations.begin_decode(
            slots, self._ends, self.tokens, self._tables, self._block_size
        )
        return DecodeInputs(
            tokens=rows.tokens,
            positions=rows.positions,
            spans=Spans(
                offsets=self._offsets[: num_rows + 1],
                kv_lengths=rows.kv_lengths,
                block_tables=rows.block_tables,
                places=rows.places,
                num_decodes=num_rows,
                max_length=1,
                max_kv_length=self.tokens.shape[1],
            ),
        )

    def advance(self, slots: Tensor, positions: Tensor, drawn: Drawn) -> Tensor:
        """Appends the tokens that a decode drew and moves its slots on; the idle row stays.

        Returns:
            int32 [num_rows] the tokens as the host takes them, FAULTY for faulty rows.
        """
        return self._operations.end_decode(
            slots,
            positions,
            drawn.tokens,
            drawn.faulty,
            self._ends,
            self.tokens,
            self.idle_slot,
        )


def _spread(
    values: Int32Array, at: npt.NDArray[np.int64] | slice, size: int, rest: int
) -> Int32Array:
    """Returns [size] with the values where they belong and `rest` elsewhere."""
    spread = np.full(size, rest, dtype=np.int32)
    spread[at] = values
    return spread
