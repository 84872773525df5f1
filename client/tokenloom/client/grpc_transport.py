"""The transports that carry calls over gRPC, blocking and asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import grpc
import grpc.aio

from tokenloom.client.access import PLAIN, Access
from tokenloom.client.errors import Cancelled, DeadlineExceeded, TokenloomError
from tokenloom.client.renewing import open_aio_channel, open_channel
from tokenloom.client.status import error_from_status
from tokenloom.client.tracing import trace_metadata
from tokenloom.v1 import inference_pb2 as pb
from tokenloom.v1.inference_pb2_grpc import InferenceStub

if TYPE_CHECKING:
    # The stub class for asyncio exists for type checkers only.
    from tokenloom.v1.inference_pb2_grpc import InferenceAsyncStub

_Response = TypeVar("_Response")

_OPTIONS: list[tuple[str, int]] = [
    # Connections are what a port spreads over its processes, and gRPC lets all channels of a
    # process with the same target share one.
    ("grpc.use_local_subchannel_pool", 1),
    # A peer that vanished without a word is noticed within 40 s of a running call. Servers
    # close connections that ping more often than they allow; tokenloom's allow 10 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # without it a half-open peer is not noticed
    # A server that is started again is found at once, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # what an attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Token ids of the longest prompt, where gRPC's own bound is 4 MiB.
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
]

_WATCH = "/grpc.health.v1.Health/Watch"
_WATCH_REQUEST = b""  # HealthCheckRequest with service = "": the server as a whole
_SERVING = b"\x08\x01"  # HealthCheckResponse with status (field 1) = SERVING (1)
_WATCH_PAUSE_S = 0.1  # between two attempts; gRPC itself paces the connecting


class GrpcTransport:
    """Carries a `Client`'s calls over a channel, which it closes only if it opened it."""

    def __init__(self, target: str | grpc.Channel, *, access: Access = PLAIN) -> None:
        """Raises ValueError for an access that cannot be had."""
        self._owns_channel = isinstance(target, str)
        if not isinstance(target, str):
            self._channel = target
        else:
            self._channel = open_channel(target, _OPTIONS, access)
        self._stub = InferenceStub(self._channel)

    def generate(self, request: pb.GenerateRequest, *, timeout_s: float | None) -> _GrpcStream:
        """Starts a Generate call."""
        try:
            call = self._stub.Generate(request, timeout=timeout_s, metadata=trace_metadata())
        except ValueError as error:  # gRPC's word for a channel that is closed
            raise Cancelled("the client is closed") from error
        return _GrpcStream(call)

    def tokenize(
        self, request: pb.TokenizeRequest, *, timeout_s: float | None
    ) -> pb.TokenizeResponse:
        """Makes a Tokenize call."""
        with _translated():
            return self._stub.Tokenize(request, timeout=timeout_s)

    def detokenize(
        self, request: pb.DetokenizeRequest, *, timeout_s: float | None
    ) -> pb.DetokenizeResponse:
        """Makes a Detokenize call."""
        with _translated():
            return self._stub.Detokenize(request, timeout=timeout_s)

    def get_model(
        self, request: pb.GetModelRequest, *, timeout_s: float | None
    ) -> pb.GetModelResponse:
        """Makes a GetModel call."""
        with _translated():
            return self._stub.GetModel(request, timeout=timeout_s)

    def wait_ready(self, *, timeout_s: float | None) -> None:
        """Returns once the server's health says SERVING."""
        watch = self._channel.unary_stream(
            _WATCH, request_serializer=bytes, response_deserializer=bytes
        )
        remaining_s = _countdown(timeout_s)
        while True:
            call = watch(_WATCH_REQUEST, timeout=remaining_s(), wait_for_ready=True)
            try:
                if any(status == _SERVING for status in call):
                    return
            except grpc.RpcError as rpc_error:
                _check_still_waiting(rpc_error, timeout_s)
            finally:
                call.cancel()
            time.sleep(_WATCH_PAUSE_S)

    def close(self) -> None:
        """Ends running calls and closes the channel, unless it was given."""
        if self._owns_channel:
            self._channel.close()


class _Call(Protocol):
    """What gRPC returns for a Generate call; its own name for it is private."""

    def __next__(self) -> pb.GenerateResponse: ...
    def __iter__(self) -> Iterator[pb.GenerateResponse]: ...
    def cancel(self) -> object: ...


class _GrpcStream:
    def __init__(self, call: _Call) -> None:
        self._call = call

    def read(self) -> pb.GenerateResponse | None:
        with _translated():
            return next(self._call, None)

    def cancel(self) -> None:
        self._call.cancel()


