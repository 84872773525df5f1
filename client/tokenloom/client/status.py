"""Turns a gRPC status with its google.rpc details into one of the errors.

Source of the details: https://google.aip.dev/193, carried in the trailer
`grpc-status-details-bin` as a google.rpc.Status.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf.any_pb2 import Any as PackedMessage
from google.protobuf.message import DecodeError

from tokenloom.client.errors import (
    AccessDenied,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    Overloaded,
    ServerError,
    TokenloomError,
    Unavailable,
    Violation,
)
from tokenloom.v1 import errors_pb2

_DOMAIN = "tokenloom"
_DETAILS_KEY = "grpc-status-details-bin"
_TOO_SLOW = "CLIENT_TOO_SLOW"
_TOO_LARGE = "larger than max"
"""In gRPC's own words for a message over the limit, which come without a reason."""

_ERRORS: dict[grpc.StatusCode, type[TokenloomError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.ABORTED: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}  # every other code is a ServerError


def error_from_status(
    code: grpc.StatusCode, message: str, trailers: Iterable[tuple[str, str | bytes]]
) -> TokenloomError:
    """Returns the error for a status that is not OK; unreadable details are left out."""
    info = errors_pb2.ErrorInfo()
    retry = errors_pb2.RetryInfo()
    bad_request = errors_pb2.BadRequest()
    twins = {
        "google.rpc.ErrorInfo": info,
        "google.rpc.RetryInfo": retry,
        "google.rpc.BadRequest": bad_request,
    }
    try:
        for detail in _details(trailers):
            twin = twins.get(detail.type_url.rpartition("/")[2])
            if twin is not None:
                twin.ParseFromString(detail.value)
    except DecodeError:
        # A proxy may have cut the trailer; the status itself is still true.
        pass
    if info.domain != _DOMAIN:
        info.Clear()  # a proxy's word: reasons mean something in their domain alone
    kind = _ERRORS.get(code, ServerError)
    if kind is Overloaded and (info.reason == _TOO_SLOW or _TOO_LARGE in message):
        kind = LimitExceeded
    retry_after_s = (
        retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None
    )
    if kind is InvalidRequest:
        return InvalidRequest(
            message,
            violations=[
                Violation(violation.field, violation.description)
                for violation in bad_request.field_violations
            ],
            code=code,
            reason=info.reason,
            metadata=info.metadata,
            retry_after_s=retry_after_s,
        )
    return kind(
        message,
        code=code,
        reason=info.reason,
        metadata=info.metadata,
        retry_after_s=retry_after_s,
    )


def _details(trailers: Iterable[tuple[str, str | bytes]]) -> Iterable[PackedMessage]:
    for key, value in trailers:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            return errors_pb2.Status.FromString(value).details
    return ()
