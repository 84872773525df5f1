from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import grpc.aio
import pytest

from tests.front.harness import Front
from tokenloom.scheduler.front.load import ORCA_SERVICE, REPORT_TRAILER, LoadReports
from tokenloom.scheduler.front.servicer import SERVICE_NAME
from tokenloom.scheduler.messages import Load, RefusalReason, Refused, Submit, encode
from tokenloom.v1 import load_pb2

METHOD = f"/{ORCA_SERVICE}/StreamCoreMetrics"


def load(
    *,
    num_used_blocks: int = 0,
    queue_fraction: float = 0.0,
    num_finished: int = 0,
    num_refused: int = 0,
) -> Load:
    return Load(
        num_waiting=3,
        num_waiting_tokens=30,
        num_running=5,
        max_num_requests=256,
        num_blocks=100,
        num_used_blocks=num_used_blocks,
        queue_fraction=queue_fraction,
        num_steps=1,
        num_finished=num_finished,
        num_refused=num_refused,
        num_generated_tokens=0,
        num_prompt_tokens=0,
        num_cached_prompt_tokens=0,
        num_preemptions=0,
        num_recoveries=0,
        busy_s=0.0,
        step_s=0.01,
    )


def decoded(data: bytes) -> load_pb2.OrcaLoadReport:
    return load_pb2.OrcaLoadReport.FromString(data)


@asynccontextmanager
async def listening(
    front: Front, request: bytes
) -> AsyncIterator[Callable[[], Awaitable[load_pb2.OrcaLoadReport]]]:
    method = front.channel.unary_stream(
        METHOD, request_serializer=bytes, response_deserializer=bytes
    )
    call = method(request)

    async def read() -> load_pb2.OrcaLoadReport:
        message = await call.read()
        assert isinstance(message, bytes)
        return decoded(message)

    yield read
    call.cancel()


async def trailers_of(front: Front) -> dict[str, Any]:
    """Makes a call without gRPC, whose client keeps load reports from its caller."""
    details: Any = SimpleNamespace(method=f"/{SERVICE_NAME}/Generate")
    method: Any = front.server._servicer.handler().service(details)
    context = create_autospec(grpc.aio.ServicerContext, instance=True)
    context.invocation_metadata.return_value = ()
    context.auth_context.return_value = {}
    context.time_remaining.return_value = None
    context.abort.side_effect = grpc.aio.AbortError
    with suppress(grpc.aio.AbortError):
        await method.unary_stream(front.request(max_tokens=2).SerializeToString(), context)
    told = context.abort.call_args or context.set_trailing_metadata.call_args
    return dict(told.args[-1])


async def told(front: Front, message: Load) -> None:
    """Returns once the front has heard it from the core."""
    link = front.server._link
    link.load = None
    await front.core.send_raw(encode(message))
    async with asyncio.timeout(30):
        while link.load is None:
            await asyncio.sleep(0.002)


@pytest.mark.parametrize(
    ("num_used_blocks", "queue_fraction", "utilization"), [(40, 0.1, 0.4), (40, 0.9, 0.9)]
)
def test_the_larger_of_kv_use_and_queue_is_the_utilization(
    num_used_blocks: int, queue_fraction: float, utilization: float
) -> None:
    reports = LoadReports()
    reports.feel(load(num_used_blocks=num_used_blocks, queue_fraction=queue_fraction), 0.0)
    report = decoded(reports.encoded())
    assert report.application_utilization == pytest.approx(utilization)
    assert dict(report.utilization) == pytest.approx({"kv_cache": 0.4, "queue": queue_fraction})
    assert dict(report.named_metrics) == {"num_requests_running": 5, "num_requests_waiting": 3}


def test_rates_are_of_the_last_seconds_and_count_from_the_first_report_on() -> None:
    reports = LoadReports()
    for tenth in range(600):
        count = 1000 + 2 * tenth
        reports.feel(load(num_finished=count, num_refused=count // 4), 5.0 + tenth / 10)
    report = decoded(reports.encoded())
    assert report.rps_fractional == pytest.approx(20.0, rel=0.01)
    assert report.eps == pytest.approx(5.0, rel=0.1)


def test_the_capacity_that_a_balancer_sees_stays_while_load_comes_and_goes() -> None:
    """It divides the rate by the utilization: so many requests a second would fill the server."""
    reports = LoadReports()
    num_finished = 0
    for second in range(1, 120):
        num_used_blocks = 1 if second % 7 < 3 else 8
        num_finished += 5 * num_used_blocks
        reports.feel(load(num_used_blocks=num_used_blocks, num_finished=num_finished), second)
        if second > 60:
            report = decoded(reports.encoded())
            capacity = report.rps_fractional / report.application_utilization
            assert capacity == pytest.approx(500, rel=0.01)


def test_counts_of_a_core_that_began_anew_are_not_rates() -> None:
    reports = LoadReports()
    reports.feel(load(num_finished=50), 0.0)
    reports.feel(load(num_finished=60), 1.0)
    reports.feel(load(num_finished=2), 2.0)
    assert decoded(reports.encoded()).rps_fractional == 0.0


async def test_a_call_that_ends_well_reports_the_load(front: Front) -> None:
    await told(front, load(num_used_blocks=25))
    await told(front, load(num_used_blocks=25, num_finished=1))
    trailers = await trailers_of(front)
    assert decoded(trailers[REPORT_TRAILER]).application_utilization == pytest.approx(0.25)


async def test_a_refusal_reports_the_load_beside_its_reason(front: Front) -> None:
    await told(front, load(queue_fraction=1.0))
    await told(front, load(queue_fraction=1.0, num_finished=1))

    def refuse(submit: Submit) -> Refused:
        return Refused(
            stream=submit.stream,
            reason=RefusalReason.QUEUE_FULL,
            detail="3 requests wait",
            retry_after_s=1.0,
        )

    front.core.answer = refuse
    trailers = await trailers_of(front)
    assert b"QUEUE_FULL" in trailers["grpc-status-details-bin"]
    assert decoded(trailers[REPORT_TRAILER]).application_utilization == 1.0


async def test_before_there_was_load_there_is_no_trailer(front: Front) -> None:
    """Envoy logs an error for each that it cannot divide."""
    assert REPORT_TRAILER not in await trailers_of(front)
    await told(front, load(num_used_blocks=25))
    assert REPORT_TRAILER not in await trailers_of(front)
    await told(front, load(num_finished=1))
    assert REPORT_TRAILER in await trailers_of(front)


async def test_a_listener_hears_of_the_load_without_calls(front: Front) -> None:
    request = load_pb2.OrcaLoadReportRequest()
    request.report_interval.FromMilliseconds(1)
    async with listening(front, request.SerializeToString()) as read:
        assert await read() == load_pb2.OrcaLoadReport()
        await told(front, load(num_used_blocks=75))
        assert (await read()).application_utilization == pytest.approx(0.75)


async def test_a_listener_that_sends_garbage_hears_it_too(front: Front) -> None:
    async with listening(front, b"\xff\xff\xff") as read:
        assert await read() == load_pb2.OrcaLoadReport()
