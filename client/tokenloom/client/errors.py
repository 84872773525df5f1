"""What can go wrong, as one tree of exceptions.

    TokenloomError            everything below: one `except` for all
    ├── InvalidRequest        refused as it stands; `violations` name the fields
    ├── AccessDenied          the caller is unknown or may not do this
    ├── Overloaded            refused for now; `retry_after_s` says when to come again
    ├── LimitExceeded         past a limit that no retry changes: a message too large, a
    │                         stream that was not read
    ├── Unavailable           no server, or one that loads its model or drains
    ├── DeadlineExceeded      `timeout_s` passed before the end
    ├── Cancelled             the call was cancelled, here or by the server
    ├── ServerError           a fault of the server; `fault_id` finds it in its log
    └── ProtocolError         the server's messages break the contract of the stream

Every error bears the gRPC status `code`; a `reason`, the constant that the
server gives for programs (such as QUEUE_FULL), empty where it gave none or the
status is not its own; and `metadata`, what else it told. Values that cannot be
right for any server raise Python's own TypeError or ValueError before anything
is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import grpc


class TokenloomError(Exception):
    """The root of the tree: a call did not end as asked."""

    default_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = self.default_code if code is None else code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        """When the server thinks another try makes sense; None: it did not say."""


@dataclass(frozen=True)
class Violation:
    """A field of the request that was refused, and why."""

    field: str
    """Its path in the API's messages, such as `sampling.top_p`."""
    description: str


class InvalidRequest(TokenloomError):
    """The server refuses the request as it stands; the same again fails again."""

    default_code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(
        self,
        message: str,
        *,
        violations: Sequence[Violation] = (),
        code: grpc.StatusCode | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(
            message, code=code, reason=reason, metadata=metadata, retry_after_s=retry_after_s
        )
        self.violations = tuple(violations)


class AccessDenied(TokenloomError):
    """The server does not know the caller, or knows that it may not do this."""

    default_code = grpc.StatusCode.PERMISSION_DENIED


class Overloaded(TokenloomError):
    """The server has no room for the request now."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class LimitExceeded(TokenloomError):
    """The call went past a limit of the server; the same call again would do so too."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(TokenloomError):
    """No server could be reached, or it does not serve yet or any more."""

    default_code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(TokenloomError):
    """The call's `timeout_s` passed before it ended."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(TokenloomError):
    """The call was cancelled: by `cancel()`, by closing the client, or by the server."""

    default_code = grpc.StatusCode.CANCELLED


class ServerError(TokenloomError):
    """The server failed at a request that it had no reason to refuse."""

    default_code = grpc.StatusCode.INTERNAL

    @property
    def fault_id(self) -> str | None:
        """The id beside the fault in the server's log, if the server told one."""
        return self.metadata.get("fault_id")


class ProtocolError(TokenloomError):
    """The messages of a stream do not fit together: a gap, a repetition, a missing end."""

    default_code = grpc.StatusCode.DATA_LOSS
