"""Sampling, vectorized over the rows of a step, with each row's own parameters.

What happens to a row's logits, in this order:

       ┌ edits: rare, so the host looks for rows that have any
    1  │ repetition penalty   tokens of prompt and completion: > 0 divided, < 0 multiplied
    2  │ presence, frequency  completion alone: subtracted once, and once for each occurrence
    3  │ logit bias           added
    4  └ min_tokens           stop tokens are -inf while the completion is too short
       ── log probabilities are those of the logits as they are here ──
    5  temperature            0 takes the largest logit and leaves out the rest
    6  top_k                  the k largest
    7  top_p                  of what is left, the likeliest until their sum reaches top_p
    8  min_p                  of what is left, those at least min_p as likely as the likeliest

Tokens whose logits are equal to the smallest one kept are kept as well. From
what is left one token is drawn by an exponential race: argmax(logit - log E),
E exponential. E is a function of (seed, position, token) alone, so a row's draw
depends on nothing but its own seed, position and logits.

From temperature to race it is one `draw` for rows of every kind, which reads their
parameters on the device. A CUDA graph may hold it: rows that are plain need no more.

Of several ranks each does all of this for rows of its own, and tells the others what came
of it (`ranks`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tokenloom.worker.drawing import Drawn, DrawTable, choose_drawing
from tokenloom.worker.errors import ProtocolError
from tokenloom.worker.kernels import FAULTY
from tokenloom.worker.ranks import ALONE
from tokenloom.worker.steps.batch import Int32Array, SampleRows
from tokenloom.worker.steps.transfer import upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tokenloom.wire.messages import SamplingParams
    from tokenloom.worker.ranks import Ranks
    from tokenloom.worker.steps.slots import Admitted

_NEVER = np.iinfo(np.int32).max


@dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Log probabilities for the rows that asked."""

    rows: Int32Array
    """[num_asked]"""
    num_top: Int32Array
    """[num_asked] how many each asked for"""
    drawn: Tensor
    """float32 [num_asked]"""
    top_ids: Tensor
    """int32 [num_asked, the largest of num_top]"""
    top: Tensor
    """float32 [num_asked, the largest of num_top]"""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What came of a step's rows, on the device."""

    tokens: Tensor
    """int32 [num_rows]"""
    faulty: Tensor
    """bool [num_rows] the logits were not finite; the token is 0"""
    logprobs: Logprobs | None


