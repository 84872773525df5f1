"""What comes from outside into the state: requests, their ends, and workers' lives."""

from __future__ import annotations

import math

import numpy as np

from tokenloom.scheduler.core import quota, timeliness
from tokenloom.scheduler.core.blocks import BlockPool, Int32Array
from tokenloom.scheduler.core.costs import StepCosts
from tokenloom.scheduler.core.request import Request, waiting_bytes
from tokenloom.scheduler.core.state import ModelSpec, Slots, State
from tokenloom.scheduler.core.timeliness import Lateness
from tokenloom.scheduler.messages import (
    Abort,
    FinishReason,
    RefusalReason,
    Refused,
    Stop,
    Submit,
)

MIN_RETRY_S = 0.1
MAX_RETRY_S = 30.0
NOT_READY_RETRY_S = 1.0


def submit(state: State, front: int, message: Submit, now: float) -> None:
    """Queues a request, or refuses it with a reason that quotes the numbers."""

    def refuse(reason: RefusalReason, detail: str, retry_after_s: float | None) -> None:
        state.totals.num_refused += 1
        state.outputs_of(front).refused.append(
            Refused(
                stream=message.stream, reason=reason, detail=detail, retry_after_s=retry_after_s
            )
        )

    if state.is_draining:
        refuse(RefusalReason.DRAINING, "the server drains", None)
        return
    if state.spec is None:
        refuse(RefusalReason.NOT_READY, "the model is not loaded", NOT_READY_RETRY_S)
        return
    if (unreadable := _unreadable(state.spec, message)) is not None:
        refuse(RefusalReason.INVALID, unreadable, None)
        return
    tokens = np.frombuffer(message.tokens, np.int32)
    if (unfit := _unfit(state, state.spec, front, message, tokens)) is not None:
        refuse(*unfit, None)
        return
    line = state.waiting.line(message.tenant, now)
    if (limit := quota.over_limit(state, line, now)) is not None:
        detail, wait_s = limit
        refuse(RefusalReason.TENANT_LIMIT, detail, max(wait_s, _drain_s(state, len(tokens))))
        return
    num_bytes = waiting_bytes(len(tokens), message.sampling)
    full = _queue_full(state, len(tokens), num_bytes) or quota.part_full(state, line, len(tokens))
    if full is not None:
        refuse(RefusalReason.QUEUE_FULL, full, _drain_s(state, len(tokens)))
        return
    request = state.new_request(front, message, tokens, now)
    if (late := timeliness.lateness_in_queue(state, request, now)) is not None:
        refuse_late(state, request, late)
    elif line.bucket is not None:
        line.bucket.take(len(tokens))


def refuse_late(state: State, request: Request, late: Lateness) -> None:
    """Refuses a request that waits and would be done after its deadline."""
    retry_after_s = min(max(late.retry_after_s, MIN_RETRY_S), MAX_RETRY_S)
    state.refuse(request, RefusalReason.DEADLINE_UNREACHABLE, str(late), retry_after_s)


def abort(state: State, front: int, message: Abort) -> None:
    """Ends a request whose client left. An unknown stream has already ended."""
    request = state.requests.get((front, message.stream))
    if request is not None:
        state.finish(request, FinishReason.CANCELLED)


def abort_named(state: State, request_id: str) -> bool:
    """Ends a request, whoever's it is; returns whether there is one of that name."""
    for request in state.requests.values():
        if request.request_id == request_id:
            state.finish(request, FinishReason.CANCELLED)
            return True
    return False


def stop(state: State, front: int, message: Stop) -> None:
    """Ends a request whose text held a stop string after `num_tokens` tokens."""
    request = state.requests.get((front, message.stream))
    if request is not None:
        state.finish(request, FinishReason.STOP_STRING, num_completion_tokens=message.num_tokens)


def begin_epoch(state: State, spec: ModelSpec) -> None:
    """A group is ready: slots and blocks begin empty; what waits may run.

    A request that a larger group had accepted and that cannot fit now ends.
    """
    end_epoch(state)
    limits = state.limits
    state.spec = spec
    state.slots = Slots(limits.max_num_requests, spec)
    state.pool = BlockPool(spec.num_blocks, spec.block_size, cache=limits.prefix_cache)
    state.released = []
    state.costs = StepCosts()
    state.forecast.begin_epoch()
    for request in list(state.waiting):
        if request.max_total > spec.max_request_tokens:
            state.finish(request, FinishReason.NO_ROOM)
        else:
            # Digests depend on the block size, which may have changed.
            del request.digests[1:]


