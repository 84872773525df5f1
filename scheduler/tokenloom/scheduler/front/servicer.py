"""The Inference service: validation, text and one coroutine a stream."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar, assert_never

import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.front.boundary import Context, bounded, parse, parsed
from tokenloom.scheduler.front.chat import PromptTooLong, TemplateError
from tokenloom.scheduler.front.connections import max_streams
from tokenloom.scheduler.front.errors import (
    DRAINING,
    Absence,
    InvalidRequest,
    OtherModel,
    Overloaded,
    Unavailable,
    Violation,
)
from tokenloom.scheduler.front.identity import Identities
from tokenloom.scheduler.front.journal import Journal
from tokenloom.scheduler.front.link import CoreLink
from tokenloom.scheduler.front.load import LoadReports
from tokenloom.scheduler.front.record import Record
from tokenloom.scheduler.front.responses import (
    Call,
    admission_response,
    delta_response,
    finish_response,
    pause_response,
)
from tokenloom.scheduler.front.screen import SMALL_BYTES, screen
from tokenloom.scheduler.front.stops import StopScanner, stop_strings
from tokenloom.scheduler.front.streams import BLOCKED_WRITE_S, End, Stream
from tokenloom.scheduler.front.text import TOKEN_CHARS, TextModel, digest_of
from tokenloom.scheduler.front.turns import Turns
from tokenloom.scheduler.front.validate import (
    Beginning,
    ChatPrompt,
    GenerateSpec,
    Limits,
    Prompt,
    TextPrompt,
    TokenPrompt,
    fit,
    validate_detokenize,
    validate_generate,
    validate_tokenize,
)
from tokenloom.scheduler.messages import ModelReady, Submit
from tokenloom.scheduler.tenants import NOBODY, Tenant
from tokenloom.v1 import inference_pb2 as pb

MESSAGE_LIMIT_BYTES = 40 * 1024 * 1024
"""A little more than the largest prompt that validation lets through."""
_Request = TypeVar("_Request", bound=Message)

MAX_TIMEOUT_S = 30 * 24 * 3600.0
"""Nobody waits for longer: such a deadline is as good as none."""

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name


_RETRY_S = 1.0


class InferenceServicer:
    """Serves one model: text here, tokens from the core."""

    def __init__(
        self,
        config: SchedulerConfig,
        text: TextModel,
        link: CoreLink,
        *,
        journal: Journal,
        identities: Identities,
        reports: LoadReports,
    ) -> None:
        self._config = config
        self._text = text
        self._link = link
        self._journal = journal
        self._identities = identities
        self._reports = reports
        self._numbers = itertools.count()
        self._turns = Turns()
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False
        self._max_streams = max_streams(config)
        self.model: ModelReady | Absence = Absence(
            reason="NOT_READY", message="the model is loading"
        )
        """What the core serves, or why it serves nothing."""

    # Life ------------------------------------------------------------------------------------

    async def drain(self, grace_s: float) -> None:
        """Refuses new requests and waits for the running ones; ends those left after `grace_s`."""
        self.refuse_all()
        if not await self._idle_within(grace_s):
            self.end_all()
            await self._idle_within(2 * BLOCKED_WRITE_S)

    def refuse_all(self) -> None:
        """Refuses requests that come from now on."""
        self._is_draining = True

    def end_all(self) -> None:
        """Ends the streams that are left, so that they go on elsewhere."""
        self._link.fail_all(DRAINING)

    async def _idle_within(self, limit_s: float) -> bool:
        try:
            async with asyncio.timeout(limit_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        if self._num_running >= self._max_streams:
            raise Overloaded(
                "QUEUE_FULL",
                f"{self._num_running} streams are open; at most {self._max_streams} may be",
                _RETRY_S,
            )
        self._num_running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if self._num_running == 0:
                self._idle.set()

    def _limits(self, tenant: Tenant = NOBODY) -> Limits:
        """Returns what the model allows a tenant. Raises Unavailable if there is none."""
        if self._is_draining:
            raise Unavailable(DRAINING)
        if isinstance(self.model, Absence):
            raise Unavailable(self.model)
        text = self._text
        vocab_size = self.model.vocab_size
        return Limits(
            vocab_size=vocab_size,
            max_model_tokens=self.model.max_model_tokens,
            longest_token_bytes=text.longest_token_bytes,
            eos_token_ids=tuple(eos for eos in text.eos_token_ids if 0 <= eos < vocab_size),
            has_chat_template=text.has_chat_template,
            max_tokens=tenant.max_tokens,
        )

    @property
    def _fingerprint(self) -> str:
        """The name of the served model, weights and text; the same on all servers of it."""
        weights = "" if isinstance(self.model, Absence) else self.model.fingerprint
        return digest_of(weights.encode(), self._text.fingerprint.encode())

    # Calls -----------------------------------------------------------------------------------

    def handler(self) -> grpc.GenericRpcHandler:
        """Returns the service as a server takes it.

        Requests are parsed inside the boundary of each call, so that garbage
        is refused like any other bad request, and after its caller is known.
        """
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Generate": grpc.unary_stream_rpc_method_handler(
                    bounded(self.generate, self._reports.trailers)
                ),
                "Tokenize": self._unary(pb.TokenizeRequest, self.tokenize),
                "Detokenize": self._unary(pb.DetokenizeRequest, self.detokenize),
                "GetModel": self._unary(pb.GetModelRequest, self.get_model),
            },
        )

    def _unary(
        self,
        request_type: type[_Request],
        serve: Callable[[_Request, Context], Awaitable[Message]],
    ) -> grpc.RpcMethodHandler[bytes, bytes | None]:
        serve_bytes = parsed(request_type, serve, self._screen)

        async def call(data: bytes, context: Context) -> Message | None:
            self._identities.tenant_of(context)
            return await serve_bytes(data, context)

        return grpc.unary_unary_rpc_method_handler(bounded(call))

    def _screen(self, request_type: type[Message], data: bytes) -> None:
        """Refuses, before it is parsed, what is too much to parse."""
        if len(data) > SMALL_BYTES:
            screen(request_type, data, self._limits())

    async def generate(self, data: bytes, context: Context) -> None:
        """Streams one completion. Whatever comes of the call stands in the journal."""
        with self._journal.entry(context) as record:
            async with self._running():
                tenant = self._identities.tenant_of(context)
                record.tenant = tenant.name
                self._screen(pb.GenerateRequest, data)
                request = parse(pb.GenerateRequest, data)
                await self._generate(request, context, record, tenant)

    async def tokenize(self, request: pb.TokenizeRequest, _: Context) -> pb.TokenizeResponse:
        """Returns the token ids that Generate would use."""
        limits = self._limits()
        prompt = validate_tokenize(request, limits)
        return pb.TokenizeResponse(token_ids=await self._tokens(prompt, limits))

    async def detokenize(self, request: pb.DetokenizeRequest, _: Context) -> pb.DetokenizeResponse:
        """Returns the text of token ids."""
        ids, skip_special_tokens = validate_detokenize(request, self._limits())
        text = await self._text.decode(ids, skip_special_tokens=skip_special_tokens)
        return pb.DetokenizeResponse(text=text)

    async def get_model(self, _: pb.GetModelRequest, __: Context) -> pb.GetModelResponse:
        """Describes the served model."""
        limits = self._limits()
        return pb.GetModelResponse(
            name=self._config.name,
            architecture=self._text.architecture,
            vocab_size=limits.vocab_size,
            max_model_tokens=limits.max_model_tokens,
            eos_token_ids=limits.eos_token_ids,
            has_chat_template=limits.has_chat_template,
            server_version=SERVER_VERSION,
            fingerprint=self._fingerprint,
        )

    # A stream --------------------------------------------------------------------------------

    async def _generate(
        self, request: pb.GenerateRequest, context: Context, record: Record, tenant: Tenant
    ) -> None:
        limits = self._limits(tenant)
        spec = validate_generate(request, limits, fallback_seed=secrets.randbits(64))
        tokens = await self._tokens(spec.prompt, limits)
        max_tokens = fit(spec, len(tokens), self._limits(tenant))  # may have changed meanwhile
        stream = self._stream(spec, record)
        record.is_chat = isinstance(spec.prompt, ChatPrompt)
        record.num_prompt_tokens, record.max_tokens = len(tokens), max_tokens
        record.sampling, record.priority = spec.sampling, spec.priority
        record.stream = stream
        call = Call(
            request_id=record.request_id,
            seed=spec.sampling.seed,
            num_prompt_tokens=len(tokens),
            max_tokens=max_tokens,
            fingerprint=digest_of(self._fingerprint.encode(), tokens.tobytes()),
        )
        beginning = spec.beginning
        if beginning is not None:
            await self._resume(stream, call, beginning)
            tokens = np.concatenate((tokens, beginning.token_ids))
        submit = Submit(
            stream=stream.number,
            tokens=tokens.tobytes(),
            max_tokens=max_tokens,
            sampling=spec.sampling,
            salt=tenant.cache_group,
            num_completion_tokens=0 if beginning is None else len(beginning.token_ids),
            request_id=call.request_id,
            tenant=tenant.name,
            timeout_s=_timeout_s(context),
            priority=spec.priority,
        )
        try:
            if not stream.is_over:
                self._link.submit(stream, submit)
            await self._deliver(stream, call, context)
        finally:
            self._link.release(stream)

    async def _resume(self, stream: Stream, call: Call, beginning: Beginning) -> None:
        """Brings a new stream to where another one broke off."""
        if beginning.fingerprint != call.fingerprint:
            raise OtherModel(began=beginning.fingerprint, here=call.fingerprint)
        await self._text.offload(
            TOKEN_CHARS * len(beginning.token_ids),
            lambda: stream.resume(beginning, max_tokens=call.max_tokens),
        )

    async def _deliver(self, stream: Stream, call: Call, context: Context) -> None:
        """Writes a stream's messages. The first write sends the initial metadata with it.

        Until then a refusal is trailers alone, which a client's retry policy may
        retry; after it nobody runs the request again behind the client's back.
        """
        num_cached_tokens = await stream.admitted()
        admission = admission_response(call, num_cached_tokens=num_cached_tokens)
        await stream.write(context.write(admission.SerializeToString()))
        end: End | None = None
        while end is None:
            await stream.ready()
            async with self._turns.turn():
                piece = stream.take()
                end = piece.end
                if piece.token_ids or piece.text:
                    delta = delta_response(piece)
                    await stream.write(context.write(delta.SerializeToString()))
                if piece.pauses:
                    await stream.write(context.write(pause_response().SerializeToString()))
        finish = finish_response(
            call,
            end,
            num_cached_tokens=num_cached_tokens,
            gpu_hour_price=self._config.gpu_hour_price,
        )
        await stream.write(context.write(finish.SerializeToString()))

    def _stream(self, spec: GenerateSpec, record: Record) -> Stream:
        return Stream(
            number=next(self._numbers),
            detokenizer=self._text.detokenizer(skip_special_tokens=spec.skip_special_tokens),
            scanner=StopScanner(stop_strings(spec.stop_strings)) if spec.stop_strings else None,
            min_tokens=spec.sampling.min_tokens,
            stop_token_ids=frozenset(spec.sampling.stop_token_ids),
            max_buffer_tokens=self._config.max_stream_buffer_tokens,
            on_stop=self._link.stop,
            on_event=partial(self._journal.mark, record),
        )

    async def _tokens(self, prompt: Prompt, limits: Limits) -> NDArray[np.int32]:
        most_tokens = limits.max_model_tokens
        try:
            match prompt:
                case TokenPrompt():
                    return prompt.ids
                case TextPrompt():
                    return await self._text.encode(prompt.text, most_tokens=most_tokens)
                case ChatPrompt():
                    return await self._text.encode_chat(
                        prompt.messages, most_tokens=most_tokens, max_chars=limits.max_prompt_bytes
                    )
                case _:
                    assert_never(prompt)
        except TemplateError as error:
            violation = Violation(field=prompt.field, description=str(error)[:256])
            raise InvalidRequest([violation]) from error
        except PromptTooLong as error:
            violation = Violation(field=prompt.field, description=str(error))
            raise InvalidRequest([violation], "PROMPT_TOO_LONG") from error


def _timeout_s(context: Context) -> float | None:
    """Returns what is left of the call's deadline, if it has one that matters."""
    left_s: float | None = context.time_remaining()  # the stubs lack the None
    return None if left_s is None or left_s > MAX_TIMEOUT_S else left_s


def _server_version() -> str:
    try:
        return version("tokenloom-scheduler")
    except PackageNotFoundError:  # run from a checkout
        return "checkout"


SERVER_VERSION = _server_version()
