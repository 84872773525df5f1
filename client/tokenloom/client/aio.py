"""The client for asyncio.

async with AsyncClient("localhost:50051") as client:
    streams = [client.generate(prompt, max_tokens=50) for prompt in prompts]
    texts = await asyncio.gather(*(stream.text() for stream in streams))

    async with client.chat([Message("user", "What is 47 + 38?")]) as stream:
        async for delta in stream:
            print(delta.text, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc
import grpc.aio

from tokenloom.client.access import PLAIN, TLS, Access, Token
from tokenloom.client.channels import ServerTarget
from tokenloom.client.completion import Completion
from tokenloom.client.errors import TokenloomError
from tokenloom.client.grpc_transport import AsyncGrpcTransport
from tokenloom.client.requests import (
    ChatMessages,
    Options,
    Prompt,
    chat_request,
    encode_chat,
    text_request,
)
from tokenloom.client.results import Admission, Delta, Model, Pause, Result, read_model
from tokenloom.client.resuming import DEFAULT_RESUME, AsyncResumingStream, Resume
from tokenloom.client.transport import AsyncResponseStream, AsyncTransport
from tokenloom.v1 import inference_pb2 as pb


class AsyncClient:
    """`Client` for asyncio: the same arguments, results and errors. Belongs to one event loop.

    `generate` and `chat` start the call at once, in the running loop, and return its stream
    without waiting. A task that is cancelled while it reads a stream cancels the call.
    """

    def __init__(
        self,
        target: ServerTarget | grpc.aio.Channel | AsyncTransport,
        *,
        credentials: TLS | grpc.ChannelCredentials | None = None,
        token: Token | None = None,
        insecure: bool = False,
        resume: Resume | None = DEFAULT_RESUME,
    ) -> None:
        access = Access(credentials=credentials, token=token, insecure=insecure)
        if access != PLAIN and not isinstance(target, str | Sequence):
            raise TypeError(
                "credentials go with an address, and so does a token; a channel has its own"
            )
        if isinstance(target, str | Sequence | grpc.aio.Channel):
            self._transport: AsyncTransport = AsyncGrpcTransport(target, access=access)
        elif isinstance(target, AsyncTransport):
            self._transport = target
        else:
            raise TypeError(f"an AsyncClient takes no {type(target).__name__} as its target")
        self._resume = resume

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        session: str | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream:
        """Starts the completion of a prompt: text as it stands, or token ids."""
        return self._start(text_request(prompt, options), timeout_s, session)

    def chat(
        self,
        messages: ChatMessages,
        *,
        timeout_s: float | None = None,
        session: str | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream:
        """Starts the answer to a chat, in the form of the served checkpoint's template."""
        return self._start(chat_request(messages, options), timeout_s, session)

    async def tokenize(self, text: str, *, timeout_s: float | None = None) -> list[int]:
        """Returns the token ids that `generate` uses for a text."""
        request = pb.TokenizeRequest(text=text)
        return list((await self._transport.tokenize_async(request, timeout_s=timeout_s)).token_ids)

    async def tokenize_chat(
        self, messages: ChatMessages, *, timeout_s: float | None = None
    ) -> list[int]:
        """Returns the token ids that `chat` uses for messages."""
        request = pb.TokenizeRequest(chat=encode_chat(messages))
        return list((await self._transport.tokenize_async(request, timeout_s=timeout_s)).token_ids)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        timeout_s: float | None = None,
    ) -> str:
        """Returns the text of token ids."""
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return (await self._transport.detokenize_async(request, timeout_s=timeout_s)).text

    async def model(self, *, timeout_s: float | None = None) -> Model:
        """Returns what the server serves, and its limits."""
        return read_model(
            await self._transport.get_model_async(pb.GetModelRequest(), timeout_s=timeout_s)
        )

    async def wait_ready(self, *, timeout_s: float | None = None) -> None:
        """Waits for a server that starts or loads; raises DeadlineExceeded after `timeout_s`."""
        await self._transport.wait_ready_async(timeout_s=timeout_s)

    async def close(self) -> None:
        """Cancels what runs and closes the connection."""
        await self._transport.close_async()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _start(
        self, request: pb.GenerateRequest, timeout_s: float | None, session: str | None
    ) -> AsyncStream:
        if self._resume is None:
            return AsyncStream(
                self._transport.generate_async(request, timeout_s=timeout_s, session=session)
            )
        return AsyncStream(
            AsyncResumingStream(
                self._transport, request, self._resume, timeout_s=timeout_s, session=session
            )
        )


class AsyncStream:
    """One completion while it comes. Iterating yields its deltas, each once.

    As a context manager it cancels, on the way out, what has not ended. One task reads; any
    task may cancel. An error ends the stream; reading on raises it again.
    """

    def __init__(self, responses: AsyncResponseStream) -> None:
        self._responses = responses
        self._completion = Completion()
        self._result: Result | None = None
        self._error: TokenloomError | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        while self._result is None:
            event = await self._advance()
            if isinstance(event, Delta):
                return event
        raise StopAsyncIteration

    async def events(self) -> AsyncIterator[Delta | Pause]:
        """Iterates as the stream itself does, over the server's pauses, too."""
        while self._result is None:
            event = await self._advance()
            if event is not None:
                yield event

    async def admission(self) -> Admission:
        """Waits until the server has admitted the request; takes nothing from the iteration."""
        while self._completion.admission is None:
            await self._advance()  # the first message is the admission, or reading fails
        return self._completion.admission

    async def result(self) -> Result:
        """Reads to the end and returns the whole completion."""
        while self._result is None:
            await self._advance()
        return self._result

    async def text(self) -> str:
        """Reads to the end and returns the whole text."""
        return (await self.result()).text

    @property
    def partial_text(self) -> str:
        """The text that has been read so far, also after a cancellation or an error."""
        return self._completion.text

    def cancel(self) -> None:
        """Ends the completion; reading on raises Cancelled. After the end it does nothing."""
        self._responses.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    async def _advance(self) -> Delta | Pause | None:
        if self._error is not None:
            raise self._error
        try:
            message = await self._responses.read()
            if message is not None:
                return self._completion.feed(message)
            self._result = self._completion.result()
        except TokenloomError as error:
            self._error = error
            self._responses.cancel()
            raise
        return None
