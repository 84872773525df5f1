"""A front in the test's own event loop, and what a client sees of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.front.fake_core import FakeCore
from tokenloom.scheduler.front.server import FrontServer
from tokenloom.scheduler.front.text import TextModel
from tokenloom.v1 import inference_pb2 as pb
from tokenloom.v1.inference_pb2_grpc import InferenceStub

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(kw_only=True)
class Completion:
    """All that a stream brought."""

    admission: pb.Admission = field(default_factory=pb.Admission)
    deltas: list[pb.Delta] = field(default_factory=list)
    finish: pb.Finish | None = None

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]

    def take(self, response: pb.GenerateResponse) -> None:
        """Adds a message and checks that it is the one that may come now."""
        assert self.finish is None, "a message came after Finish"
        match response.WhichOneof("event"):
            case "admission":
                assert not self.admission.request_id, "two admissions"
                self.admission = response.admission
            case "delta":
                assert self.admission.request_id, "a delta came before the admission"
                assert response.delta.first_index == len(self.token_ids)
                self.deltas.append(response.delta)
            case "finish":
                self.finish = response.finish


@dataclass(kw_only=True)
class Refusal:
    """A status that is not OK, with its details."""

    code: grpc.StatusCode
    message: str
    info: error_details_pb2.ErrorInfo
    bad_request: error_details_pb2.BadRequest
    retry: error_details_pb2.RetryInfo
    trailers: dict[str, str | bytes]

    @classmethod
    def bare(cls, code: grpc.StatusCode) -> Refusal:
        """Returns a status without details."""
        return cls(
            code=code,
            message="",
            info=error_details_pb2.ErrorInfo(),
            bad_request=error_details_pb2.BadRequest(),
            retry=error_details_pb2.RetryInfo(),
            trailers={},
        )

    @property
    def fields(self) -> list[str]:
        return [violation.field for violation in self.bad_request.field_violations]


@dataclass(kw_only=True)
class Front:
    """A serving front, its core, and a channel to it."""

    server: FrontServer
    core: FakeCore
    text: TextModel
    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.stub = InferenceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)  # its stubs lack the methods

    def request(
        self, prompt: str | Sequence[int] = "The quick", **settings: object
    ) -> pb.GenerateRequest:
        """Returns a request; a setting goes into the part of the message that has its name."""
        request = pb.GenerateRequest()
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.tokens.ids.extend(prompt)
        parts = (request.sampling, request.stopping, request.output)
        for name, value in settings.items():
            (part,) = (part for part in parts if name in part.DESCRIPTOR.fields_by_name)
            if isinstance(value, dict):
                getattr(part, name).update(value)
            elif isinstance(value, list):
                getattr(part, name).extend(value)
            else:
                setattr(part, name, value)
        return request

    async def generate(
        self, prompt: str | Sequence[int] = "The quick", **settings: object
    ) -> Completion:
        completion = Completion()
        async for response in self.stub.Generate(self.request(prompt, **settings)):
            completion.take(response)
        return completion

    async def refused(
        self, prompt: str | Sequence[int] = "The quick", **settings: object
    ) -> Refusal:
        return await refusal_of(self.stub.Generate(self.request(prompt, **settings)))

    async def is_serving(self, service: str = "") -> bool:
        response = await self.health.Check(health_pb2.HealthCheckRequest(service=service))
        return bool(response.status == SERVING)

    async def wait_ready(self) -> None:
        while not await self.is_serving():
            await asyncio.sleep(0.005)


class HealthWatch:
    """Follows the health of a service."""

    def __init__(self, channel: grpc.aio.Channel, service: str = "") -> None:
        request = health_pb2.HealthCheckRequest(service=service)
        stub: Any = health_pb2_grpc.HealthStub(channel)
        self._call = stub.Watch(request)

    async def next(self, status: int) -> None:
        """Waits until it is this."""
        while (await self._call.read()).status != status:
            pass

    def cancel(self) -> None:
        self._call.cancel()


async def refusal_of(call: AsyncIterable[object]) -> Refusal:
    """Reads a call to its end, which must be an error."""
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return refusal(error)
    raise AssertionError("the call ended well")


def refusal(error: grpc.aio.AioRpcError) -> Refusal:
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
    found = Refusal(
        code=error.code(),
        message=error.details() or "",
        info=error_details_pb2.ErrorInfo(),
        bad_request=error_details_pb2.BadRequest(),
        retry=error_details_pb2.RetryInfo(),
        trailers=trailers,
    )
    for detail in status.details:
        for message in (found.info, found.bad_request, found.retry):
            detail.Unpack(message)
    return found


async def until(condition: Callable[[], bool]) -> None:
    """Waits for something that another task brings about."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)
