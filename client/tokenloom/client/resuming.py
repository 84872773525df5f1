"""Streams that outlive the server that began them.

    transport ── message ──▶ Progress: tokens, bytes of text ──▶ caller
        ▲  └──── transport failure ──▶ Progress: how long to wait, or what the caller sees
        └─────── Generate(resume_from) ◀── the request that goes on behind what has come

A stream is resumed where it broke off without a word of the server's own (a lost connection, a
process that died), or with the word that the scheduler itself goes away. Every other error is the
stream's end. Before its Admission there is nothing to resume.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import grpc

from tokenloom.client.errors import Cancelled, DeadlineExceeded, Overloaded, TokenloomError
from tokenloom.client.transport import (
    AsyncResponseStream,
    AsyncTransport,
    ResponseStream,
    Transport,
)
from tokenloom.v1 import inference_pb2 as pb

_log = logging.getLogger(__name__)

_TRANSPORT_CODES = (
    grpc.StatusCode.UNAVAILABLE,  # no connection, or one that broke
    grpc.StatusCode.INTERNAL,  # a stream that was reset
    grpc.StatusCode.UNKNOWN,  # a stream that ended without a status
)
"""What gRPC and proxies say of a broken connection; from them it comes without a reason."""
_LEAVING = ("CORE_LOST", "DRAINING")
"""Reasons of a scheduler that ends running streams because it goes away."""


@dataclass(frozen=True, kw_only=True)
class Resume:
    """How patiently a broken stream is resumed. The call's `timeout_s` bounds it in any case."""

    max_attempts: int = 10
    """In a row, without a new token between them."""
    first_pause_s: float = 0.1
    """Before the first attempt; each pause is up to twice the last."""
    max_pause_s: float = 10.0

    def pause_s(self, num_attempts: int) -> float:
        """Returns how long to wait after so many attempts: drawn, for many streams break at once.

        A server may ask for more.
        """
        longest_s = min(self.max_pause_s, self.first_pause_s * 2.0**num_attempts)
        return longest_s * random.uniform(0.5, 1.0)  # noqa: S311 - no secret


DEFAULT_RESUME = Resume()
"""Some 40 s."""


class Progress:
    """What has come of one stream, kept as the request that goes on behind it."""

    def __init__(
        self, request: pb.GenerateRequest, resume: Resume, *, timeout_s: float | None
    ) -> None:
        self._request = request
        """From the Admission on what the next call asks."""
        self._resume = resume
        self._end_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._may_resume = False
        self._num_attempts = 0
        self._broken: TokenloomError | None = None
        """What broke the stream, until another call is admitted."""

    @property
    def remaining_s(self) -> float | None:
        """What is left of the caller's time; None: it has no end."""
        return None if self._end_s is None else max(0.0, self._end_s - time.monotonic())

    def next_request(self) -> pb.GenerateRequest:
        """Returns the request that goes on behind what has come."""
        return _copied(self._request)

    def takes(self, message: pb.GenerateResponse) -> bool:
        """Notes a message; returns whether the caller is to see it.

        It sees one Admission, the first.
        """
        match message.WhichOneof("event"):
            case "admission" if self._broken is not None:
                self._broken = None
                return False
            case "admission":
                self._admit(message.admission)
            case "delta" if self._may_resume:
                self._num_attempts = 0
                beginning = self._request.resume_from
                beginning.token_ids.extend(message.delta.token_ids)
                beginning.num_text_bytes += len(message.delta.text.encode())
        return True

    def pause_s(self, error: TokenloomError) -> float:
        """Returns how long to wait before the next call, after an error of the last one.

        Raises what the caller is to see if there is to be none: the error; or what broke the
        stream, if the error only tells why it could not be resumed.
        """
        may_pass = _breaks(error) if self._broken is None else _refuses_for_now(error)
        if not self._may_resume or not may_pass or self._num_attempts >= self._resume.max_attempts:
            if self._broken is None or isinstance(error, DeadlineExceeded | Cancelled):
                raise error
            raise self._broken from error
        if self._broken is None:
            self._broken = error
        pause_s = max(self._resume.pause_s(self._num_attempts), error.retry_after_s or 0.0)
        self._num_attempts += 1
        _log.info(
            "a stream broke off after %d tokens; attempt %d to resume it follows in %.1f s: %s",
            len(self._request.resume_from.token_ids),
            self._num_attempts,
            pause_s,
            error,
        )
        remaining_s = self.remaining_s
        return pause_s if remaining_s is None else min(pause_s, remaining_s)

    def _admit(self, admission: pb.Admission) -> None:
        if not admission.fingerprint:
            return  # an older server: it cannot resume
        self._may_resume = True
        self._request = _copied(self._request)
        self._request.sampling.seed = admission.seed
        self._request.stopping.max_tokens = admission.max_tokens
        self._request.resume_from.fingerprint = admission.fingerprint


