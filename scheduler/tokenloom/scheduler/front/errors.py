"""Why a request ends without a Finish, and how that is told to the client.

    RequestError             code                 reason in google.rpc.ErrorInfo
    ├── InvalidRequest       INVALID_ARGUMENT     INVALID_REQUEST, PROMPT_TOO_LONG, MALFORMED
    ├── Unauthenticated      UNAUTHENTICATED      NO_IDENTITY, BAD_TOKEN
    ├── UnknownTenant        PERMISSION_DENIED    UNKNOWN_TENANT
    ├── OtherModel           FAILED_PRECONDITION  OTHER_MODEL
    ├── Overloaded           RESOURCE_EXHAUSTED   QUEUE_FULL, DEADLINE_UNREACHABLE, TENANT_LIMIT
    ├── ClientTooSlow        RESOURCE_EXHAUSTED   CLIENT_TOO_SLOW
    ├── Unavailable          UNAVAILABLE          NOT_READY, MODEL_LOST, DRAINING, CORE_LOST
    ├── DeadlinePassed       DEADLINE_EXCEEDED    DEADLINE_PASSED
    ├── EndedByOperator      CANCELLED            ENDED_BY_OPERATOR
    └── ServerFault          INTERNAL             MODEL_FAULT, TOKENS_LOST, INTERNAL

Each status carries google.rpc.ErrorInfo with the domain "tokenloom"; InvalidRequest
also BadRequest, Overloaded also RetryInfo and the `grpc-retry-pushback-ms` trailer,
ServerFault the metadata `fault_id`.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn, TypeAlias

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from tokenloom.scheduler.messages import RefusalReason, Refused

DOMAIN = "tokenloom"
UNREAD_S = 60.0
"""How long a client may take to read each of the last messages of a stream that is over."""
_MAX_VIOLATIONS = 16
_MAX_MESSAGE_CHARS = 512
"""Both keep a status within the 8 KiB of metadata that clients accept."""

_log = logging.getLogger(__name__)

Trailers: TypeAlias = tuple[tuple[str, str | bytes], ...]
"""Metadata sent with a status. gRPC takes no list."""


@dataclass(frozen=True, kw_only=True)
class Violation:
    """What is wrong with one field of a request."""

    field: str
    """Path in the proto message, such as `sampling.top_p`."""
    description: str
    """Quotes the numbers."""


class RequestError(Exception):
    """Base of all that ends a request early. Its text is for the client."""

    code: ClassVar[grpc.StatusCode]

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def details(self) -> list[Message]:
        """Returns what the status carries beside its ErrorInfo."""
        return []

    def trailers(self) -> list[tuple[str, str]]:
        """Returns metadata sent with the status."""
        return []

    def metadata(self) -> dict[str, str]:
        """Returns what ErrorInfo tells programs."""
        return {}


class InvalidRequest(RequestError):
    """The request cannot be served as it stands."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, violations: Sequence[Violation], reason: str = "INVALID_REQUEST") -> None:
        first = violations[0]
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        super().__init__(reason, f"{first.field}: {first.description}{more}")
        self.violations = tuple(violations)

    def details(self) -> list[Message]:
        """Returns BadRequest, with the first violations if there are many."""
        bad_request = error_details_pb2.BadRequest()
        for violation in self.violations[:_MAX_VIOLATIONS]:
            bad_request.field_violations.add(
                field=violation.field, description=violation.description
            )
        return [bad_request]


class Unauthenticated(RequestError):
    """The call does not say whose it is, or says it in vain."""

    code = grpc.StatusCode.UNAUTHENTICATED


class UnknownTenant(RequestError):
    """The caller is who it says, and nobody's."""

    code = grpc.StatusCode.PERMISSION_DENIED

    def __init__(self, spiffe_id: str) -> None:
        super().__init__("UNKNOWN_TENANT", f"{spiffe_id} belongs to no tenant of this server")


class OtherModel(RequestError):
    """What the client has of a completion comes from another model, or from another prompt."""

    code = grpc.StatusCode.FAILED_PRECONDITION

    def __init__(self, *, began: str, here: str) -> None:
        super().__init__(
            "OTHER_MODEL",
            f"resume_from.fingerprint is {began[:64]!r}; here it would be {here!r}: the weights, "
            "the precision, the tokenizer or the prompt that the chat template makes are others",
        )


