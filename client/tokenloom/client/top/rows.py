"""What a replica shows: figures of its last report, and rates since the one before. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenloom.v1 import admin_pb2 as pb

State = Literal["ready", "not ready", "away"]

_STATES: tuple[State, ...] = ("ready", "not ready", "away")
"""From good to bad."""
_SUMMED = (
    *("num_running", "num_waiting", "num_waiting_tokens", "num_used_blocks", "num_blocks"),
    *("prompt_tokens_per_s", "cached_tokens_per_s", "generated_tokens_per_s"),
    *("finished_per_s", "refused_per_s", "num_preemptions", "num_recoveries"),
)
"""Of all replicas it is the sum of theirs."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A report and when it came."""

    at_s: float
    """Of a clock that only grows."""
    report: pb.WatchLoadResponse


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What is known of one replica now."""

    target: str
    before: Sample | None = None
    last: Sample | None = None
    """None: it is away, or has yet to say something."""
    error: str = ""
    """Why it is away."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One replica, or all together. What is None is not known."""

    target: str
    state: State
    error: str = ""
    model: str = ""
    num_running: float | None = None
    num_waiting: float | None = None
    num_waiting_tokens: float | None = None
    num_used_blocks: float | None = None
    num_blocks: float | None = None
    utilization: float | None = None
    """The fuller of KV pool and queue, 0 to 1; of all together that of the fullest replica."""
    prompt_tokens_per_s: float | None = None
    cached_tokens_per_s: float | None = None
    """Of the prompt tokens, those that the prefix cache had."""
    generated_tokens_per_s: float | None = None
    finished_per_s: float | None = None
    refused_per_s: float | None = None
    step_s: float | None = None
    busy_fraction: float | None = None
    """Of the time, that in which a step was under way; of all together their mean."""
    num_preemptions: float | None = None
    num_recoveries: float | None = None
    """Both since the replica began."""

    @property
    def kv_fraction(self) -> float | None:
        """Of the blocks, those that requests hold."""
        if self.num_used_blocks is None or not self.num_blocks:
            return None
        return self.num_used_blocks / self.num_blocks


def row_of(sight: Sight) -> Row:
    """Returns what is to be shown of a replica."""
    if sight.last is None:
        return Row(target=sight.target, state="away", error=sight.error)
    report = sight.last.report
    return Row(
        target=sight.target,
        state="ready" if report.is_ready else "not ready",
        model=report.model,
        num_running=report.num_running,
        num_waiting=report.num_waiting,
        num_waiting_tokens=report.num_waiting_tokens,
        num_used_blocks=report.num_used_blocks,
        num_blocks=report.num_blocks,
        utilization=report.utilization,
        prompt_tokens_per_s=_rate(sight, "num_prompt_tokens"),
        cached_tokens_per_s=_rate(sight, "num_cached_prompt_tokens"),
        generated_tokens_per_s=_rate(sight, "num_generated_tokens"),
        finished_per_s=_rate(sight, "num_finished"),
        refused_per_s=_rate(sight, "num_refused"),
        step_s=report.step_s if report.num_steps else None,
        busy_fraction=None if (busy := _rate(sight, "busy_s")) is None else min(1.0, busy),
        num_preemptions=report.num_preemptions,
        num_recoveries=report.num_recoveries,
    )


def total_of(rows: Sequence[Row]) -> Row:
    """Returns all replicas as one; of those that are away nothing is in it."""
    models = {row.model for row in rows if row.model}
    busy = _known(rows, "busy_fraction")
    sums: dict[str, Any] = {
        name: sum(known) if (known := _known(rows, name)) else None for name in _SUMMED
    }
    return Row(
        target="all",
        state=max((row.state for row in rows), key=_STATES.index, default="away"),
        model=models.pop() if len(models) == 1 else "",
        utilization=max(_known(rows, "utilization"), default=None),
        busy_fraction=sum(busy) / len(busy) if busy else None,
        **sums,
    )


def _known(rows: Sequence[Row], name: str) -> list[float]:
    return [value for row in rows if (value := getattr(row, name)) is not None]


def _rate(sight: Sight, name: str) -> float | None:
    """Returns by how much a count grows in a second; None without two reports of one core."""
    before, last = sight.before, sight.last
    if before is None or last is None or last.at_s <= before.at_s:
        return None
    if last.report.num_steps < before.report.num_steps:  # it began anew
        return None
    growth: float = getattr(last.report, name) - getattr(before.report, name)
    return max(0.0, growth) / (last.at_s - before.at_s)
