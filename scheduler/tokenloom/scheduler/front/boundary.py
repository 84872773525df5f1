"""The boundary around each call: bytes in, bytes out, and no error leaves it but as a status."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar

import grpc.aio
from google.protobuf.message import DecodeError, Message

from tokenloom.scheduler.front.errors import (
    InvalidRequest,
    RequestError,
    Trailers,
    Violation,
    abort,
    fault_of,
)

Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]
_Request = TypeVar("_Request", bound=Message)


def bounded(
    serve: Callable[[bytes, Context], Awaitable[Message | None]],
    trailers: Callable[[], Trailers] = tuple,
) -> Callable[[bytes, Context], Awaitable[bytes | None]]:
    """Returns a call from bytes to bytes; whatever goes wrong ends it alone, with a status.

    `trailers` are sent with each status, also OK.
    """

    async def call(data: bytes, context: Context) -> bytes | None:
        try:
            response = await serve(data, context)
        except RequestError as error:
            refusal = error
        except grpc.aio.InternalError as error:  # gRPC's word for a write to nobody
            raise asyncio.CancelledError from error
        except Exception as error:  # noqa: BLE001 - the boundary around each call
            refusal = fault_of(error)
        else:
            context.set_trailing_metadata(trailers())
            return None if response is None else response.SerializeToString()
        return await abort(context, refusal, trailers())

    return call


def parsed(
    request_type: type[_Request],
    serve: Callable[[_Request, Context], Awaitable[Message | None]],
    screen: Callable[[type[Message], bytes], None] | None = None,
) -> Callable[[bytes, Context], Awaitable[Message | None]]:
    """Returns a call that takes its request as bytes; `screen` looks at them before."""

    async def call(data: bytes, context: Context) -> Message | None:
        if screen is not None:
            screen(request_type, data)
        return await serve(parse(request_type, data), context)

    return call


def parse(request_type: type[_Request], data: bytes) -> _Request:
    """Returns the message that a client sent. Raises InvalidRequest."""
    try:
        return request_type.FromString(data)
    except DecodeError as error:
        name = request_type.DESCRIPTOR.full_name
        violation = Violation(field="request", description=f"is not readable as {name}")
        raise InvalidRequest([violation], "MALFORMED") from error