class AsyncGrpcTransport:
    """Carries an `AsyncClient`'s calls over a channel, which it closes only if it opened it.

    A channel belongs to an event loop, so it is opened by the first call.
    """

    def __init__(self, target: str | grpc.aio.Channel, *, access: Access = PLAIN) -> None:
        """Raises ValueError for an access that cannot be had."""
        self._target = target
        self._access = access
        if isinstance(target, str):
            access.check(target)
        self._opened: grpc.aio.Channel | None = None
        self._cached_stub: InferenceAsyncStub | None = None

    def generate_async(
        self, request: pb.GenerateRequest, *, timeout_s: float | None
    ) -> _AsyncGrpcStream:
        """Starts a Generate call in the running event loop."""
        try:
            call = self._stub().Generate(request, timeout=timeout_s, metadata=trace_metadata())
        except grpc.aio.UsageError as error:  # gRPC's word for a channel that is closed
            raise Cancelled("the client is closed") from error
        return _AsyncGrpcStream(call)

    async def tokenize_async(
        self, request: pb.TokenizeRequest, *, timeout_s: float | None
    ) -> pb.TokenizeResponse:
        """Makes a Tokenize call."""
        return await _awaited(self._stub().Tokenize(request, timeout=timeout_s))

    async def detokenize_async(
        self, request: pb.DetokenizeRequest, *, timeout_s: float | None
    ) -> pb.DetokenizeResponse:
        """Makes a Detokenize call."""
        return await _awaited(self._stub().Detokenize(request, timeout=timeout_s))

    async def get_model_async(
        self, request: pb.GetModelRequest, *, timeout_s: float | None
    ) -> pb.GetModelResponse:
        """Makes a GetModel call."""
        return await _awaited(self._stub().GetModel(request, timeout=timeout_s))

    async def wait_ready_async(self, *, timeout_s: float | None) -> None:
        """Returns once the server's health says SERVING."""
        watch = self._channel().unary_stream(
            _WATCH, request_serializer=bytes, response_deserializer=bytes
        )
        remaining_s = _countdown(timeout_s)
        while True:
            call = watch(_WATCH_REQUEST, timeout=remaining_s(), wait_for_ready=True)
            try:
                async for status in call:
                    if status == _SERVING:
                        return
            except grpc.aio.AioRpcError as rpc_error:
                _check_still_waiting(rpc_error, timeout_s)
            finally:
                call.cancel()
            await asyncio.sleep(_WATCH_PAUSE_S)

    async def close_async(self) -> None:
        """Ends running calls and closes the channel, unless it was given."""
        if self._opened is not None:
            await self._opened.close(grace=None)

    def _channel(self) -> grpc.aio.Channel:
        if not isinstance(self._target, str):
            return self._target
        if self._opened is None:
            self._opened = open_aio_channel(self._target, _OPTIONS, self._access)
        return self._opened

    def _stub(self) -> InferenceAsyncStub:
        if self._cached_stub is None:
            self._cached_stub = InferenceStub(self._channel())
        return self._cached_stub


class _AsyncGrpcStream:
    def __init__(
        self, call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]
    ) -> None:
        self._call = call

    async def read(self) -> pb.GenerateResponse | None:
        message = await _awaited(self._call.read())
        return None if message is grpc.aio.EOF else cast("pb.GenerateResponse", message)

    def cancel(self) -> None:
        self._call.cancel()


@contextmanager
def _translated() -> Iterator[None]:
    """Raises gRPC's errors as those of this package."""
    try:
        yield
    except grpc.RpcError as rpc_error:
        raise _error(rpc_error) from rpc_error


async def _awaited(response: Awaitable[_Response]) -> _Response:
    """Awaits a call; raises gRPC's errors as those of this package."""
    try:
        return await response
    except grpc.aio.AioRpcError as rpc_error:
        raise _error(rpc_error) from rpc_error
    except asyncio.CancelledError:
        # grpc.aio uses the same exception for a cancelled call and for a cancelled task.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Cancelled("the call was cancelled here") from None


def _error(rpc_error: grpc.RpcError) -> TokenloomError:
    # What gRPC raises for a call that failed is a Call too, which the stubs do not say.
    call = cast("grpc.Call", rpc_error)
    return error_from_status(call.code(), call.details() or "", call.trailing_metadata() or ())


def _check_still_waiting(rpc_error: grpc.RpcError, timeout_s: float | None) -> None:
    """Raises unless the error only means that the server is not there yet."""
    match cast("grpc.Call", rpc_error).code():
        case grpc.StatusCode.UNAVAILABLE:
            return
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            message = f"the server was not ready within {timeout_s} s"
            raise DeadlineExceeded(message) from rpc_error
        case _:
            raise _error(rpc_error) from rpc_error


def _countdown(timeout_s: float | None) -> Callable[[], float | None]:
    """Returns a function that tells how much of the time is left; None: there is no end."""
    if timeout_s is None:
        return lambda: None
    end = time.monotonic() + timeout_s
    return lambda: max(0.0, end - time.monotonic())
