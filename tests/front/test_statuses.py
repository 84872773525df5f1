"""Each row of the table of statuses in docs/protocol.md, provoked through gRPC."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio
import pytest

from tests.front import test_identity as identity
from tests.front.fake_core import echo
from tests.front.harness import Front, Refusal, refusal, refusal_of, until
from tokenloom.scheduler.messages import FinishReason, RefusalReason, Refused
from tokenloom.v1 import inference_pb2 as pb

PROTOCOL = Path(__file__).parents[2] / "docs" / "protocol.md"
ROW = re.compile(r"^\| ([A-Z_, ]+) \| ([A-Z_, ]*)\|", re.MULTILINE)

Status: TypeAlias = tuple[str, str]
"""Code and reason, which is empty where the status is gRPC's own."""
Provocation: TypeAlias = Callable[[Front], Awaitable[Refusal]]


def table() -> Iterator[Status]:
    """Returns all that the rows of the table name."""
    _, _, text = PROTOCOL.read_text(encoding="utf-8").partition("### Statuses")
    for codes, reasons in ROW.findall(text.partition("\n### ")[0]):
        yield from product(codes.split(", "), reasons.strip().split(", "))


def refused(reason: RefusalReason) -> Provocation:
    async def provoke(front: Front) -> Refusal:
        front.core.answer = lambda submit: Refused(
            stream=submit.stream, reason=reason, detail="7 of 7", retry_after_s=0.5
        )
        return await front.refused()

    return provoke


def ended(reason: FinishReason) -> Provocation:
    async def provoke(front: Front) -> Refusal:
        front.core.end_early = (3, reason)
        return await front.refused(max_tokens=9)

    return provoke


async def invalid(front: Front) -> Refusal:
    return await front.refused(temperature=-1.0)


async def malformed(front: Front) -> Refusal:
    raw: Any = front.channel.unary_stream("/tokenloom.v1.Inference/Generate")
    return await refusal_of(raw(b"\xff" * 50))


async def of_another_model(front: Front) -> Refusal:
    request = front.request(max_tokens=9)
    request.sampling.seed = 1
    request.resume_from.fingerprint = "another"
    request.resume_from.token_ids.append(5)
    return await refusal_of(front.stub.Generate(request))


async def not_reading(front: Front) -> Refusal:
    front.core.step_s = 0.0
    # Wide deltas fill what gRPC takes before it blocks a write.
    front.core.script = lambda submit: (
        echo(submit) if submit.sampling.num_top_logprobs is None else [300] * 1_000_000
    )
    lazy = front.stub.Generate(front.request(num_top_logprobs=20))
    await until(lambda: front.core.num_running == 1)
    async with asyncio.timeout(60):
        while front.core.num_running:
            await front.generate([5], max_tokens=1)
    return await refusal_of(lazy)


async def without_model(front: Front) -> Refusal:
    await front.core.lose_model()
    async with asyncio.timeout(20):
        while await front.is_serving():
            await asyncio.sleep(0.002)
    return await front.refused()


async def while_running(front: Front, harm: Callable[[], Awaitable[None]]) -> Refusal:
    """Returns how a request ends that runs while something happens."""
    front.core.pause_after = 3
    call = asyncio.create_task(front.refused())
    await until(lambda: front.core.num_running == 1)
    await harm()
    return await call


async def without_core(front: Front) -> Refusal:
    return await while_running(front, front.core.close_socket)


async def while_draining(front: Front) -> Refusal:
    return await while_running(front, lambda: front.server.drain(0.0))


async def cancelled(front: Front) -> Refusal:
    front.core.pause_after = 3
    call = front.stub.Generate(front.request())
    await call.initial_metadata()
    call.cancel()
    try:
        await call.read()
    except asyncio.CancelledError:
        return Refusal.bare(await call.code())
    raise AssertionError("a cancelled call goes on")


async def taken_out_of_the_queue(front: Front) -> Refusal:
    front.core.is_admitting = False
    call = asyncio.create_task(front.refused())
    await until(lambda: len(front.core.submits) == 1)
    await front.core.end_waiting(FinishReason.CANCELLED)
    return await call


async def late_by_the_client(front: Front) -> Refusal:
    front.core.pause_after = 3
    return await refusal_of(front.stub.Generate(front.request(), timeout=0.1))


async def too_large(front: Front) -> Refusal:
    raw: Any = front.channel.unary_stream("/tokenloom.v1.Inference/Generate")
    return await refusal_of(raw(bytes(41 * 1024 * 1024)))


