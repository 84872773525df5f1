"""What a tenant may have: requests at once, tokens in a minute, and its part of the queue."""

from __future__ import annotations

from tokenloom.scheduler.core.queue import Line
from tokenloom.scheduler.core.state import State


def over_limit(state: State, line: Line, now: float) -> tuple[str, float] | None:
    """Returns why a tenant may have nothing more, and for how many seconds at least."""
    tenant, num_waiting = line.tenant, len(line.places)
    if tenant.max_requests is not None and line.num_requests >= tenant.max_requests:
        detail = (
            f"tenant {tenant.name} has {line.num_requests} requests; "
            f"at most {tenant.max_requests} may run or wait"
        )
        return detail, 0.0
    if tenant.max_waiting_requests is not None and num_waiting >= tenant.max_waiting_requests:
        detail = (
            f"{num_waiting} requests of tenant {tenant.name} wait; "
            f"at most {tenant.max_waiting_requests} may"
        )
        return detail, 0.0
    if line.bucket is None:
        return None
    state.settle()
    line.bucket.refill(now)
    wait_s = line.bucket.wait_s()
    if wait_s == 0:
        return None
    over = max(0.0, -line.bucket.level)
    detail = (
        f"tenant {tenant.name} may have {tenant.tokens_per_minute} tokens a minute; "
        f"it has used them and {over:.0f} more"
    )
    return detail, wait_s


def part_full(state: State, line: Line, num_tokens: int) -> str | None:
    """Returns why a tenant's part of the queue takes no prompt of `num_tokens` now.

    With several tenants each may wait with as much as is left free in the queue (Choudhury and
    Hahne, Dynamic queue length thresholds, 1998). Alone it has half of the queue, and the next
    one always finds room.
    """
    if not state.waiting.is_divided:
        return None
    limits, num_waiting, name = state.limits, len(line.places), line.tenant.name
    num_free = limits.max_waiting_requests - len(state.waiting)
    num_free_tokens = limits.max_waiting_tokens - state.waiting.num_tokens
    if num_waiting and num_waiting >= num_free:
        return (
            f"{num_waiting} requests of tenant {name} wait and {num_free} more may; "
            "a tenant may have half of the places that others leave"
        )
    if line.num_tokens and line.num_tokens + num_tokens > num_free_tokens:
        return (
            f"{line.num_tokens} prompt tokens of tenant {name} wait, {num_free_tokens} more may, "
            f"and this prompt has {num_tokens}; "
            "a tenant may have half of what others leave"
        )
    return None
