"""How busy the core is, and when the fronts are told."""

from __future__ import annotations

from tokenloom.scheduler.core.state import State
from tokenloom.scheduler.messages import Load

MIN_INTERVAL_S = 0.1
"""Between two reports, however much changes."""
MAX_INTERVAL_S = 1.0
"""Between two reports, also if nothing does."""


def load_of(state: State) -> Load:
    """Returns the report on a state."""
    limits, totals, pool = state.limits, state.totals, state.pool
    return Load(
        num_waiting=len(state.waiting),
        num_waiting_tokens=state.waiting.num_tokens,
        num_running=state.num_running,
        max_num_requests=limits.max_num_requests,
        num_blocks=0 if pool is None else pool.num_blocks,
        num_used_blocks=0 if pool is None else pool.num_blocks - pool.num_free,
        queue_fraction=max(
            len(state.waiting) / limits.max_waiting_requests,
            state.waiting.num_tokens / limits.max_waiting_tokens,
            state.waiting.num_bytes / limits.max_waiting_bytes,
        ),
        num_steps=totals.num_steps,
        num_finished=totals.num_finished,
        num_refused=totals.num_refused,
        num_generated_tokens=totals.num_generated_tokens,
        num_prompt_tokens=totals.num_prompt_tokens,
        num_cached_prompt_tokens=totals.num_cached_prompt_tokens,
        num_preemptions=totals.num_preemptions,
        num_recoveries=totals.num_recoveries,
        busy_s=totals.busy_s,
        step_s=totals.step_s,
    )


class LoadPace:
    """When the next report is due; times are the caller's."""

    def __init__(self) -> None:
        self._told_s = 0.0
        self._has_news = True

    def note(self) -> None:
        """Something may have changed."""
        self._has_news = True

    @property
    def due_s(self) -> float:
        """When to tell the fronts next."""
        return self._told_s + (MIN_INTERVAL_S if self._has_news else MAX_INTERVAL_S)

    def tell(self, now: float) -> None:
        """The fronts have been told."""
        self._told_s = now
        self._has_news = False