def end_epoch(state: State) -> None:
    """The group is gone: what ran waits, in order of arrival; KV and cache are forgotten."""
    state.in_flight.clear()
    if state.slots is not None:
        running = [request for request in state.slots.requests if request is not None]
        for request in sorted(running, key=lambda request: request.serial, reverse=True):
            state.requeue(request)
    state.spec = None
    state.slots = None
    state.pool = None


def _unreadable(spec: ModelSpec, message: Submit) -> str | None:
    """Returns what would not fit into the arrays of core or worker and so end every request."""
    if len(message.tokens) % 4:
        return f"tokens has {len(message.tokens)} bytes; each token has 4"
    if not 0 <= message.stream < 2**63:
        return f"stream is {message.stream}; it must have 63 bits"
    sampling = message.sampling
    if not 0 <= sampling.seed < 2**64:
        return f"seed is {sampling.seed}; it must have 64 bits"
    if message.timeout_s is not None and not -math.inf < message.timeout_s < math.inf:
        return f"timeout_s is {message.timeout_s}; it must be finite"
    ids = (*sampling.stop_token_ids, *(token_id for token_id, _ in sampling.logit_bias))
    if ids and not 0 <= min(ids) <= max(ids) < spec.vocab_size:
        return (
            f"stop tokens and biased tokens reach from {min(ids)} to {max(ids)}; "
            f"the model knows 0 to {spec.vocab_size - 1}"
        )
    return None


def _unfit(
    state: State, spec: ModelSpec, front: int, message: Submit, tokens: Int32Array
) -> tuple[RefusalReason, str] | None:
    """Returns why a request can never run as it stands."""
    max_tokens, num_completed = message.max_tokens, message.num_completion_tokens
    num_tokens = len(tokens) - num_completed  # of the prompt
    if (front, message.stream) in state.requests:
        return RefusalReason.DUPLICATE, f"stream {message.stream} is already in use"
    if num_tokens < 1 or max_tokens < 1:
        return RefusalReason.INVALID, (
            f"prompt has {num_tokens} tokens and max_tokens is {max_tokens}; "
            "each must be at least 1"
        )
    if not 0 <= num_completed < max_tokens:
        return RefusalReason.INVALID, (
            f"the completion begins with {num_completed} tokens and max_tokens is {max_tokens}; "
            "one at least is to come"
        )
    if tokens.min() < 0 or tokens.max() >= spec.vocab_size:
        return RefusalReason.INVALID, (
            f"token ids reach from {tokens.min()} to {tokens.max()}; "
            f"the model knows 0 to {spec.vocab_size - 1}"
        )
    if num_tokens + max_tokens > spec.max_request_tokens:
        return RefusalReason.TOO_LONG, (
            f"prompt has {num_tokens} tokens and max_tokens is {max_tokens}; "
            f"this server accepts {spec.max_request_tokens} in all"
        )
    return None


def _queue_full(state: State, num_tokens: int, num_bytes: int) -> str | None:
    """Returns why the queue takes no request of that size now."""
    limits, waiting = state.limits, state.waiting
    if len(waiting) >= limits.max_waiting_requests:
        return f"{len(waiting)} requests wait; at most {limits.max_waiting_requests} may"
    if waiting.num_tokens + num_tokens > limits.max_waiting_tokens:
        return (
            f"{waiting.num_tokens} prompt tokens wait and this prompt has {num_tokens}; "
            f"at most {limits.max_waiting_tokens} may wait"
        )
    if waiting.num_bytes + num_bytes > limits.max_waiting_bytes:
        return (
            f"{waiting.num_bytes} bytes of requests wait and this one has {num_bytes}; "
            f"at most {limits.max_waiting_bytes} may wait"
        )
    return None


def _drain_s(state: State, num_tokens: int) -> float:
    """Returns when the queue will have made room for a prompt of so many tokens.

    That is at least when a tenth of it has left: all that are refused now come back at about the
    same time, and one place would not do for them.
    """
    waiting = state.waiting
    tokens_each = waiting.num_tokens / max(1, len(waiting))
    num_leaving = max(1.0, len(waiting) / 10, num_tokens / max(1.0, tokens_each))
    wait_s = state.forecast.queue_s(num_leaving)
    return min(max(wait_s, MIN_RETRY_S), MAX_RETRY_S)
