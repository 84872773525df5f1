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

RISE_WEIGHT = 0.1
"""Of the newest sample in a figure that rises."""


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

    def note(self, *, num_prompt_tokens: int, compute_s: float) -> None:
        """Enters a step that took `compute_s`; what is no duration tells nothing."""
        if not 0 < compute_s < math.inf:
            return
        if num_prompt_tokens:
            token_s = compute_s / num_prompt_tokens
            self.prompt_token_s = min(token_s, self.prompt_token_s or token_s)
        else:
            old = self.decode_s or compute_s
            self.decode_s = min(compute_s, old + RISE_WEIGHT * (compute_s - old))

    def decode_weight(self, num_decoding: int) -> float:
        """Returns what one of `num_decoding` requests costs a step, in prompt tokens."""
        if not self.decode_s or not self.prompt_token_s or not num_decoding:
            return 1.0
        return self.decode_s / (num_decoding * self.prompt_token_s)

    def prompt_budget(self, room: int) -> int:
        """Returns how many prompt tokens a step with `room` for them takes beside decodes."""
        if not self.decode_s or not self.prompt_token_s:
            return min(room, UNKNOWN_PROMPT_TOKENS)
        fitting = (MAX_STALL - 1) * self.decode_s / self.prompt_token_s
        return int(min(room, max(fitting, MIN_PROMPT_TOKENS)))