async def unknown_method(front: Front) -> Refusal:
    raw: Any = front.channel.unary_unary("/tokenloom.v1.Inference/Nothing")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw(b"")
    return refusal(caught.value)


async def tokens_lost(front: Front) -> Refusal:
    front.core.num_untold = 1
    return await front.refused(max_tokens=9)


PROVOCATIONS: dict[Status, Provocation] = {
    ("INVALID_ARGUMENT", "INVALID_REQUEST"): invalid,
    ("INVALID_ARGUMENT", "MALFORMED"): malformed,
    ("INVALID_ARGUMENT", "PROMPT_TOO_LONG"): refused(RefusalReason.TOO_LONG),
    ("FAILED_PRECONDITION", "OTHER_MODEL"): of_another_model,
    ("RESOURCE_EXHAUSTED", "QUEUE_FULL"): refused(RefusalReason.QUEUE_FULL),
    ("RESOURCE_EXHAUSTED", "DEADLINE_UNREACHABLE"): refused(RefusalReason.DEADLINE_UNREACHABLE),
    ("RESOURCE_EXHAUSTED", "TENANT_LIMIT"): refused(RefusalReason.TENANT_LIMIT),
    ("RESOURCE_EXHAUSTED", "CLIENT_TOO_SLOW"): not_reading,
    ("RESOURCE_EXHAUSTED", ""): too_large,
    ("UNIMPLEMENTED", ""): unknown_method,
    ("UNAVAILABLE", "NOT_READY"): refused(RefusalReason.NOT_READY),
    ("UNAVAILABLE", "MODEL_LOST"): without_model,
    ("UNAVAILABLE", "CORE_LOST"): without_core,
    ("UNAVAILABLE", "DRAINING"): while_draining,
    ("CANCELLED", ""): cancelled,
    ("CANCELLED", "ENDED_BY_OPERATOR"): taken_out_of_the_queue,
    ("DEADLINE_EXCEEDED", ""): late_by_the_client,
    ("DEADLINE_EXCEEDED", "DEADLINE_PASSED"): ended(FinishReason.DEADLINE),
    ("INTERNAL", "MODEL_CRASH"): ended(FinishReason.CRASH),
    ("INTERNAL", "MODEL_FAULT"): ended(FinishReason.FAULT),
    ("INTERNAL", "TOKENS_LOST"): tokens_lost,
    ("INTERNAL", "INTERNAL"): refused(RefusalReason.DUPLICATE),
}
ELSEWHERE: dict[Status, Callable[..., Awaitable[None]]] = {
    ("UNAUTHENTICATED", "NO_IDENTITY"): (
        identity.test_a_caller_without_identity_is_refused_in_every_method
    ),
    ("UNAUTHENTICATED", "BAD_TOKEN"): identity.test_a_wrong_token_is_refused_and_not_told_back,
    ("PERMISSION_DENIED", "UNKNOWN_TENANT"): (
        identity.test_certificates_are_tenants_by_their_spiffe_id
    ),
}
"""The tests that provoke what takes a server of another kind."""

RETRIED = {"QUEUE_FULL", "DEADLINE_UNREACHABLE", "TENANT_LIMIT"}


def test_the_table_names_all_that_is_provoked_and_nothing_else() -> None:
    assert set(table()) == {("OK", ""), *PROVOCATIONS, *ELSEWHERE}


@pytest.mark.parametrize("status", PROVOCATIONS, ids="-".join)
async def test_every_status_of_the_table_is_told(front: Front, status: Status) -> None:
    code, reason = status
    found = await PROVOCATIONS[status](front)
    assert (found.code.name, found.info.reason) == status
    assert found.info.domain == ("tokenloom" if reason else "")
    if code == "INTERNAL":
        assert found.info.metadata["fault_id"] in found.message
    pushback_ms = found.trailers.get("grpc-retry-pushback-ms")
    assert pushback_ms == ("500" if reason in RETRIED else None)
    assert found.retry.retry_delay.ToMilliseconds() == (500 if reason in RETRIED else 0)


async def test_a_stream_that_ends_well_ends_with_finish(front: Front) -> None:
    call = front.stub.Generate(front.request(max_tokens=3))
    events = [response.WhichOneof("event") async for response in call]
    assert events[-1] == "finish"
    assert await call.code() is grpc.StatusCode.OK
    assert isinstance(await front.stub.GetModel(pb.GetModelRequest()), pb.GetModelResponse)
