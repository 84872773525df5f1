"""The transports that carry calls over gRPC, blocking and asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar, cast

import grpc
import grpc.aio

from tokenloom.client.access import PLAIN, Access
from tokenloom.client.affinity import Affinity, Visit, session_metadata
from tokenloom.client.channels import Route, ServerTarget, route_to, route_to_replica
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

_WATCH = "/grpc.health.v1.Health/Watch"
_WATCH_REQUEST = b""  # HealthCheckRequest with service = "": the server as a whole
_SERVING = b"\x08\x01"  # HealthCheckResponse with status (field 1) = SERVING (1)
_WATCH_PAUSE_S = 0.1  # between two attempts; gRPC itself paces the connecting


class GrpcTransport:
    """Carries a `Client`'s calls over channels, which it closes only if it opened them."""

    def __init__(self, target: ServerTarget | grpc.Channel, *, access: Access = PLAIN) -> None:
        """Raises ValueError for a target or an access that cannot be had."""
        self._access = access
        self._opened: list[grpc.Channel] = []
        self._replicas: dict[str, InferenceStub] = {}
        if isinstance(target, grpc.Channel):
            self._channel = target
            self._affinity = Affinity(())
        else:
            route = route_to(target)
            self._channel = self._open(route)
            self._affinity = Affinity(route.replicas)
        self._stub = InferenceStub(self._channel)

    def generate(
        self, request: pb.GenerateRequest, *, timeout_s: float | None, session: str | None = None
    ) -> _GrpcStream:
        """Starts a Generate call."""
        remaining_s = _countdown(timeout_s)
        metadata = (*trace_metadata(), *session_metadata(session))

        def start(replica: str | None) -> _Call:
            try:
                stub = self._stub if replica is None else self._replica(replica)
                return stub.Generate(request, timeout=remaining_s(), metadata=metadata)
            except ValueError as error:  # gRPC's word for a channel that is closed
                raise Cancelled("the client is closed") from error

        return _GrpcStream(start, Visit(self._affinity, session))

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
        """Ends running calls and closes the channels, except one that was given."""
        for channel in self._opened:
            channel.close()

    def _open(self, route: Route) -> grpc.Channel:
        channel = open_channel(route.target, route.options, self._access)
        self._opened.append(channel)
        return channel

    def _replica(self, address: str) -> InferenceStub:
        if address not in self._replicas:
            self._replicas[address] = InferenceStub(self._open(route_to_replica(address)))
        return self._replicas[address]


class _Call(Protocol):
    """What gRPC returns for a Generate call; its own name for it is private."""

    def __next__(self) -> pb.GenerateResponse: ...
    def __iter__(self) -> Iterator[pb.GenerateResponse]: ...
    def cancel(self) -> object: ...


class _GrpcStream:
    def __init__(self, start: Callable[[str | None], _Call], visit: Visit) -> None:
        self._start = start
        self._visit = visit
        self._call = start(visit.replica)
        self._is_cancelled = False

    def read(self) -> pb.GenerateResponse | None:
        while True:
            try:
                with _translated():
                    message = next(self._call, None)
            except TokenloomError as error:
                if self._is_cancelled or not self._visit.moves_on(error):
                    raise
                self._call = self._start(self._visit.replica)
                if self._is_cancelled:  # while the call began: `cancel` may have ended the last one
                    self._call.cancel()
            else:
                self._visit.stays()
                return message

    def cancel(self) -> None:
        self._is_cancelled = True
        self._call.cancel()


class AsyncGrpcTransport:
    """Carries an `AsyncClient`'s calls over channels, which it closes only if it opened them.

    A channel belongs to an event loop, so it is opened by its first call.
    """

    def __init__(self, target: ServerTarget | grpc.aio.Channel, *, access: Access = PLAIN) -> None:
        """Raises ValueError for a target or an access that cannot be had."""
        self._access = access
        self._opened: list[grpc.aio.Channel] = []
        self._replicas: dict[str, InferenceAsyncStub] = {}
        self._cached_stub: InferenceAsyncStub | None = None
        self._target = target if isinstance(target, grpc.aio.Channel) else route_to(target)
        if isinstance(self._target, Route):
            access.check(self._target.target)
            self._affinity = Affinity(self._target.replicas)
        else:
            self._affinity = Affinity(())

    def generate_async(
        self, request: pb.GenerateRequest, *, timeout_s: float | None, session: str | None = None
    ) -> _AsyncGrpcStream:
        """Starts a Generate call in the running event loop."""
        remaining_s = _countdown(timeout_s)
        metadata = (*trace_metadata(), *session_metadata(session))

        def start(replica: str | None) -> _AsyncCall:
            try:
                stub = self._stub() if replica is None else self._replica(replica)
                return stub.Generate(request, timeout=remaining_s(), metadata=metadata)
            except grpc.aio.UsageError as error:  # gRPC's word for a channel that is closed
                raise Cancelled("the client is closed") from error

        return _AsyncGrpcStream(start, Visit(self._affinity, session))

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
        """Ends running calls and closes the channels, except one that was given."""
        for channel in self._opened:
            await channel.close(grace=None)

    def _channel(self) -> grpc.aio.Channel:
        if isinstance(self._target, Route):
            self._target = self._open(self._target)
        return self._target

    def _open(self, route: Route) -> grpc.aio.Channel:
        channel = open_aio_channel(route.target, route.options, self._access)
        self._opened.append(channel)
        return channel

    def _stub(self) -> InferenceAsyncStub:
        if self._cached_stub is None:
            self._cached_stub = InferenceStub(self._channel())
        return self._cached_stub

    def _replica(self, address: str) -> InferenceAsyncStub:
        if address not in self._replicas:
            self._replicas[address] = InferenceStub(self._open(route_to_replica(address)))
        return self._replicas[address]


_AsyncCall: TypeAlias = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]


class _AsyncGrpcStream:
    def __init__(self, start: Callable[[str | None], _AsyncCall], visit: Visit) -> None:
        self._start = start
        self._visit = visit
        self._call = start(visit.replica)

    async def read(self) -> pb.GenerateResponse | None:
        while True:
            try:
                message = await _awaited(self._call.read())
            except TokenloomError as error:
                if not self._visit.moves_on(error):
                    raise
                self._call = self._start(self._visit.replica)
            else:
                self._visit.stays()
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
