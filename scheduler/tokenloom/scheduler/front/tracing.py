"""Spans of Generate calls, by OpenTelemetry: one a call, made when the call is over.

    caller's span ── traceparent ──▶ span of the call ── queue ──▶ thread ── OTLP ──▶ collector

What the caller's span tells about sampling holds; without one OTEL_TRACES_SAMPLER does, and all is
sampled without that. The queue is bounded: where the collector cannot follow, spans are dropped.

Names of attributes are those of OpenTelemetry's conventions for RPC and for generative AI where
these have one, and else begin with `tokenloom.`.
"""

from __future__ import annotations

import os
import threading
import time

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from tokenloom.scheduler.front.record import Record, TraceParent

METHOD = "tokenloom.v1.Inference/Generate"
_CLOSE_S = 2.0
"""What a collector that does not answer may cost at the end."""
_SERVERS_FAULT = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""Statuses that the conventions count as errors of a server."""
_CONVENTIONAL = {
    "request_id": "gen_ai.response.id",
    "code": "rpc.response.status_code",
    "num_prompt_tokens": "gen_ai.usage.input_tokens",
    "num_cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "num_completion_tokens": "gen_ai.usage.output_tokens",
    "first_token_s": "gen_ai.response.time_to_first_chunk",
}
"""Fields of a record that have a name there."""
_LEFT_OUT = frozenset({"trace_id", "span_id", "total_s"})
"""The span itself has them."""

Attributes = dict[str, str | int | float | list[str]]


class Tracing:
    """Sends a span of each call that is told, from a thread of its own."""

    def __init__(self, *, endpoint: str, model: str, version: str) -> None:
        """Without an `endpoint`, OpenTelemetry's own variables say where spans go."""
        self._model = model
        named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "tokenloom"}
        instance = {"service.version": version, "service.instance.id": f"{os.getpid()}"}
        exporter = OTLPSpanExporter(endpoint=endpoint or None)
        self._provider = TracerProvider(
            resource=Resource.create({**named, **instance}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tokenloom.scheduler", version)
        self._epoch_s = time.time() - time.monotonic()
        """When this clock was 0, in seconds since 1970."""

    def tell(self, record: Record) -> None:
        """Makes a span of a call that is over, and notes its ids in the record."""
        parent = None if record.parent is None else _remote(record.parent)
        span = self._tracer.start_span(
            METHOD,
            context=set_span_in_context(NonRecordingSpan(parent)) if parent else None,
            kind=SpanKind.SERVER,
            start_time=self._time_ns(record.began_s),
        )
        ids = span.get_span_context()
        record.trace_id, record.span_id = f"{ids.trace_id:032x}", f"{ids.span_id:016x}"
        if not span.is_recording():
            return
        span.set_attributes(attributes(record, self._model))
        for at_s, event in record.events:
            span.add_event(f"tokenloom.{event}", timestamp=self._time_ns(at_s))
        if record.code in _SERVERS_FAULT:
            span.set_status(Status(StatusCode.ERROR, record.reason or record.code))
        assert record.ended_s is not None
        span.end(self._time_ns(record.ended_s))

    def close(self) -> None:
        """Sends what is left, and waits for that no longer than a moment."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(_CLOSE_S)

    def _time_ns(self, at_s: float) -> int:
        return round(1e9 * (self._epoch_s + at_s))


def attributes(record: Record, model: str) -> Attributes:
    """Returns what a span tells of a call that is over: numbers and names, never text."""
    told: Attributes = {
        "rpc.system.name": "grpc",
        "rpc.method": METHOD,
        "gen_ai.provider.name": "tokenloom",
        "gen_ai.operation.name": "chat" if record.is_chat else "text_completion",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
    }
    for name, value in record.fields().items():
        if isinstance(value, str | int | float) and name not in _LEFT_OUT:
            told[_CONVENTIONAL.get(name, f"tokenloom.{name}")] = value
    if record.code == "OK":
        told["gen_ai.response.finish_reasons"] = [record.reason]
    else:
        told["error.type"] = record.reason or record.code
    if record.max_tokens is not None:
        told["gen_ai.request.max_tokens"] = record.max_tokens
    if (sampling := record.sampling) is not None:
        told |= {
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
        }
    return told


def _remote(parent: TraceParent) -> SpanContext:
    return SpanContext(
        trace_id=parent.trace_id,
        span_id=parent.span_id,
        is_remote=True,
        trace_flags=TraceFlags(parent.flags),
        trace_state=TraceState.from_header([parent.state]) if parent.state else None,
    )