class Overloaded(RequestError):
    """There is no room for the request, or not for this tenant or in time; later there may be."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, reason: str, message: str, retry_after_s: float | None) -> None:
        super().__init__(reason, message)
        self.retry_after_s = retry_after_s

    def details(self) -> list[Message]:
        """Returns RetryInfo, if a retry makes sense."""
        if self.retry_after_s is None:
            return []
        delay = Duration()
        delay.FromMilliseconds(self._retry_after_ms)
        return [error_details_pb2.RetryInfo(retry_delay=delay)]

    def trailers(self) -> list[tuple[str, str]]:
        """Returns gRPC's pushback, which clients' own retry policies obey."""
        if self.retry_after_s is None:
            return [("grpc-retry-pushback-ms", "-1")]  # gRPC's word for: do not retry
        return [("grpc-retry-pushback-ms", str(self._retry_after_ms))]

    @property
    def _retry_after_ms(self) -> int:
        return round(1000 * (self.retry_after_s or 0.0))


class ClientTooSlow(RequestError):
    """The client does not read what it asked for."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str) -> None:
        super().__init__("CLIENT_TOO_SLOW", message)


@dataclass(frozen=True, kw_only=True)
class Absence:
    """Why nothing is served for a while; each request gets an error of its own from it."""

    reason: str
    message: str


DRAINING = Absence(reason="DRAINING", message="the server takes no new requests; it drains")


class Unavailable(RequestError):
    """This server cannot serve now; another one, or this one later, may."""

    code = grpc.StatusCode.UNAVAILABLE

    def __init__(self, absence: Absence) -> None:
        super().__init__(absence.reason, absence.message)


class DeadlinePassed(RequestError):
    """The caller's deadline has passed. gRPC has mostly told it before this does."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED

    def __init__(self) -> None:
        super().__init__("DEADLINE_PASSED", "the deadline of the call has passed")


class EndedByOperator(RequestError):
    """The request was taken out of the queue on the server's side."""

    code = grpc.StatusCode.CANCELLED

    def __init__(self) -> None:
        super().__init__("ENDED_BY_OPERATOR", "the request was ended before it ran")


class ServerFault(RequestError):
    """Something broke here; the operator finds it by its id in the log."""

    code = grpc.StatusCode.INTERNAL

    def __init__(self, reason: str) -> None:
        self.fault_id = uuid.uuid4().hex
        super().__init__(reason, f"the server failed; fault {self.fault_id}")

    def metadata(self) -> dict[str, str]:
        """Returns the fault's id."""
        return {"fault_id": self.fault_id}


def fault(what: str, reason: str = "INTERNAL") -> ServerFault:
    """Logs what should not be and returns what the client may know of it."""
    made = ServerFault(reason)
    _log.error("fault %s: %s", made.fault_id, what)
    return made


def fault_of(error: BaseException) -> ServerFault:
    """Logs an unexpected exception with its traceback; returns what the client may know of it."""
    made = ServerFault("INTERNAL")
    _log.error("fault %s", made.fault_id, exc_info=error)
    return made


def refusal_error(refused: Refused) -> RequestError:
    """Returns what the core's refusal means for the client."""
    match refused.reason:
        case (
            RefusalReason.QUEUE_FULL
            | RefusalReason.DEADLINE_UNREACHABLE
            | RefusalReason.TENANT_LIMIT
        ):
            return Overloaded(refused.reason.name, refused.detail, refused.retry_after_s)
        case RefusalReason.TOO_LONG:
            violation = Violation(field="prompt", description=refused.detail)
            return InvalidRequest([violation], "PROMPT_TOO_LONG")
        case RefusalReason.NOT_READY:
            return Unavailable(Absence(reason="NOT_READY", message=refused.detail))
        case RefusalReason.DRAINING:
            return Unavailable(DRAINING)
        case RefusalReason.INVALID | RefusalReason.DUPLICATE:
            return fault(f"the core refused a request as {refused.reason}: {refused.detail}")


async def abort(
    context: grpc.aio.ServicerContext[bytes, bytes], error: RequestError, trailers: Trailers = ()
) -> NoReturn:
    """Ends a call with the status of an error; `trailers` go with it.

    A client that does not read what came before the status never gets it: its stream is cut.
    """
    info = error_details_pb2.ErrorInfo(
        reason=error.reason, domain=DOMAIN, metadata=error.metadata()
    )
    message = error.message[:_MAX_MESSAGE_CHARS]
    status = status_pb2.Status(
        code=error.code.value[0],
        message=message,
        details=[_pack(detail) for detail in (info, *error.details())],
    )
    details: Trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    try:
        async with asyncio.timeout(UNREAD_S):
            await context.abort(error.code, message, (*error.trailers(), *details, *trailers))
    except TimeoutError as unread:
        raise asyncio.CancelledError from unread
    except grpc.aio.InternalError as gone:  # the client left meanwhile
        raise asyncio.CancelledError from gone


def _pack(message: Message) -> Any:
    packed = Any()
    packed.Pack(message)
    return packed
