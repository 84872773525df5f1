"""What those who watch a server hear of its load."""

from __future__ import annotations

from tokenloom.scheduler.front.errors import InvalidRequest, Violation
from tokenloom.scheduler.messages import Load
from tokenloom.v1 import admin_pb2 as pb

MIN_INTERVAL_S = 0.1
"""The core tells no oftener."""
MAX_INTERVAL_S = 60.0
_INTERVAL_S = 1.0


def interval_of(request: pb.WatchLoadRequest) -> float:
    """Returns the seconds between two reports. Raises InvalidRequest."""
    if not request.HasField("interval_s"):
        return _INTERVAL_S
    interval_s = request.interval_s
    if not MIN_INTERVAL_S <= interval_s <= MAX_INTERVAL_S:
        description = f"is {interval_s:g}; it must be {MIN_INTERVAL_S:g} to {MAX_INTERVAL_S:g}"
        raise InvalidRequest([Violation(field="interval_s", description=description)])
    return interval_s


def report_of(load: Load | None, *, model: str, is_ready: bool) -> pb.WatchLoadResponse:
    """Returns the report on what the core told last; `model` is empty while none is served."""
    if load is None:
        return pb.WatchLoadResponse(model=model, is_ready=is_ready)
    return pb.WatchLoadResponse(
        model=model,
        is_ready=is_ready,
        num_waiting=load.num_waiting,
        num_waiting_tokens=load.num_waiting_tokens,
        num_running=load.num_running,
        max_num_requests=load.max_num_requests,
        num_blocks=load.num_blocks,
        num_used_blocks=load.num_used_blocks,
        utilization=load.utilization,
        num_steps=load.num_steps,
        num_finished=load.num_finished,
        num_refused=load.num_refused,
        num_generated_tokens=load.num_generated_tokens,
        num_prompt_tokens=load.num_prompt_tokens,
        num_cached_prompt_tokens=load.num_cached_prompt_tokens,
        num_preemptions=load.num_preemptions,
        num_recoveries=load.num_recoveries,
        busy_s=load.busy_s,
        step_s=load.step_s,
    )
