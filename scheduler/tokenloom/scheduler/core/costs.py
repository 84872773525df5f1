"""What steps cost, learned from their results: how many prompt tokens go beside decoding requests.

Every stream in decode waits for the end of a step. So a step with prompts may last about
`MAX_STALL` times one that only decodes, and the prompts fill what that leaves:

    │ decode_s │ budget · prompt_token_s            │
    0                                    MAX_STALL · decode_s

Both figures are low estimates, because all that disturbs a step (kernels that are compiled, a
profiler, a host that is late) only makes it longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_STALL = 3.0
"""Of a step beside decoding requests, as a multiple of one that only decodes.

The streams' own worst gap may be 5 times their median; the rest is for what no plan foresees."""

MIN_PROMPT_TOKENS = 128
"""Of a step beside decoding requests: fewer would not fill a tile of a matmul."""

UNKNOWN_PROMPT_TOKENS = 512
"""The same while the costs are not known."""

UNKNOWN_DECODE_WEIGHT = 2.0
"""Prompt tokens that a token of a completion is worth, while the costs are not known."""

MAX_DECODE_WEIGHT = 16.0
"""The same at most, whatever a disturbed step says."""

MAX_TOKENS = 2**31
"""More than any step computes."""

RISE_WEIGHT = 0.1
"""Of the newest sample in a figure that rises, or moves slowly."""


@dataclass(slots=True)
class StepCosts:
    """Of one epoch: another worker may run on another device. None: not known."""

    decode_s: float | None = None
    """A step that only decodes: falls at once, rises slowly."""
    prompt_token_s: float | None = None
    """A prompt token in the step that computed them at the highest rate.

    A step's whole time is divided, so this is never less than what a token costs, and steps that
    cannot be short (a launch that takes longer than the device) do not make the next ones ever
    smaller. What attention to a long context adds is not foreseen."""

    least_s: float | None = None
    """The shortest step."""
    decode_token_s: float = 0.0
    """What each request in decode adds to the shortest step; moves slowly."""

    def note(self, *, num_prompt_tokens: int, num_decoding: int = 0, compute_s: float) -> None:
        """Enters a step that took `compute_s`; what is no duration tells nothing."""
        if not 0 < compute_s < math.inf:
            return
        self.least_s = min(compute_s, self.least_s or compute_s)
        if num_prompt_tokens:
            token_s = compute_s / num_prompt_tokens
            self.prompt_token_s = min(token_s, self.prompt_token_s or token_s)
        else:
            old = self.decode_s or compute_s
            self.decode_s = min(compute_s, old + RISE_WEIGHT * (compute_s - old))
        if num_decoding:
            prompts_s = num_prompt_tokens * (self.prompt_token_s or 0.0)
            added_s = max(0.0, compute_s - self.least_s - prompts_s) / num_decoding
            self.decode_token_s += RISE_WEIGHT * (added_s - self.decode_token_s)

    def decode_weight(self, num_decoding: int) -> float:
        """Returns what one of `num_decoding` requests costs a step, in prompt tokens."""
        if not self.decode_s or not self.prompt_token_s or not num_decoding:
            return 1.0
        return self.decode_s / (num_decoding * self.prompt_token_s)

    @property
    def completion_weight(self) -> float:
        """How many prompt tokens a token of a completion is worth, by what each adds to a step."""
        if not self.decode_token_s or not self.prompt_token_s:
            return UNKNOWN_DECODE_WEIGHT
        return min(max(self.decode_token_s / self.prompt_token_s, 1.0), MAX_DECODE_WEIGHT)

    def decoding_s(self, num_decoding: int) -> float | None:
        """Returns what a step lasts in which so many decode and no prompt is computed."""
        return None if not self.least_s else self.least_s + num_decoding * self.decode_token_s

    def prompt_tokens_in(self, seconds: float) -> int:
        """Returns how many prompt tokens can be computed in a time; 0: none, or it is not known."""
        if not self.prompt_token_s or not seconds > 0:
            return 0
        return int(min(seconds / self.prompt_token_s, MAX_TOKENS))

    def prompt_budget(self, room: int, *, num_decoding: int = 0) -> int:
        """Returns how many prompt tokens a step with `room` for them takes beside decodes.

        With `num_decoding` they are as many as that many decoding requests allow; else as those
        of late.
        """
        decode_s = self.decode_s
        if num_decoding:
            decode_s = max(decode_s or 0.0, self.decoding_s(num_decoding) or 0.0)
        if not decode_s or not self.prompt_token_s:
            return min(room, UNKNOWN_PROMPT_TOKENS)
        fitting = (MAX_STALL - 1) * decode_s / self.prompt_token_s
        return int(min(room, max(fitting, MIN_PROMPT_TOKENS)))
