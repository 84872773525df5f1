"""What requests cost, and what the core has done in all. Nothing is decided by it.

A step's GPU-seconds, its seconds on the device times the group's GPUs, are shared by the
requests in it:

    a decoding request     decode_s / num_decoding      its part of a step that only decodes
    a span of a prompt     length · prompt_token_s      both by what steps have cost (`costs.py`)

each times what makes the sum the step's own. A request that lost its slot while the step was under
way gets nothing of it and pays nothing; those who stayed pay for themselves alone.

How long blocks are held is metered by the block pool (`blocks.py`). What is computed again is seen
when a request gives up its slot. So all this costs a step one sum over its spans, and no loop.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokenloom.scheduler import metrics
from tokenloom.scheduler.messages import Finished, FinishReason
from tokenloom.scheduler.metrics import Histogram

Float64Array = npt.NDArray[np.float64]

STEP_WEIGHT = 0.1
"""Of the newest step in the moving average of their time."""


@dataclass(slots=True)
class TenantTotals:
    """What the finished requests of a tenant cost."""

    gpu_s: float = 0.0
    kv_block_s: float = 0.0
    num_generated_tokens: int = 0


@dataclass(slots=True)
class Totals:
    """Counts since the core began."""

    num_steps: int = 0
    """Whose result has come."""
    num_finished_by_reason: Counter[FinishReason] = field(default_factory=Counter)
    tenants: dict[str, TenantTotals] = field(default_factory=dict)
    """By name; what is nobody's in particular is not among them."""
    num_refused: int = 0
    num_generated_tokens: int = 0
    num_prompt_tokens: int = 0
    """Of requests that got a slot for the first time."""
    num_cached_prompt_tokens: int = 0
    """Of these, found in the prefix cache."""
    num_preemptions: int = 0
    """For lack of blocks, or of trust in a suspect; not with the group that ran them."""
    num_recomputed_tokens: int = 0
    num_recoveries: int = 0
    """Groups that took over from one that was lost."""
    gpu_s: float = 0.0
    """Of all steps, on all GPUs."""
    busy_s: float = 0.0
    """In which a step was under way."""
    step_s: float = 0.0
    """A step's time of late, from the result before it where there was one."""
    begun_s: float = 0.0
    """When the oldest step in flight became the next to be computed."""
    lost_s: float | None = None
    """Since when there is no group in place of the one that was lost."""
    step_times: Histogram = field(default_factory=lambda: Histogram(metrics.STEP_TIME))
    step_sizes: Histogram = field(default_factory=lambda: Histogram(metrics.STEP_NUM_REQUESTS))
    token_gaps: Histogram = field(default_factory=lambda: Histogram(metrics.INTER_TOKEN_LATENCY))
    queue_times: Histogram = field(default_factory=lambda: Histogram(metrics.REQUEST_QUEUE_TIME))
    prefill_times: Histogram = field(
        default_factory=lambda: Histogram(metrics.REQUEST_PREFILL_TIME)
    )
    recovery_times: Histogram = field(default_factory=lambda: Histogram(metrics.RECOVERY_TIME))

    @property
    def num_finished(self) -> int:
        """Requests that were taken and ended."""
        return self.num_finished_by_reason.total()

    @property
    def histograms(self) -> tuple[Histogram, ...]:
        """All of them."""
        return (
            self.step_times,
            self.step_sizes,
            self.token_gaps,
            self.queue_times,
            self.prefill_times,
            self.recovery_times,
        )

    def end_step(self, *, num_requests: int, now: float) -> None:
        """Enters the result of the oldest step in flight."""
        took_s = max(0.0, now - self.begun_s)
        self.begun_s = now
        self.num_steps += 1
        self.busy_s += took_s
        self.step_times.observe(took_s)
        self.step_sizes.observe(num_requests)
        weight = STEP_WEIGHT if self.num_steps > 1 else 1.0
        self.step_s += weight * (took_s - self.step_s)

    def note_tokens(self, last_s: Float64Array, now: float) -> None:
        """Enters a token each for requests that had their last one then; NaN: never."""
        self.num_generated_tokens += len(last_s)
        gaps = now - last_s
        self.token_gaps.observe_all(gaps[gaps >= 0])  # which NaN is not

    def finish(self, finished: Finished, *, tenant: str, num_generated_tokens: int) -> None:
        """Enters the end of a request, for which the core drew so many tokens."""
        self.num_finished_by_reason[finished.reason] += 1
        if finished.queue_s is not None:
            self.queue_times.observe(finished.queue_s)
        if finished.prefill_s is not None:
            self.prefill_times.observe(finished.prefill_s)
        if tenant:
            totals = self.tenants.setdefault(tenant, TenantTotals())
            totals.gpu_s += finished.gpu_s
            totals.kv_block_s += finished.kv_block_s
            totals.num_generated_tokens += num_generated_tokens

    def lose_group(self, now: float) -> None:
        """The group that served is gone."""
        self.lost_s = now

    def begin_epoch(self, now: float) -> None:
        """A group serves, the first one or one in place of another."""
        if self.lost_s is not None:
            self.num_recoveries += 1
            self.recovery_times.observe(max(0.0, now - self.lost_s))
            self.lost_s = None


def gpu_seconds(compute_s: float, num_gpus: int) -> float:
    """Returns what a step took of all GPUs; 0 if the worker's word is no duration."""
    return num_gpus * compute_s if 0 < compute_s < math.inf else 0.0


def shares(
    gpu_s: float, *, lengths: npt.NDArray[np.int64], num_decoding: int, decode_weight: float
) -> Float64Array:
    """Returns each span's part of a step's `gpu_s`: [num_spans], with `gpu_s` as their sum.

    The first `num_decoding` spans are of decoding requests, each worth `decode_weight` prompt
    tokens.
    """
    weights = lengths.astype(np.float64)
    weights[:num_decoding] = decode_weight
    total: float = weights.sum()
    return weights * (gpu_s / total)
