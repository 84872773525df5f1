"""The seam between the clients and what carries their messages.

    Client, AsyncClient      requests, streams, results
      │ messages of the API, errors of `tokenloom.client.errors`
    Transport, AsyncTransport
      ├── GrpcTransport, AsyncGrpcTransport     (grpc_transport.py)
      └── FakeServer                            (testing.py)

A transport neither reads the messages nor keeps state about them, so whatever
a test does through `FakeServer` takes the same way as a real request.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from tokenloom.v1 import inference_pb2 as pb


class ResponseStream(Protocol):
    """The messages of one running Generate call."""

    def read(self) -> pb.GenerateResponse | None:
        """Returns the next message, None after the last. Raises TokenloomError."""

    def cancel(self) -> None:
        """Ends the call; a read under way, in whatever thread, raises Cancelled."""


@runtime_checkable
class Transport(Protocol):
    """Carries calls for `Client`. Every method raises TokenloomError only."""

    def generate(
        self, request: pb.GenerateRequest, *, timeout_s: float | None, session: str | None = None
    ) -> ResponseStream:
        """Starts a Generate call; those of one session go to one replica while it takes them."""

    def tokenize(
        self, request: pb.TokenizeRequest, *, timeout_s: float | None
    ) -> pb.TokenizeResponse:
        """Makes a Tokenize call."""

    def detokenize(
        self, request: pb.DetokenizeRequest, *, timeout_s: float | None
    ) -> pb.DetokenizeResponse:
        """Makes a Detokenize call."""

    def get_model(
        self, request: pb.GetModelRequest, *, timeout_s: float | None
    ) -> pb.GetModelResponse:
        """Makes a GetModel call."""

    def wait_ready(self, *, timeout_s: float | None) -> None:
        """Returns once the server serves its model."""

    def close(self) -> None:
        """Ends what runs and gives back what the transport opened."""


class AsyncResponseStream(Protocol):
    """The messages of one running Generate call."""

    async def read(self) -> pb.GenerateResponse | None:
        """Returns the next message, None after the last. Raises TokenloomError.

        A task that is cancelled while it reads ends the call.
        """

    def cancel(self) -> None:
        """Ends the call; a read under way raises Cancelled."""


@runtime_checkable
class AsyncTransport(Protocol):
    """Carries calls for `AsyncClient`. Every method raises TokenloomError only."""

    def generate_async(
        self, request: pb.GenerateRequest, *, timeout_s: float | None, session: str | None = None
    ) -> AsyncResponseStream:
        """Starts a Generate call in the running event loop; `session` as in Transport."""

    async def tokenize_async(
        self, request: pb.TokenizeRequest, *, timeout_s: float | None
    ) -> pb.TokenizeResponse:
        """Makes a Tokenize call."""

    async def detokenize_async(
        self, request: pb.DetokenizeRequest, *, timeout_s: float | None
    ) -> pb.DetokenizeResponse:
        """Makes a Detokenize call."""

    async def get_model_async(
        self, request: pb.GetModelRequest, *, timeout_s: float | None
    ) -> pb.GetModelResponse:
        """Makes a GetModel call."""

    async def wait_ready_async(self, *, timeout_s: float | None) -> None:
        """Returns once the server serves its model."""

    async def close_async(self) -> None:
        """Ends what runs and gives back what the transport opened."""
