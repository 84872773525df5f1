"""The blocking client.

with Client("localhost:50051") as client:
    print(client.chat([{"role": "user", "content": "What is 2 + 2?"}], max_tokens=50).text())

    with client.chat([Message("user", "What is 47 + 38?")], temperature=0) as stream:
        for delta in stream:
            print(delta.text, end="", flush=True)
    print(stream.result().finish_reason)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

from tokenloom.client.access import PLAIN, TLS, Access, Token
from tokenloom.client.channels import ServerTarget
from tokenloom.client.completion import Completion
from tokenloom.client.errors import TokenloomError
from tokenloom.client.grpc_transport import GrpcTransport
from tokenloom.client.requests import (
    ChatMessages,
    Options,
    Prompt,
    chat_request,
    encode_chat,
    text_request,
)
from tokenloom.client.results import Admission, Delta, Model, Pause, Result, read_model
from tokenloom.client.resuming import DEFAULT_RESUME, Resume, ResumingStream
from tokenloom.client.transport import ResponseStream, Transport
from tokenloom.v1 import inference_pb2 as pb


class Client:
    """Talks to one tokenloom server, or to replicas. Safe to share by threads.

    `target` is the address of a server as gRPC writes it (`host:port`, `unix:/path`); or replicas,
    over which calls are spread by what each could still take: `dns:///name:port` for all addresses
    behind a name, or a list of `IP:port`. Or it is a channel, which stays the caller's to close, or
    another transport, such as `tokenloom.client.testing.FakeServer`. Connections are made when they
    are first needed and made again when they break.

    `credentials` turns on TLS: a `TLS` names files, which are read again when they change, and
    credentials of gRPC are used as they are. `token` is a bearer token, or the path of a file that
    holds it and may change, too; in plaintext it goes nowhere but to this host, unless `insecure`.
    Raises ValueError for files that cannot be used, and for a list that cannot be one target.

    Every method raises TokenloomError. `timeout_s` is the time that a whole call may take; the
    server knows it too, and stops to work for a call whose time is over. None: no limit.

    A completion whose server goes away is resumed on another one behind `target`, or on the same
    one when it is back: its stream pauses and goes on with the next token. `resume` says how
    patiently; None: the error reaches the caller, as it does wherever the model is another one.

    Completions of one `session`, any text such as a user's or a document's id, go to one of the
    replicas in a list as long as it takes them: its cache has what their prompts begin with. A
    proxy finds the session's digest in the metadata `tokenloom-session`.
    """

    def __init__(
        self,
        target: ServerTarget | grpc.Channel | Transport,
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
        if isinstance(target, str | Sequence | grpc.Channel):
            self._transport: Transport = GrpcTransport(target, access=access)
        elif isinstance(target, Transport):
            self._transport = target
        else:
            raise TypeError(f"a Client takes no {type(target).__name__} as its target")
        self._resume = resume

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        session: str | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """Starts the completion of a prompt: text as it stands, or token ids."""
        return self._start(text_request(prompt, options), timeout_s, session)

    def chat(
        self,
        messages: ChatMessages,
        *,
        timeout_s: float | None = None,
        session: str | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """Starts the answer to a chat, in the form of the served checkpoint's template."""
        return self._start(chat_request(messages, options), timeout_s, session)

    def tokenize(self, text: str, *, timeout_s: float | None = None) -> list[int]:
        """Returns the token ids that `generate` uses for a text."""
        request = pb.TokenizeRequest(text=text)
        return list(self._transport.tokenize(request, timeout_s=timeout_s).token_ids)

    def tokenize_chat(self, messages: ChatMessages, *, timeout_s: float | None = None) -> list[int]:
        """Returns the token ids that `chat` uses for messages."""
        request = pb.TokenizeRequest(chat=encode_chat(messages))
        return list(self._transport.tokenize(request, timeout_s=timeout_s).token_ids)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        timeout_s: float | None = None,
    ) -> str:
        """Returns the text of token ids."""
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return self._transport.detokenize(request, timeout_s=timeout_s).text

    def model(self, *, timeout_s: float | None = None) -> Model:
        """Returns what the server serves, and its limits."""
        return read_model(self._transport.get_model(pb.GetModelRequest(), timeout_s=timeout_s))

    def wait_ready(self, *, timeout_s: float | None = None) -> None:
        """Waits for a server that starts or loads; raises DeadlineExceeded after `timeout_s`."""
        self._transport.wait_ready(timeout_s=timeout_s)

    def close(self) -> None:
        """Cancels what runs and closes the connection."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(
        self, request: pb.GenerateRequest, timeout_s: float | None, session: str | None
    ) -> Stream:
        if self._resume is None:
            return Stream(self._transport.generate(request, timeout_s=timeout_s, session=session))
        return Stream(
            ResumingStream(
                self._transport, request, self._resume, timeout_s=timeout_s, session=session
            )
        )


class Stream:
    """One completion while it comes. Iterating yields its deltas, each once.

    As a context manager it cancels, on the way out, what has not ended. One thread reads;
    any thread may cancel. An error ends the stream; reading on raises it again.
    """

    def __init__(self, responses: ResponseStream) -> None:
        self._responses = responses
        self._completion = Completion()
        self._result: Result | None = None
        self._error: TokenloomError | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        while self._result is None:
            event = self._advance()
            if isinstance(event, Delta):
                return event
        raise StopIteration

    def events(self) -> Iterator[Delta | Pause]:
        """Iterates as the stream itself does, over the server's pauses, too."""
        while self._result is None:
            event = self._advance()
            if event is not None:
                yield event

    def admission(self) -> Admission:
        """Waits until the server has admitted the request; takes nothing from the iteration."""
        while self._completion.admission is None:
            self._advance()  # the first message is the admission, or reading fails
        return self._completion.admission

    def result(self) -> Result:
        """Reads to the end and returns the whole completion."""
        while self._result is None:
            self._advance()
        return self._result

    def text(self) -> str:
        """Reads to the end and returns the whole text."""
        return self.result().text

    @property
    def partial_text(self) -> str:
        """The text that has been read so far, also after a cancellation or an error."""
        return self._completion.text

    def cancel(self) -> None:
        """Ends the completion; reading on raises Cancelled. After the end it does nothing."""
        self._responses.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def _advance(self) -> Delta | Pause | None:
        if self._error is not None:
            raise self._error
        try:
            message = self._responses.read()
            if message is not None:
                return self._completion.feed(message)
            self._result = self._completion.result()
        except TokenloomError as error:
            self._error = error
            self._responses.cancel()
            raise
        return None
