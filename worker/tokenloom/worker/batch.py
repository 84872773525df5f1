"""The persistent batch on the device: tokens and block tables of every slot.

A step brings changes alone. They travel as one packed copy and are put in place
by index; what the model needs is then gathered on the device, where the tokens
are that the step before sampled and the host has not seen yet.

    slot      tokens [num_slots + 1, max_tokens]   ends   tables [num_slots + 1, max_slot_blocks]
    3         t0 t1 t2 t3 | t4 ·                   4      7 2 · ·
                            └ appended by `append`, read by the next step
    idle      0 0 · · · ·                          0      spare spare · ·

The row behind the slots is nobody's: it fills a captured decode step up to its
size. It computes position 0 of the pool's spare block again and again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from tokenloom.worker.attention import Spans
from tokenloom.worker.transfer import upload

if TYPE_CHECKING:
    from torch import Tensor

    from tokenloom.worker.drawing import Drawn
    from tokenloom.worker.kernels import Operations
    from tokenloom.worker.slots import Changes, Limits

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
    rows: SampleRows


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
        if not changes.admitted and not len(changes.block_ids):
            return None
        none = np.empty(0, dtype=np.int32)
        lengths = [len(admitted.tokens) for admitted in changes.admitted]
        slots = np.array([admitted.slot for admitted in changes.admitted], dtype=np.int32)
        self._num_cached[slots] = [admitted.num_computed for admitted in changes.admitted]
        first_fresh = -(-self._num_cached[changes.block_slots] // self._block_size)
        on_device = upload(
            self._device,
            np.repeat(slots, lengths),
            np.concatenate([none, *(np.arange(length, dtype=np.int32) for length in lengths)]),
            np.concatenate([none, *(admitted.tokens for admitted in changes.admitted)]),
            slots,
            self._num_cached[slots],
            changes.block_slots,
            changes.block_indices,
            changes.block_ids,
            changes.block_ids[changes.block_indices >= first_fresh],
        )
        rows, columns, tokens, admitted, ends = on_device[:5]
        block_slots, block_indices, block_ids, fresh = on_device[5:]
        self.tokens[rows.long(), columns.long()] = tokens
        self._ends[admitted.long()] = ends.long()
        self._tables[block_slots.long(), block_indices.long()] = block_ids
        return fresh.long() if len(fresh) else None

    def inputs(self, changes: Changes) -> StepInputs:
        """Returns what the model needs to compute the spans, at least one, of a step."""
        starts, lengths = changes.span_starts, changes.span_lengths
        ends = starts + lengths
        offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=offsets[1:])
        inside = np.arange(offsets[-1], dtype=np.int32) - np.repeat(offsets[:-1], lengths)
        sample_slots = changes.span_slots[changes.span_samples]
        sample_ends = ends[changes.span_samples]
        on_device = upload(
            self._device,
            np.repeat(changes.span_slots, lengths),
            inside + np.repeat(starts, lengths),
            offsets,
            ends,
            changes.span_slots,
            offsets[1:][changes.span_samples] - 1,
            sample_slots,
            sample_ends,
        )
        token_slots, positions, device_offsets, kv_lengths = on_device[:4]
        span_slots, last_tokens, row_slots, row_ends = on_device[4:]
        rows, columns, owners = token_slots.long(), positions.long(), span_slots.long()
        self._ends[owners] = kv_lengths.long()
        blocks = self._tables[rows, columns // self._block_size].long()
        max_kv_length = int(ends.max())
        max_blocks = -(-max_kv_length // self._block_size)
        longer = lengths > 1
        return StepInputs(
            tokens=self.tokens[rows, columns],
            positions=columns,
            spans=Spans(
                offsets=device_offsets,
                kv_lengths=kv_lengths,
                block_tables=self._tables[owners, :max_blocks],
                places=blocks * self._block_size + columns % self._block_size,
                num_decodes=int(longer.argmax()) if longer.any() else len(lengths),
                max_length=int(lengths.max()),
                max_kv_length=max_kv_length,
            ),
            last_tokens=last_tokens.long(),
            rows=SampleRows(
                slots=row_slots.long(),
                ends=row_ends.long(),
                host_slots=sample_slots,
                host_ends=sample_ends,
            ),
        )

    def ends(self, slots: Tensor) -> Tensor:
        """Returns int64 [num_rows]: how many tokens of int64 [num_rows] slots are computed."""
        return self._ends[slots]

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
