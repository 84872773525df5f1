"""The draws in plain torch: the CPU's, and what the kernels are tested against.

torch has no unsigned 64-bit arithmetic: int64 wraps in the same way, and what a
right shift drags in from the sign is masked off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.worker.drawing.base import MIN_TEMPERATURE, Drawn, DrawTable


class TorchDrawing:
    """Plain torch: sorts the rows that are restricted. On CUDA it would wait for the device."""

    name = "torch"

    def draw(
        self, logits: Tensor, table: DrawTable, slots: Tensor, ends: Tensor, *, masked: bool
    ) -> Drawn:
        """Draws a token for each row."""
        healthy = logits < torch.inf if masked else logits.isfinite()
        faulty = ~healthy.all(dim=-1)
        tokens = logits.argmax(dim=-1)
        [random] = (table.floats[slots, 0] > 0).nonzero(as_tuple=True)
        if len(random):
            tokens[random] = _draw(logits[random].float(), table, slots[random], ends[random])
        return Drawn(tokens=tokens.masked_fill_(faulty, 0).int(), faulty=faulty)


def _draw(logits: Tensor, table: DrawTable, slots: Tensor, ends: Tensor) -> Tensor:
    """Returns int64 [num_random] for float32 logits of rows with a temperature."""
    temperature, top_p, min_p = table.floats[slots].unbind(1)
    top_k, seed_low, seed_high = table.ints[slots].long().unbind(1)
    scores = logits / temperature.clamp_min(MIN_TEMPERATURE)[:, None]
    [rows] = ((top_k > 0) | (top_p < 1) | (min_p > 0)).nonzero(as_tuple=True)
    if len(rows):
        restrictions = (each[rows, None] for each in (top_k, top_p, min_p))
        smallest = _smallest_kept(scores[rows], *restrictions)
        scores[rows] = scores[rows].masked_fill(scores[rows] < smallest, -torch.inf)
    seeds = (seed_high << 32) | (seed_low & _LOW_HALF)
    return (scores - exponential(seeds, ends.long(), scores.shape[1]).log()).argmax(dim=-1)


def _smallest_kept(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Returns [num_rows, 1]: the smallest score that top_k, top_p and min_p leave over.

    `scores` is [num_rows, vocab_size], the others [num_rows, 1]; a top_k of 0 keeps all.
    """
    vocab_size = scores.shape[1]
    ordered = scores.sort(dim=-1, descending=True).values
    kth = ordered.gather(1, torch.where(top_k > 0, top_k, vocab_size) - 1)
    probs = ordered.masked_fill(ordered < kth, -torch.inf).softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # [num_rows, vocab_size] mass of the likelier ones
    kept = (ordered >= kth) & (probs >= min_p * probs[:, :1])
    # A sum that rounding carries to 1 must not cut the tail where top_p keeps all.
    kept &= (before < top_p) | (top_p >= 1)
    return ordered.masked_fill(~kept, torch.inf).amin(dim=-1, keepdim=True)


def exponential(seeds: Tensor, positions: Tensor, num_tokens: int) -> Tensor:
    """Returns float32 [num_rows, num_tokens] numbers of the exponential distribution, rate 1.

    `seeds` and `positions` are int64 [num_rows]. All results are positive and finite.
    """
    keys = _mix(_mix(seeds) + positions)  # [num_rows]
    counters = torch.arange(1, (num_tokens + 1) // 2 + 1, device=seeds.device)
    bits = _mix(keys[:, None] + counters * _GOLDEN)  # [num_rows, ceil(num_tokens / 2)]
    halves = torch.stack((bits & _LOW_HALF, (bits >> 32) & _LOW_HALF), dim=-1)
    # Small numbers decide the race and keep their precision; the largest are cut short of 1.
    uniform = (halves.flatten(1)[:, :num_tokens].float() + 0.5) * 2.0**-32
    return -torch.log1p(-uniform.clamp_max(1 - 2.0**-24))


def _mix(values: Tensor) -> Tensor:
    values = (values ^ _shift(values, 30)) * _FIRST
    values = (values ^ _shift(values, 27)) * _SECOND
    return values ^ _shift(values, 31)


def _shift(values: Tensor, by: int) -> Tensor:
    return (values >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)
_LOW_HALF = 0xFFFFFFFF