def _copied(request: pb.GenerateRequest) -> pb.GenerateRequest:
    copy = pb.GenerateRequest()
    copy.CopyFrom(request)
    return copy


def _breaks(error: TokenloomError) -> bool:
    """Returns whether an error of a running stream says no more than that its server is gone."""
    if error.reason:
        return error.reason in _LEAVING
    return error.code in _TRANSPORT_CODES


def _refuses_for_now(error: TokenloomError) -> bool:
    """Returns whether another attempt to resume may fare better."""
    if isinstance(error, Overloaded):
        return error.retry_after_s is not None
    return error.code is grpc.StatusCode.UNAVAILABLE or _breaks(error)


class ResumingStream:
    """The messages of one completion, by however many calls they come."""

    def __init__(
        self,
        transport: Transport,
        request: pb.GenerateRequest,
        resume: Resume,
        *,
        timeout_s: float | None,
        session: str | None = None,
    ) -> None:
        self._transport = transport
        self._session = session
        self._progress = Progress(request, resume, timeout_s=timeout_s)
        self._left = threading.Event()
        self._responses: ResponseStream = transport.generate(
            request, timeout_s=timeout_s, session=session
        )

    def read(self) -> pb.GenerateResponse | None:
        """Returns the next message, None after the last. Raises TokenloomError."""
        while not self._left.is_set():
            try:
                message = self._responses.read()
            except TokenloomError as error:
                self._call_again(error)
                continue
            if message is None or self._progress.takes(message):
                return message
        raise Cancelled("the call was cancelled here")

    def cancel(self) -> None:
        """Ends the call, or the pause before the next one."""
        self._left.set()
        self._responses.cancel()

    def _call_again(self, error: TokenloomError) -> None:
        if self._left.wait(self._progress.pause_s(error)):
            return
        self._responses = self._transport.generate(
            self._progress.next_request(),
            timeout_s=self._progress.remaining_s,
            session=self._session,
        )
        if self._left.is_set():  # while the call began: `cancel` may have ended the last one
            self._responses.cancel()


class AsyncResumingStream:
    """`ResumingStream` for asyncio."""

    def __init__(
        self,
        transport: AsyncTransport,
        request: pb.GenerateRequest,
        resume: Resume,
        *,
        timeout_s: float | None,
        session: str | None = None,
    ) -> None:
        self._transport = transport
        self._session = session
        self._progress = Progress(request, resume, timeout_s=timeout_s)
        self._left = asyncio.Event()
        self._responses: AsyncResponseStream = transport.generate_async(
            request, timeout_s=timeout_s, session=session
        )

    async def read(self) -> pb.GenerateResponse | None:
        """Returns the next message, None after the last. Raises TokenloomError."""
        while not self._left.is_set():
            try:
                message = await self._responses.read()
            except TokenloomError as error:
                await self._call_again(error)
                continue
            if message is None or self._progress.takes(message):
                return message
        raise Cancelled("the call was cancelled here")

    def cancel(self) -> None:
        """Ends the call, or the pause before the next one."""
        self._left.set()
        self._responses.cancel()

    async def _call_again(self, error: TokenloomError) -> None:
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._progress.pause_s(error)):
                    await self._left.wait()
        except asyncio.CancelledError:
            self._left.set()  # as a call that is being read, the stream ends with its reader
            raise
        if not self._left.is_set():
            self._responses = self._transport.generate_async(
                self._progress.next_request(),
                timeout_s=self._progress.remaining_s,
                session=self._session,
            )
