"""An OpenTelemetry collector's end: takes spans over real OTLP, and keeps them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.e2e.server import wait_until


class Collector(TraceServiceServicer):
    """Listens on a port of its own until the end of `with`."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []
        """Of the processes that sent some."""
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._server = grpc.server(ThreadPoolExecutor(4))
        add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.endpoint = f"http://127.0.0.1:{port}"

    def Export(  # noqa: N802 - the proto file's name
        self, request: ExportTraceServiceRequest, _: grpc.ServicerContext
    ) -> ExportTraceServiceResponse:
        self.may_answer.wait(30)
        for of_process in request.resource_spans:
            self.resources.append(
                {each.key: each.value.string_value for each in of_process.resource.attributes}
            )
            for scope in of_process.scope_spans:
                self.spans += scope.spans
        return ExportTraceServiceResponse()

    def span(self, request_id: str) -> Span:
        """Waits for the span of a request."""
        return self.wait_for("gen_ai.response.id", request_id)

    def wait_for(self, attribute: str, value: object) -> Span:
        """Waits for a span with an attribute of this value."""
        found: list[Span] = []

        def has_come() -> bool:
            found.extend(s for s in list(self.spans) if attributes(s).get(attribute) == value)
            return bool(found)

        wait_until(has_come, 30)
        return found[0]

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.may_answer.set()
        self._server.stop(0).wait()


def attributes(span: Span) -> dict[str, Any]:
    """Returns the attributes of a span as Python has them."""
    found: dict[str, Any] = {}
    for each in span.attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind or "string_value")
        found[each.key] = (
            [item.string_value for item in value.values] if kind == "array_value" else value
        )
    return found


def events(span: Span) -> list[str]:
    """Returns the names of a span's events, in order."""
    assert [e.time_unix_nano for e in span.events] == sorted(e.time_unix_nano for e in span.events)
    assert all(
        span.start_time_unix_nano <= e.time_unix_nano <= span.end_time_unix_nano
        for e in span.events
    )
    return [event.name for event in span.events]
