"""The host's mirror of the persistent batch: it checks each Step and unpacks it.

Everything that a Step changes is predictable without knowing a sampled token:
a span moves the slot's computed end, a sampled row makes the slot one token
longer. So the host keeps these few numbers for each slot, refuses a Step that
contradicts them, and never asks the device.

    slot's tokens   0 ········ num_computed ········ length ········ max_model_tokens
                    └ KV is there ┘└ to be computed ┘└ room for samples ┘
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenloom.wire.messages import SamplingParams, Step
from tokenloom.worker.errors import ProtocolError

Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds that every Step must keep."""

    num_slots: int
    num_blocks: int
    block_size: int
    """KV positions in a block."""
    vocab_size: int
    max_model_tokens: int
    """Longest prompt + completion of a slot."""
    max_step_tokens: int

    @property
    def max_slot_blocks(self) -> int:
        """Blocks that the longest request needs."""
        return -(-self.max_model_tokens // self.block_size)


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A request that entered a slot, unpacked."""

    slot: int
    tokens: Int32Array
    """[num_tokens]"""
    num_prompt_tokens: int
    num_computed: int
    sampling: SamplingParams


@dataclass(frozen=True, kw_only=True)
class Changes:
    """A checked Step as arrays."""

    epoch: int
    step_id: int
    released: Int32Array
    """[num_released]"""
    admitted: tuple[Admitted, ...]
    block_slots: Int32Array
    """[num_new_blocks]"""
    block_indices: Int32Array
    """[num_new_blocks]"""
    block_ids: Int32Array
    """[num_new_blocks]"""
    span_slots: Int32Array
    """[num_spans]"""
    span_starts: Int32Array
    """[num_spans]"""
    span_lengths: Int32Array
    """[num_spans]"""
    span_samples: BoolArray
    """[num_spans]"""

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return int(self.span_lengths.sum())

    @property
    def num_decodes(self) -> int:
        """Leading spans of one token."""
        longer = self.span_lengths > 1
        return int(longer.argmax()) if longer.any() else len(longer)

    @property
    def only_decodes(self) -> bool:
        """Whether there are spans, and each is the last token of its slot."""
        num_spans = len(self.span_slots)
        return num_spans > 0 and bool(self.span_samples.all()) and self.num_tokens == num_spans

    @property
    def sample_slots(self) -> Int32Array:
        """[num_rows] slots of the spans that sample."""
        return self.span_slots[self.span_samples]

    @property
    def sample_ends(self) -> Int32Array:
        """[num_rows] positions that the sampled tokens get."""
        return (self.span_starts + self.span_lengths)[self.span_samples]


class Slots:
    """What the host knows of every slot.

    After a ProtocolError the state is undefined: the worker gives up its epoch.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        num_slots = limits.num_slots
        self.occupied = np.zeros(num_slots, dtype=np.bool_)  # [num_slots]
        self.lengths = np.zeros(num_slots, dtype=np.int32)  # [num_slots] tokens, sampled ones too
        self.num_prompt_tokens = np.zeros(num_slots, dtype=np.int32)  # [num_slots]
        self.num_computed = np.zeros(num_slots, dtype=np.int32)  # [num_slots]
        self.num_blocks = np.zeros(num_slots, dtype=np.int32)  # [num_slots] filled table entries
        self._last_step_id: int | None = None

    def apply(self, step: Step) -> Changes:
        """Checks `step`, advances the mirror past it and returns its columns.

        Raises:
            ProtocolError: The step contradicts the ones before it or a limit.
        """
        changes = _unpack(step)
        if self._last_step_id is not None and step.step_id <= self._last_step_id:
            raise ProtocolError(f"step {step.step_id} came after step {self._last_step_id}")
        self._last_step_id = step.step_id
        self._release(changes.released)
        for admitted in changes.admitted:
            self._admit(admitted)
        self._append_blocks(changes)
        self._advance(changes)
        return changes

    def _release(self, released: Int32Array) -> None:
        if not released.size:
            return
        self._check_slots(released, "released")
        if not self.occupied[released].all():
            free = released[~self.occupied[released]]
            raise ProtocolError(f"slots {free.tolist()} are released but hold no request")
        self.occupied[released] = False
        self.num_blocks[released] = 0

    def _admit(self, admitted: Admitted) -> None:
        limits, slot, num_tokens = self.limits, admitted.slot, len(admitted.tokens)
        if not 0 <= slot < limits.num_slots:
            raise ProtocolError(f"slot {slot} is admitted; there are {limits.num_slots} slots")
        if self.occupied[slot]:
            raise ProtocolError(f"slot {slot} is admitted but holds a request")
        if not 1 <= num_tokens <= limits.max_model_tokens:
            raise ProtocolError(
                f"slot {slot} is admitted with {num_tokens} tokens;"
                f" 1 to {limits.max_model_tokens} are possible"
            )
        if not 1 <= admitted.num_prompt_tokens <= num_tokens:
            raise ProtocolError(
                f"slot {slot} has a prompt of {admitted.num_prompt_tokens} in {num_tokens} tokens"
            )
        if not 0 <= admitted.num_computed < num_tokens:
            raise ProtocolError(
                f"slot {slot} is admitted with {admitted.num_computed} of {num_tokens} tokens"
                " computed; at least one must be left"
            )
        low, high = int(admitted.tokens.min()), int(admitted.tokens.max())
        if low < 0 or high >= limits.vocab_size:
            raise ProtocolError(
                f"slot {slot} has token ids from {low} to {high};"
                f" the vocabulary has {limits.vocab_size}"
            )
        self.occupied[slot] = True
        self.lengths[slot] = num_tokens
        self.num_prompt_tokens[slot] = admitted.num_prompt_tokens
        self.num_computed[slot] = admitted.num_computed
        self.num_blocks[slot] = 0

    def _append_blocks(self, changes: Changes) -> None:
        slots, indices, ids = changes.block_slots, changes.block_indices, changes.block_ids
        if not slots.size:
            return
        self._check_slots(slots, "given a block")
        if not self.occupied[slots].all():
            free = slots[~self.occupied[slots]]
            raise ProtocolError(f"slots {free.tolist()} are given blocks but hold no request")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.limits.num_blocks:
            raise ProtocolError(
                f"block ids go from {low} to {high}; the pool has {self.limits.num_blocks} blocks"
            )
        # Each entry must follow the one before it in its slot's table: the k-th
        # entry of a slot in this step belongs at num_blocks + k.
        order = np.argsort(slots, kind="stable")
        by_slot = slots[order]
        first = np.searchsorted(by_slot, by_slot)  # [num_new_blocks] where the slot's run begins
        expected = self.num_blocks[by_slot] + (np.arange(len(by_slot)) - first)
        if not np.array_equal(indices[order], expected):
            raise ProtocolError(
                f"blocks for slots {by_slot.tolist()} come at table indices"
                f" {indices[order].tolist()}; expected {expected.tolist()}"
            )
        if int(expected.max()) >= self.limits.max_slot_blocks:
            raise ProtocolError(
                f"a block table grows to {int(expected.max()) + 1} blocks;"
                f" {self.limits.max_slot_blocks} hold the longest request"
            )
        np.add.at(self.num_blocks, slots, 1)

    def _advance(self, changes: Changes) -> None:
        slots, starts, lengths = changes.span_slots, changes.span_starts, changes.span_lengths
        if not slots.size:
            return
        self._check_slots(slots, "computed")
        if len(np.unique(slots)) != len(slots):
            raise ProtocolError(f"a slot occurs twice among the spans of slots {slots.tolist()}")
        num_tokens = changes.num_tokens
        if num_tokens > self.limits.max_step_tokens:
            raise ProtocolError(
                f"the spans have {num_tokens} tokens; a step computes at most"
                f" {self.limits.max_step_tokens}"
            )
        ends = starts + lengths
        total = self.lengths[slots]
        self._check_spans(slots, ~self.occupied[slots], "hold no request")
        self._check_spans(slots, lengths < 1, "have an empty span")
        self._check_spans(slots, starts != self.num_computed[slots], "do not start where they are")
        self._check_spans(slots, ends > total, "reach past the last token")
        covered = self.num_blocks[slots] * self.limits.block_size
        self._check_spans(slots, ends > covered, "reach past their blocks")
        wrong = changes.span_samples != (ends == total)
        self._check_spans(slots, wrong, "sample elsewhere than at the last token, or do not there")
        full = changes.span_samples & (total >= self.limits.max_model_tokens)
        self._check_spans(slots, full, f"are full with {self.limits.max_model_tokens} tokens")
        self.num_computed[slots] = ends
        self.lengths[slots] += changes.span_samples

    def _check_slots(self, slots: Int32Array, what: str) -> None:
        low, high = int(slots.min()), int(slots.max())
        if low < 0 or high >= self.limits.num_slots:
            raise ProtocolError(
                f"slots from {low} to {high} are {what}; there are {self.limits.num_slots} slots"
            )

    def _check_spans(self, slots: Int32Array, wrong: BoolArray, what: str) -> None:
        if wrong.any():
            slot = int(slots[wrong][0])
            raise ProtocolError(
                f"{int(wrong.sum())} spans {what}; the first is of slot {slot}, which has"
                f" {self.num_computed[slot]} of {self.lengths[slot]} tokens computed"
                f" and {self.num_blocks[slot]} blocks of {self.limits.block_size}"
            )


def _unpack(step: Step) -> Changes:
    changes = Changes(
        epoch=step.epoch,
        step_id=step.step_id,
        released=_int32(step.released),
        admitted=tuple(
            Admitted(
                slot=admit.slot,
                tokens=_int32(admit.tokens),
                num_prompt_tokens=admit.num_prompt_tokens,
                num_computed=admit.num_computed,
                sampling=admit.sampling,
            )
            for admit in step.admitted
        ),
        block_slots=_int32(step.block_slots),
        block_indices=_int32(step.block_indices),
        block_ids=_int32(step.block_ids),
        span_slots=_int32(step.span_slots),
        span_starts=_int32(step.span_starts),
        span_lengths=_int32(step.span_lengths),
        span_samples=np.frombuffer(step.span_samples, dtype=np.uint8) != 0,
    )
    if not len(changes.block_slots) == len(changes.block_indices) == len(changes.block_ids):
        raise ProtocolError(
            f"the block columns have {len(changes.block_slots)}, {len(changes.block_indices)}"
            f" and {len(changes.block_ids)} rows"
        )
    num_spans = len(changes.span_slots)
    for column in (changes.span_starts, changes.span_lengths, changes.span_samples):
        if len(column) != num_spans:
            raise ProtocolError(f"span columns have {num_spans} and {len(column)} rows")
    return changes


def _int32(column: bytes) -> Int32Array:
    if len(column) % 4:
        raise ProtocolError(f"an int32 column has {len(column)} bytes")
    return np.frombuffer(column, dtype="<i4")
