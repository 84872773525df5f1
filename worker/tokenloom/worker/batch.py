"""The persistent batch on the device: tokens and block tables of every slot.

A step brings changes alone. They travel as one packed copy and are put in place
by index; what the model needs is then gathered on the device, where the tokens
are that the step before sampled and the host has not seen yet.

    slot      tokens [num_slots, max_tokens]     tables [num_slots, max_slot_blocks]
    3         t0 t1 t2 t3 | t4 ·                 7 2 · ·
                            └ appended by `append`, read by the next step
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


class Batch:
    """The device's side of all slots. `Slots` has checked what comes here."""

    def __init__(self, limits: Limits, device: torch.device) -> None:
        self._block_size = limits.block_size
        self._device = device
        self.tokens = torch.zeros(
            (limits.num_slots, limits.max_model_tokens), dtype=torch.int32, device=device
        )
        self._tables = torch.zeros(
            (limits.num_slots, limits.max_slot_blocks), dtype=torch.int32, device=device
        )
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
        rows, columns, tokens, block_slots, block_indices, block_ids, fresh = upload(
            self._device,
            np.repeat(slots, lengths),
            np.concatenate([none, *(np.arange(length, dtype=np.int32) for length in lengths)]),
            np.concatenate([none, *(admitted.tokens for admitted in changes.admitted)]),
            changes.block_slots,
            changes.block_indices,
            changes.block_ids,
            changes.block_ids[changes.block_indices >= first_fresh],
        )
        self.tokens[rows.long(), columns.long()] = tokens
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
        rows, columns = token_slots.long(), positions.long()
        blocks = self._tables[rows, columns // self._block_size].long()
        max_blocks = -(-int(ends.max()) // self._block_size)
        return StepInputs(
            tokens=self.tokens[rows, columns],
            positions=columns,
            spans=Spans(
                offsets=device_offsets,
                kv_lengths=kv_lengths,
                block_tables=self._tables[span_slots.long(), :max_blocks],
                places=blocks * self._block_size + columns % self._block_size,
                host_starts=starts,
                host_lengths=lengths,
            ),
            last_tokens=last_tokens.long(),
            rows=SampleRows(
                slots=row_slots.long(),
                ends=row_ends.long(),
                host_slots=sample_slots,
                host_ends=sample_ends,
            ),
        )

    def append(self, rows: SampleRows, tokens: Tensor) -> None:
        """Writes int32 [num_rows] sampled tokens behind their slots' last ones."""
        self.tokens[rows.slots, rows.ends] = tokens
