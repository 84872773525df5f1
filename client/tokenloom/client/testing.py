"""A server in memory, for tests of code that uses `Client` or `AsyncClient`.

    def test_gives_up_on_a_full_server() -> None:
        full = Overloaded("2048 requests wait", reason="QUEUE_FULL", retry_after_s=1.5)
        server = FakeServer(lambda request: Answer([full]))
        with Client(server) as client:
            assert my_service(client) == "please come back later"

It takes the place of gRPC and the server below the same client code that runs
in production; nothing is sent anywhere. Time is virtual: a `Wait` of an hour
takes none and still exceeds a deadline of a minute.

A token of this server is a byte of UTF-8, so texts, token ids and counts agree
with each other wherever an answer does not say otherwise.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from tokenloom.client.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    TokenloomError,
    Violation,
)
from tokenloom.client.results import (
    FINISH_REASONS,
    PAUSE_REASONS,
    Admission,
    Cost,
    Delta,
    FinishReason,
    Model,
    Pause,
    Usage,
)
from tokenloom.v1 import inference_pb2 as pb

_REASON_NUMBERS = {reason: number for number, reason in FINISH_REASONS.items()}
_PAUSE_NUMBERS = {reason: number for number, reason in PAUSE_REASONS.items()}


@dataclass(frozen=True)
class Wait:
    """Virtual time passes. `math.inf` waits for the deadline or a cancellation."""

    seconds: float


Event: TypeAlias = str | Delta | Pause | Admission | Wait | TokenloomError
"""A text becomes the next delta; a Delta is sent as it stands, even where it leaves a gap;
an error ends the stream."""


@dataclass(frozen=True)
class Answer:
    """What the server sends for one request, in order.

    Unless `events` holds an Admission, one goes before the first delta, pause or the end. So an
    error that comes first is a refusal, as a full server gives it.

    A stream that breaks is resumed only if its Admission has a fingerprint, so a test that is not
    about it need not think of it. A text in the answer to a request with `resume_from` goes on
    behind the tokens named there.
    """

    events: Sequence[Event]
    finish_reason: FinishReason | None = FinishReason.STOP_TOKEN
    """None: the stream breaks off without a finish message."""
    stop_token_id: int | None = None
    stop_string: str | None = None
    usage: Usage | None = None
    """None: counted from what was sent."""
    cost: Cost | None = None
    """None: the server does not say."""


FAKE_MODEL = Model(
    name="fake",
    architecture="FakeForCausalLM",
    vocab_size=256,
    max_model_tokens=4096,
    eos_token_ids=(0,),
    has_chat_template=True,
    server_version="fake",
)


_Script: TypeAlias = Iterator[pb.GenerateResponse | Wait]
"""Messages; a Wait, if any, is endless and the last."""


class FakeCall:
    """A Generate call that the server received, and how far it came."""

    def __init__(
        self, request: pb.GenerateRequest, timeout_s: float | None, session: str | None
    ) -> None:
        self.request = request
        self.timeout_s = timeout_s
        self.session = session
        self.num_sent_deltas = 0
        self.ended = False
        """Whether the server sent all, or an error."""
        self.cancelled = False
        """Whether the client left before the end."""


class FakeServer:
    """Answers calls in memory: give it to `Client` or `AsyncClient` as their target.

    `respond` is called with each request and returns the answer; what it raises reaches the
    test as it is. `calls` lists the Generate calls, oldest first.
    """

    def __init__(
        self, respond: Callable[[pb.GenerateRequest], Answer], *, model: Model = FAKE_MODEL
    ) -> None:
        self.calls: list[FakeCall] = []
        self._respond = respond
        self._model = model

    def generate(
        self, request: pb.GenerateRequest, *, timeout_s: float | None, session: str | None = None
    ) -> _FakeStream:
        """Starts the answer to a request."""
        return _FakeStream(*self._start(FakeCall(request, timeout_s, session)))

    def generate_async(
        self, request: pb.GenerateRequest, *, timeout_s: float | None, session: str | None = None
    ) -> _AsyncFakeStream:
        """Starts the answer to a request."""
        return _AsyncFakeStream(*self._start(FakeCall(request, timeout_s, session)))

    def tokenize(
        self,
        request: pb.TokenizeRequest,
        *,
        timeout_s: float | None,  # noqa: ARG002 - the Transport's signature; it takes no time
    ) -> pb.TokenizeResponse:
        """Returns the bytes of the text, or of the contents of the chat."""
        return pb.TokenizeResponse(token_ids=_prompt_tokens(request))

    async def tokenize_async(
        self, request: pb.TokenizeRequest, *, timeout_s: float | None
    ) -> pb.TokenizeResponse:
        """Returns what `tokenize` does."""
        return self.tokenize(request, timeout_s=timeout_s)

    def detokenize(
        self,
        request: pb.DetokenizeRequest,
        *,
        timeout_s: float | None,  # noqa: ARG002 - as above
    ) -> pb.DetokenizeResponse:
        """Returns the text of bytes. Raises InvalidRequest for larger ids."""
        for index, token_id in enumerate(request.token_ids):
            if token_id >= 256:
                description = f"token id is {token_id}; this server has 256"
                raise InvalidRequest(
                    description, violations=[Violation(f"token_ids[{index}]", description)]
                )
        return pb.DetokenizeResponse(text=bytes(request.token_ids).decode(errors="replace"))

    async def detokenize_async(
        self, request: pb.DetokenizeRequest, *, timeout_s: float | None
    ) -> pb.DetokenizeResponse:
        """Returns what `detokenize` does."""
        return self.detokenize(request, timeout_s=timeout_s)

    def get_model(
        self,
        request: pb.GetModelRequest,  # noqa: ARG002 - the Transport's signature; it has no fields
        *,
        timeout_s: float | None,  # noqa: ARG002 - as above
    ) -> pb.GetModelResponse:
        """Returns the model that the server was made with."""
        model = self._model
        return pb.GetModelResponse(
            name=model.name,
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            max_model_tokens=model.max_model_tokens,
            eos_token_ids=model.eos_token_ids,
            has_chat_template=model.has_chat_template,
            server_version=model.server_version,
            fingerprint=model.fingerprint,
        )

    async def get_model_async(
        self, request: pb.GetModelRequest, *, timeout_s: float | None
    ) -> pb.GetModelResponse:
        """Returns what `get_model` does."""
        return self.get_model(request, timeout_s=timeout_s)

    def wait_ready(self, *, timeout_s: float | None) -> None:
        """Returns at once."""

    async def wait_ready_async(self, *, timeout_s: float | None) -> None:
        """Returns at once."""

    def close(self) -> None:
        """Leaves the server as it is, for the test to look at."""

    async def close_async(self) -> None:
        """Leaves the server as it is."""

    def _start(self, call: FakeCall) -> tuple[FakeCall, _Script]:
        self.calls.append(call)
        answer = self._respond(call.request)
        return call, _play(call, answer, request_id=f"fake-{len(self.calls)}")


class _FakeStream:
    def __init__(self, call: FakeCall, script: _Script) -> None:
        self._call = call
        self._script = script
        self._left = threading.Event()

    def read(self) -> pb.GenerateResponse | None:
        _raise_if_cancelled(self._call)
        message = next(self._script, None)
        if isinstance(message, Wait):
            self._left.wait()
            raise Cancelled("the call was cancelled here")
        return message

    def cancel(self) -> None:
        _leave(self._call)
        self._left.set()


class _AsyncFakeStream:
    def __init__(self, call: FakeCall, script: _Script) -> None:
        self._call = call
        self._script = script
        self._left = asyncio.Event()

    async def read(self) -> pb.GenerateResponse | None:
        try:
            await asyncio.sleep(0)  # as a network would, lets other tasks run
            _raise_if_cancelled(self._call)
            message = next(self._script, None)
            if isinstance(message, Wait):
                await self._left.wait()
                raise Cancelled("the call was cancelled here")
        except asyncio.CancelledError:
            _leave(self._call)
            raise
        return message

    def cancel(self) -> None:
        _leave(self._call)
        self._left.set()


def _leave(call: FakeCall) -> None:
    call.cancelled = call.cancelled or not call.ended


def _raise_if_cancelled(call: FakeCall) -> None:
    if call.cancelled:
        raise Cancelled("the call was cancelled here")


def _play(call: FakeCall, answer: Answer, request_id: str) -> _Script:
    """Yields what an answer sends to a call; ends in its errors, its deadline or its end."""
    admission = _default_admission(call.request, request_id)
    admitted = False
    elapsed_s = 0.0
    num_tokens = len(call.request.resume_from.token_ids)
    try:
        for event in answer.events:
            if not admitted and isinstance(event, str | Delta | Pause):
                yield pb.GenerateResponse(admission=_encode_admission(admission))
                admitted = True
            match event:
                case Wait(seconds):
                    elapsed_s += seconds
                    _check_deadline(call, elapsed_s)
                    if math.isinf(elapsed_s):
                        yield event
                case TokenloomError():
                    raise event
                case Admission():
                    admission = event
                    admitted = True
                    yield pb.GenerateResponse(admission=_encode_admission(event))
                case Pause():
                    number = _PAUSE_NUMBERS.get(event.reason, pb.PAUSE_REASON_UNSPECIFIED)
                    yield pb.GenerateResponse(pause=pb.Pause(reason=number))
                case str() | Delta():
                    delta = _text_delta(num_tokens, event) if isinstance(event, str) else event
                    num_tokens += len(delta.token_ids)
                    call.num_sent_deltas += 1
                    yield pb.GenerateResponse(delta=_encode_delta(delta))
                case _:
                    assert_never(event)
        if not admitted:
            yield pb.GenerateResponse(admission=_encode_admission(admission))
        if answer.finish_reason is not None:
            usage = answer.usage or Usage(
                num_prompt_tokens=admission.num_prompt_tokens,
                num_cached_tokens=admission.num_cached_tokens,
                num_completion_tokens=num_tokens,
            )
            yield pb.GenerateResponse(finish=_encode_finish(answer.finish_reason, answer, usage))
    finally:
        call.ended = True


def _check_deadline(call: FakeCall, elapsed_s: float) -> None:
    if call.timeout_s is not None and elapsed_s >= call.timeout_s:
        raise DeadlineExceeded(f"{call.timeout_s} s passed")


def _prompt_tokens(request: pb.GenerateRequest | pb.TokenizeRequest) -> list[int]:
    if isinstance(request, pb.GenerateRequest) and request.HasField("tokens"):
        return list(request.tokens.ids)
    if request.HasField("chat"):
        return list("".join(turn.content for turn in request.chat.messages).encode())
    return list(request.text.encode())


def _default_admission(request: pb.GenerateRequest, request_id: str) -> Admission:
    return Admission(
        request_id=request_id,
        seed=request.sampling.seed,
        num_prompt_tokens=len(_prompt_tokens(request)),
        num_cached_tokens=0,
    )


def _text_delta(first_index: int, text: str) -> Delta:
    return Delta(first_index=first_index, token_ids=tuple(text.encode()), text=text)


def _encode_admission(admission: Admission) -> pb.Admission:
    return pb.Admission(
        request_id=admission.request_id,
        seed=admission.seed,
        num_prompt_tokens=admission.num_prompt_tokens,
        num_cached_tokens=admission.num_cached_tokens,
        max_tokens=admission.max_tokens or 0,
        fingerprint=admission.fingerprint,
    )


def _encode_delta(delta: Delta) -> pb.Delta:
    return pb.Delta(
        first_index=delta.first_index,
        token_ids=delta.token_ids,
        text=delta.text,
        logprobs=[
            pb.TokenLogprob(
                logprob=entry.logprob,
                top=[
                    pb.TopLogprob(token_id=top.token_id, logprob=top.logprob) for top in entry.top
                ],
            )
            for entry in delta.logprobs
        ],
    )


def _encode_finish(reason: FinishReason, answer: Answer, usage: Usage) -> pb.Finish:
    return pb.Finish(
        # OTHER stands for what this version does not know: so does a number that nobody uses.
        reason=_REASON_NUMBERS.get(reason, pb.FINISH_REASON_UNSPECIFIED),
        stop_token_id=answer.stop_token_id,
        stop_string=answer.stop_string,
        usage=pb.Usage(
            num_prompt_tokens=usage.num_prompt_tokens,
            num_cached_tokens=usage.num_cached_tokens,
            num_completion_tokens=usage.num_completion_tokens,
            queue_s=usage.queue_s,
            prefill_s=usage.prefill_s,
            decode_s=usage.decode_s,
        ),
        cost=None if answer.cost is None else _encode_cost(answer.cost),
    )


def _encode_cost(cost: Cost) -> pb.Cost:
    return pb.Cost(
        gpu_s=cost.gpu_s,
        kv_block_s=cost.kv_block_s,
        num_recomputed_tokens=cost.num_recomputed_tokens,
        num_preemptions=cost.num_preemptions,
        price=cost.price,
    )