class Sampler:
    """Keeps each slot's parameters: numbers on the device, on the host what asks for edits."""

    def __init__(
        self, num_slots: int, vocab_size: int, device: torch.device, ranks: Ranks = ALONE
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._ranks = ranks
        self._params: list[SamplingParams | None] = [None] * num_slots
        self._drawing = choose_drawing(device)
        # One row more: the batch's idle row draws, too.
        self._table = DrawTable(
            floats=torch.zeros((num_slots + 1, 3), device=device),
            ints=torch.zeros((num_slots + 1, 3), dtype=torch.int32, device=device),
        )
        self._penalties = torch.zeros((num_slots, 3), device=device)
        """[num_slots, 3] repetition, presence, frequency"""
        self._is_penalized = np.zeros(num_slots, dtype=np.bool_)
        self._is_biased = np.zeros(num_slots, dtype=np.bool_)
        self._min_length = np.zeros(num_slots, dtype=np.int32)  # with the prompt; 0: no stops
        self._wants_logprobs = np.zeros(num_slots, dtype=np.bool_)
        self._plain_from = np.zeros(num_slots, dtype=np.int32)
        """[num_slots] position from which on a draw is all that a row needs"""

    def admit(self, admitted: Sequence[Admitted]) -> None:
        """Takes in the parameters of requests that enter their slots. Raises ProtocolError."""
        if not admitted:
            return
        floats = np.empty((len(admitted), 6), dtype=np.float32)
        ints = np.empty((len(admitted), 3), dtype=np.int32)
        for row, entry in enumerate(admitted):
            params, slot = entry.sampling, entry.slot
            self._check(params, slot)
            floats[row] = (
                params.temperature,
                params.top_p,
                params.min_p,
                params.repetition_penalty,
                params.presence_penalty,
                params.frequency_penalty,
            )
            seed = np.array([params.seed], dtype=np.uint64).view(np.int32)
            ints[row] = (min(params.top_k, self._vocab_size), seed[0], seed[1])
            self._params[slot] = params
            self._is_penalized[slot] = (
                params.repetition_penalty != 1
                or params.presence_penalty != 0
                or params.frequency_penalty != 0
            )
            self._is_biased[slot] = bool(params.logit_bias)
            self._min_length[slot] = (
                entry.num_prompt_tokens + params.min_tokens if params.stop_token_ids else 0
            )
            self._wants_logprobs[slot] = params.num_top_logprobs is not None
            is_never_plain = (
                self._is_penalized[slot] or self._is_biased[slot] or self._wants_logprobs[slot]
            )
            self._plain_from[slot] = _NEVER if is_never_plain else self._min_length[slot]
        slots = np.array([entry.slot for entry in admitted], dtype=np.int32)
        device_slots, device_floats, device_ints = upload(self._device, slots, floats, ints)
        index = device_slots.long()
        self._table.floats[index] = device_floats[:, :3]
        self._table.ints[index] = device_ints
        self._penalties[index] = device_floats[:, 3:]

    def is_plain(self, slots: Int32Array, ends: Int32Array) -> bool:
        """Returns whether `draw` is all that rows at these positions need: no edits, no logprobs.

        Both are [num_rows], on the host.
        """
        return bool((ends >= self._plain_from[slots]).all())

    def draw(self, logits: Tensor, slots: Tensor, ends: Tensor) -> Drawn:
        """Draws a token for each of the rows, which must be plain; work for the device alone.

        Args:
            logits: [num_rows, vocab_size] in the model's type, contiguous; of a rank, those of
                its own tokens.
            slots: Integers [num_rows]
            ends: Integers [num_rows] positions of the tokens to be drawn.
        """
        own, logits = self._ranks.own(len(slots)), self._ranks.spread(logits, self._vocab_size)
        drawn = self._drawing.draw(logits, self._table, slots[own], ends[own], masked=False)
        return self._shared(drawn, len(slots))

    def sample(
        self, logits: Tensor, rows: SampleRows, tokens: Tensor, num_prompt_tokens: Int32Array
    ) -> Sampled:
        """Draws a token for each row, after edits and with log probabilities where asked for.

        Args:
            logits: As in `draw`; float32 ones are edited in place.
            rows: Their slots and the positions of the tokens to be drawn.
            tokens: int32 [num_slots + 1, max_tokens], each slot's tokens so far.
            num_prompt_tokens: [num_slots]
        """
        slots = rows.host_slots
        if self.is_plain(slots, rows.host_ends):
            drawn = self.draw(logits, rows.slots, rows.ends)
            return Sampled(tokens=drawn.tokens, faulty=drawn.faulty, logprobs=None)
        own = self._ranks.own(len(slots))
        rows, logits = rows.part(own), self._ranks.spread(logits, self._vocab_size)
        faulty = ~logits.isfinite().all(dim=-1)
        logits = self._edited(logits, rows, tokens, num_prompt_tokens)
        drawn = self._drawing.draw(logits, self._table, rows.slots, rows.ends, masked=True)
        sampled = Drawn(tokens=drawn.tokens.masked_fill_(faulty, 0), faulty=faulty)
        logprobs = self._logprobs(logits, sampled.tokens, slots, own)
        drawn = self._shared(sampled, len(slots))
        return Sampled(tokens=drawn.tokens, faulty=drawn.faulty, logprobs=logprobs)

    def _shared(self, drawn: Drawn, num_rows: int) -> Drawn:
        """Returns what all ranks drew of so many rows."""
        if self._ranks.num_ranks == 1:
            return drawn
        tokens = self._ranks.gather(drawn.tokens.masked_fill(drawn.faulty, FAULTY), num_rows)
        return Drawn(tokens=tokens.clamp_min(0), faulty=tokens == FAULTY)

    def _edited(
        self, logits: Tensor, rows: SampleRows, tokens: Tensor, num_prompt_tokens: Int32Array
    ) -> Tensor:
        """Returns float32 logits with penalties, biases and no stop token that comes too early."""
        slots = rows.host_slots
        logits = logits.float()
        penalized = np.flatnonzero(self._is_penalized[slots])
        if len(penalized):
            self._penalize(logits, rows, penalized, tokens, num_prompt_tokens)
        if self._is_biased[slots].any():
            self._bias(logits, slots)
        too_short = np.flatnonzero(rows.host_ends < self._min_length[slots])
        if len(too_short):
            self._suppress_stops(logits, slots, too_short)
        return logits

    def _check(self, params: SamplingParams, slot: int) -> None:
        for token, _ in params.logit_bias:
            if not 0 <= token < self._vocab_size:
                raise ProtocolError(
                    f"slot {slot} biases token {token}; the vocabulary has {self._vocab_size}"
                )

    def _index(self, rows: np.typing.NDArray[np.int64]) -> Tensor:
        [index] = upload(self._device, rows.astype(np.int32))
        return index.long()

    def _penalize(
        self,
        logits: Tensor,
        rows: SampleRows,
        penalized: np.typing.NDArray[np.int64],
        tokens: Tensor,
        num_prompt_tokens: Int32Array,
    ) -> None:
        ends = rows.host_ends[penalized]
        index, device_ends, prompts = upload(
            self._device,
            penalized.astype(np.int32),
            ends[:, None],
            num_prompt_tokens[rows.host_slots[penalized], None],
        )
        slots = rows.slots[index.long()]
        ids = tokens[slots, : int(ends.max())].long()  # [num_penalized, longest]
        places = torch.arange(ids.shape[1], device=self._device)
        known = places < device_ends
        counts = torch.zeros((len(penalized), self._vocab_size), device=self._device)
        seen = counts.scatter_add(1, ids, known.float()) > 0
        counts.scatter_add_(1, ids, (known & (places >= prompts)).float())
        repetition, presence, frequency = self._penalties[slots].unsqueeze(-1).unbind(1)
        plain = logits[index.long()]
        repeated = torch.where(plain > 0, plain / repetition, plain * repetition)
        plain = torch.where(seen, repeated, plain)
        logits[index.long()] = plain - frequency * counts - presence * (counts > 0)

    def _bias(self, logits: Tensor, slots: Int32Array) -> None:
        entries = [
            (row, token, bias)
            for row in np.flatnonzero(self._is_biased[slots]).tolist()
            for token, bias in self._of(slots[row]).logit_bias
        ]
        rows, ids, biases = zip(*entries, strict=True)
        index, columns, values = upload(
            self._device,
            np.array(rows, dtype=np.int32),
            np.array(ids, dtype=np.int32),
            np.array(biases, dtype=np.float32),
        )
        logits.index_put_((index.long(), columns.long()), values, accumulate=True)

    def _suppress_stops(
        self, logits: Tensor, slots: Int32Array, rows: np.typing.NDArray[np.int64]
    ) -> None:
        entries = [
            (row, token)
            for row in rows.tolist()
            for token in self._of(slots[row]).stop_token_ids
            if 0 <= token < self._vocab_size  # others cannot be drawn anyway
        ]
        if entries:
            pairs = np.array(entries, dtype=np.int32)
            index, columns = upload(self._device, pairs[:, 0].copy(), pairs[:, 1].copy())
            logits[index.long(), columns.long()] = -torch.inf

    def _logprobs(
        self, logits: Tensor, drawn: Tensor, slots: Int32Array, own: slice
    ) -> Logprobs | None:
        """Returns those of all rows, of which logits and drawn tokens are this rank's own."""
        rows = np.flatnonzero(self._wants_logprobs[slots])
        if not len(rows):
            return None
        num_top = np.array(
            [self._of(slots[row]).num_top_logprobs or 0 for row in rows], dtype=np.int32
        )
        index = self._index(rows[(own.start <= rows) & (rows < own.stop)] - own.start)
        logprobs = logits[index].log_softmax(dim=-1)
        top, top_ids = logprobs.topk(min(int(num_top.max()), self._vocab_size), dim=-1)

        def shared(values: Tensor) -> Tensor:
            """Returns [num_asked, …] for [num_own_asked, …]."""
            if self._ranks.num_ranks == 1:
                return values
            of_own = values.new_zeros((len(drawn), *values.shape[1:]))
            of_own[index] = values
            return self._ranks.gather(of_own, len(slots))[self._index(rows)]

        return Logprobs(
            rows=rows.astype(np.int32),
            num_top=num_top,
            drawn=shared(logprobs.gather(1, drawn[index, None].long()).squeeze(1)),
            top_ids=shared(top_ids.int()),
            top=shared(top),
        )

    def _of(self, slot: int) -> SamplingParams:
        params = self._params[slot]
        assert params is not None
        return params
