"""What those who operate a server know of one Generate call: numbers and names, never its text."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from tokenloom.wire.messages import SamplingParams

if TYPE_CHECKING:
    from tokenloom.scheduler.front.streams import Stream

MAX_EVENTS = 64
"""More of one call are not kept: a request may be preempted again and again."""
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")


class Event(StrEnum):
    """What happens to a call between its begin and its end."""

    ADMITTED = "admitted"
    FIRST_TOKEN = "first_token"
    PREEMPTED = "preempted"
    MODEL_LOST = "model_lost"
    RECOVERED = "recovered"
    """The first token since the model was lost."""


@dataclass(frozen=True, kw_only=True)
class TraceParent:
    """The caller's span, as W3C's Trace Context tells it."""

    trace_id: int
    span_id: int
    flags: int
    state: str = ""
    """`tracestate` as it came."""

    @staticmethod
    def of(metadata: Iterable[tuple[str, str | bytes]]) -> TraceParent | None:
        """Returns what a call's metadata tell, None if that is nothing or not well formed."""
        told = {key: value for key, value in metadata if key in {"traceparent", "tracestate"}}
        parts = _TRACEPARENT.fullmatch(str(told.get("traceparent", "")))
        if parts is None:
            return None
        trace_id, span_id, flags = (int(part, 16) for part in parts.groups())
        if not trace_id or not span_id:
            return None
        state = str(told.get("tracestate", ""))
        return TraceParent(trace_id=trace_id, span_id=span_id, flags=flags, state=state)


@dataclass(kw_only=True, eq=False)
class Record:
    """One call, from its begin to its end; filled in as things become known."""

    parent: TraceParent | None
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    began_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None
    events: list[tuple[float, Event]] = field(default_factory=list)
    """In order; times in seconds of `time.monotonic`."""
    tenant: str = ""
    is_chat: bool = False
    priority: int = 0
    num_prompt_tokens: int | None = None
    max_tokens: int | None = None
    sampling: SamplingParams | None = None
    stream: Stream | None = None
    """None: it did not come so far."""
    code: str = "OK"
    """The name of the gRPC status that it ended with."""
    error_reason: str = ""
    """As the status' ErrorInfo has it; empty: it ended with a Finish, or the client left."""
    fault_id: str | None = None
    gpu_hour_price: float | None = None
    """None: its cost has no price."""
    trace_id: str | None = None
    span_id: str | None = None
    """Of this call's own span, if there is one."""

    def mark(self, event: Event) -> None:
        """Notes that something happened, now."""
        if len(self.events) < MAX_EVENTS:
            self.events.append((time.monotonic(), event))

    def since_begin_s(self, event: Event) -> float | None:
        """Returns how long it took until something happened first."""
        return next((at_s - self.began_s for at_s, each in self.events if each is event), None)

    @property
    def reason(self) -> str:
        """Why it ended: of a Finish its reason, of another status that of its ErrorInfo."""
        if self.code != "OK":
            return self.error_reason
        finished = None if self.stream is None else self.stream.finished
        return "" if finished is None else str(finished.reason)

    def fields(self) -> dict[str, object]:
        """Returns all that there is to tell once it is over; what is None is not known."""
        stream = self.stream
        finished = None if stream is None else stream.finished
        told: dict[str, object] = {
            "request_id": self.request_id,
            "tenant": self.tenant or None,
            "code": self.code,
            "reason": self.reason or None,
            "fault_id": self.fault_id,
            "priority": self.priority or None,
            "num_prompt_tokens": self.num_prompt_tokens,
            "total_s": None if self.ended_s is None else self.ended_s - self.began_s,
        }
        if stream is not None:
            told |= {
                "num_cached_tokens": stream.num_cached_tokens,
                "num_completion_tokens": stream.num_tokens,
                "first_token_s": self.since_begin_s(Event.FIRST_TOKEN),
                "num_recoveries": sum(each is Event.RECOVERED for _, each in self.events) or None,
            }
        if finished is not None:
            told |= {
                "queue_s": finished.queue_s,
                "prefill_s": finished.prefill_s,
                "decode_s": finished.decode_s,
                "gpu_s": finished.gpu_s,
                "kv_block_s": finished.kv_block_s,
                "num_recomputed_tokens": finished.num_recomputed_tokens,
                "num_preemptions": finished.num_preemptions,
                "price": finished.price(self.gpu_hour_price),
            }
        return told | {"trace_id": self.trace_id, "span_id": self.span_id}
