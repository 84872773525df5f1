"""How long a request would take, by what requests and steps took lately.

A request that comes now goes through three waits:

    in the queue │ its prompt, behind those of others │ its completion, a token a step │
                 slot                                 first token                      end

* The *queue* moves on by one place in so many seconds of late.
* *Prompts* are computed at the cost that `costs.py` has learned; beside decoding requests they get
  the part of the time that `MAX_STALL` leaves them.
* A *token* takes a step that decodes, whose length is a line over the number of requests in it, by
  least squares, and the prompts of those who come meanwhile. In a steady load each token that is
  drawn brings a fixed number of prompt tokens, those of finished requests over what they drew.

How wrong that was lately, as a factor, is learned as TCP learns its time-outs: a mean and a mean
deviation. So a forecast is somewhat on the safe side where it has been unreliable, and where it has
been right it is taken at its word.

A completion need not be as long as its max_tokens. So what is remembered is which part of it others
with such a max_tokens reached; one that its deadline ended counts as long as it was. A request is
refused for no more than what nearly all have, for it may be a short one; those that run are taken
to become as long as half of all.

All of it is low where little is known: a request without a forecast is taken.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field

from tokenloom.scheduler.core.costs import MAX_STALL

STEP_WEIGHT = 1 / 256
"""Of the newest step in what steps take."""

END_WEIGHT = 1 / 32
"""Of the newest request that ended in what requests are like and how wrong the forecast was."""

INTERVAL_WEIGHT = 0.1
"""Of the newest sample in how fast the queue moves."""

NUM_DEVIATIONS = 0.5
"""So many mean deviations above the mean lies the factor that forecasts are multiplied by."""

LEAST_FACTOR, LARGEST_FACTOR = 0.5, 2.0
"""An error outside is taken as if it were one of these: it has another cause."""

MIN_STEPS = 16
"""That decode, before anything is foretold."""

SHORT_PART = 0.05
"""Of all completions are shorter than what a request is refused for."""

HALF = 0.5
"""Of all completions are shorter than what those that run are taken to become."""

NUM_LENGTHS = 64
"""Completions that are remembered of each size of max_tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What was foretold of a request when it got its slot."""

    prefill_s: float
    token_s: float

    def elapsed_s(self, num_tokens: int) -> float:
        """Returns when the last of so many tokens comes, counted from the slot."""
        return self.prefill_s + max(0, num_tokens - 1) * self.token_s


@dataclass(slots=True)
class StepLine:
    """Seconds of a step over the number of requests that decode in it, by least squares."""

    num: float = 0.0
    rows: float = 0.0
    squares: float = 0.0
    seconds: float = 0.0
    products: float = 0.0

    def note(self, num_rows: int, seconds: float) -> None:
        """Enters a step."""
        keep = 1 - STEP_WEIGHT
        self.num = keep * self.num + 1
        self.rows = keep * self.rows + num_rows
        self.squares = keep * self.squares + num_rows * num_rows
        self.seconds = keep * self.seconds + seconds
        self.products = keep * self.products + num_rows * seconds

    def at(self, num_rows: int) -> float | None:
        """Returns the seconds of a step with so many; None: too few were seen."""
        if self.num < MIN_STEPS:
            return None
        rows, seconds = self.rows / self.num, self.seconds / self.num
        variance = self.squares / self.num - rows * rows
        covariance = self.products / self.num - rows * seconds
        # Between flat and proportional; where the number hardly changed it is flat.
        slope = min(max(covariance / (variance + 1), 0.0), seconds / rows)
        return seconds + slope * (num_rows - rows)


@dataclass(slots=True)
class Lengths:
    """Which part of their max_tokens completions reached."""

    recent: deque[float] = field(default_factory=deque)
    ordered: list[float] = field(default_factory=list)

    def note(self, part: float) -> None:
        """Enters a completion that came to its own end."""
        self.recent.append(part)
        insort(self.ordered, part)
        if len(self.recent) > NUM_LENGTHS:
            del self.ordered[bisect_left(self.ordered, self.recent.popleft())]

    def quantile(self, share: float) -> float:
        """Returns the part of max_tokens that `share` of all stayed below."""
        return self.ordered[int(share * len(self.ordered))] if self.ordered else 0.0


@dataclass(slots=True)
class Forecast:
    """What was learned in one core's life; times are forgotten with the epoch."""

    decode: StepLine = field(default_factory=StepLine)
    interval_s: float | None = None
    """From one departure at the head of the queue to the next; idle time is none of it."""
    last_departure_s: float | None = None
    num_prompt_tokens: float = 0.0
    num_drawn_tokens: float = 0.0
    """Of requests that ended lately: computed for their prompts, and drawn."""
    lengths: dict[int, Lengths] = field(default_factory=dict)
    """By the bits of max_tokens."""
    mean_error: float = 1.0
    deviation: float = 0.0

    # Learning

    def begin_epoch(self) -> None:
        """Forgets what depends on the device."""
        self.decode = StepLine()
        self.last_departure_s = None
        self.mean_error, self.deviation = 1.0, 0.0

    def note_step(self, *, num_decoding: int, prompts_s: float, step_s: float) -> None:
        """Enters a step that took `step_s` on the clock, `prompts_s` of it for prompts."""
        if num_decoding and 0 < step_s < math.inf:
            self.decode.note(num_decoding, max(0.0, step_s - prompts_s))

    def note_departure(self, arrived_s: float, now: float) -> None:
        """Enters that the first of the queue has left it."""
        if self.last_departure_s is not None:
            interval_s = now - max(self.last_departure_s, arrived_s)
            old = self.interval_s
            self.interval_s = (
                interval_s if old is None else old + INTERVAL_WEIGHT * (interval_s - old)
            )
        self.last_departure_s = now

    def note_work(self, *, num_prompt_tokens: int, num_drawn_tokens: int) -> None:
        """Enters what was computed for a request that has ended."""
        keep = 1 - END_WEIGHT
        self.num_prompt_tokens = keep * self.num_prompt_tokens + num_prompt_tokens
        self.num_drawn_tokens = keep * self.num_drawn_tokens + num_drawn_tokens

    def note_length(self, *, max_tokens: int, num_tokens: int) -> None:
        """Enters a completion that came to its own end."""
        lengths = self.lengths.setdefault(max_tokens.bit_length(), Lengths())
        lengths.note(num_tokens / max_tokens)

    def note_error(self, estimate: Estimate, *, num_tokens: int, elapsed_s: float) -> None:
        """Enters what became of an estimate."""
        told_s = estimate.elapsed_s(num_tokens)
        if not 0 < told_s < math.inf:
            return
        error = min(max(elapsed_s / told_s, LEAST_FACTOR), LARGEST_FACTOR)
        self.deviation += END_WEIGHT * (abs(error - self.mean_error) - self.deviation)
        self.mean_error += END_WEIGHT * (error - self.mean_error)

    # Telling

    @property
    def factor(self) -> float:
        """What a forecast is multiplied by to be rather too long than too short."""
        return min(self.mean_error + NUM_DEVIATIONS * self.deviation, LARGEST_FACTOR)

    def useful_tokens(self, max_tokens: int) -> int:
        """Returns how many tokens a completion has at least, nearly always."""
        return self._length(max_tokens, SHORT_PART)

    def usual_tokens(self, max_tokens: int) -> int:
        """Returns how many tokens a completion has, as a median."""
        return self._length(max_tokens, HALF)

    def _length(self, max_tokens: int, share: float) -> int:
        lengths = self.lengths.get(max_tokens.bit_length())
        return 1 if lengths is None else max(1, math.ceil(lengths.quantile(share) * max_tokens))

    def queue_s(self, num_ahead: float) -> float:
        """Returns how long the queue takes to get past `num_ahead` requests."""
        return num_ahead * (self.interval_s or 0.0)

    def estimate(
        self, *, num_tokens: int, num_running: int, prompt_token_s: float | None
    ) -> Estimate | None:
        """Returns what a request takes once it has a slot; None: too little is known.

        `num_tokens` are to be computed up to its first one, others' prompts ahead of it included;
        `num_running` requests run then, it among them.
        """
        if prompt_token_s is None:
            return None
        decode_s = self.decode.at(num_running) or 0.0
        stretch = 1.0 if num_running == 1 else MAX_STALL / (MAX_STALL - 1)
        per_token = self.num_prompt_tokens / max(1.0, self.num_drawn_tokens)
        return Estimate(
            prefill_s=stretch * num_tokens * prompt_token_s + decode_s,
            token_s=decode_s + (num_running - 1) * per_token * prompt_token_s,
        )
