"""What balancers hear of the server's load (ORCA): in trailers of calls, and in a stream.

    core ── Load, at most ten times a second ──▶ LoadReports ──┬── trailer of each Generate call
                                                               └── OpenRcaService, as often as asked

A balancer weighs a server by requests a second over utilization, which is what it could serve if it
were full. So both are smoothed in the same way, over the same time: the quotient stays what it is
while the load comes and goes.
"""

from __future__ import annotations

import asyncio
import math
from typing import TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from tokenloom.scheduler.front.errors import Trailers
from tokenloom.scheduler.messages import Load
from tokenloom.v1 import load_pb2

ORCA_SERVICE = "xds.service.orca.v3.OpenRcaService"
REPORT_TRAILER = "endpoint-load-metrics-bin"

_SMOOTHING_S = 10.0
"""What is older counts little. Shorter and the few requests that end in it are all chance."""
_MIN_INTERVAL_S = 1.0
"""Between two reports to one listener, however often it asks for them."""
_DEFAULT_INTERVAL_S = 10.0

_Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]


class LoadReports:
    """The latest report, made from what the core tells."""

    def __init__(self) -> None:
        self._last: Load | None = None
        self._last_s = 0.0
        self._utilization = 0.0
        self._rps = 0.0
        self._eps = 0.0
        self._encoded: bytes | None = b""
        """None: there is news since it was encoded."""

    def feel(self, load: Load, now_s: float) -> None:
        """The core told its load; `now_s` is of any clock that only grows."""
        last = self._last
        if last is None or load.num_finished < last.num_finished:  # the first, of this core
            self._utilization, self._rps, self._eps = load.utilization, 0.0, 0.0
        elif (span_s := now_s - self._last_s) > 0:
            weight = 1.0 - math.exp(-span_s / _SMOOTHING_S)
            self._utilization += weight * (load.utilization - self._utilization)
            self._rps += weight * ((load.num_finished - last.num_finished) / span_s - self._rps)
            self._eps += weight * ((load.num_refused - last.num_refused) / span_s - self._eps)
        self._last, self._last_s = load, now_s
        self._encoded = None

    def encoded(self) -> bytes:
        """Returns the report as it goes over the wire; empty before the core has told any."""
        if self._encoded is None:
            self._encoded = self._report().SerializeToString()
        return self._encoded

    def trailers(self) -> Trailers:
        """Returns what goes with the status of a call.

        Nothing before there was load: balancers complain of reports that they cannot divide.
        """
        if self._rps <= 0.0 or self._utilization <= 0.0:
            return ()
        return ((REPORT_TRAILER, self.encoded()),)

    def _report(self) -> load_pb2.OrcaLoadReport:
        load = self._last
        assert load is not None
        return load_pb2.OrcaLoadReport(
            application_utilization=self._utilization,
            rps_fractional=self._rps,
            eps=self._eps,
            utilization={
                "kv_cache": load.num_used_blocks / max(1, load.num_blocks),
                "queue": load.queue_fraction,
            },
            named_metrics={
                "num_requests_running": load.num_running,
                "num_requests_waiting": load.num_waiting,
            },
        )

    # The service -----------------------------------------------------------------------------

    def handler(self) -> grpc.GenericRpcHandler:
        """Returns the service of reports outside of calls, as a server takes it."""
        return grpc.method_handlers_generic_handler(
            ORCA_SERVICE,
            {"StreamCoreMetrics": grpc.unary_stream_rpc_method_handler(self.stream_core_metrics)},
        )

    async def stream_core_metrics(self, data: bytes, context: _Context) -> None:
        """Sends a report now and in each interval that the listener asks for, until it leaves."""
        interval_s = _interval_s(data)
        while True:
            await context.write(self.encoded())
            await asyncio.sleep(interval_s)


def _interval_s(data: bytes) -> float:
    """Returns how often a listener gets a report; what is unreadable asks for nothing special."""
    try:
        request = load_pb2.OrcaLoadReportRequest.FromString(data)
    except DecodeError:
        return _DEFAULT_INTERVAL_S
    if not request.HasField("report_interval"):
        return _DEFAULT_INTERVAL_S
    asked = request.report_interval
    return max(_MIN_INTERVAL_S, asked.seconds + asked.nanos / 1e9)
