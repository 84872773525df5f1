"""The Python SDK of tokenloom: `Client`, `AsyncClient`, and what they take, return and raise.

`tokenloom.client.testing` holds a server in memory for tests of code that uses them.
"""

from tokenloom.client.access import TLS
from tokenloom.client.aio import AsyncClient, AsyncStream
from tokenloom.client.client import Client, Stream
from tokenloom.client.errors import (
    AccessDenied,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    Overloaded,
    ProtocolError,
    ServerError,
    TokenloomError,
    Unavailable,
    Violation,
)
from tokenloom.client.requests import Message, Options
from tokenloom.client.results import (
    Admission,
    Cost,
    Delta,
    FinishReason,
    Model,
    Pause,
    PauseReason,
    Result,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from tokenloom.client.resuming import Resume

__all__ = [
    "TLS",
    "AccessDenied",
    "Admission",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Client",
    "Cost",
    "DeadlineExceeded",
    "Delta",
    "FinishReason",
    "InvalidRequest",
    "LimitExceeded",
    "Message",
    "Model",
    "Options",
    "Overloaded",
    "Pause",
    "PauseReason",
    "ProtocolError",
    "Result",
    "Resume",
    "ServerError",
    "Stream",
    "TokenLogprob",
    "TokenloomError",
    "TopLogprob",
    "Unavailable",
    "Usage",
    "Violation",
]
