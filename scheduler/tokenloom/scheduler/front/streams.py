"""One request's way from the core to its client.

    CoreLink ── admit, push, finish, fail ──▶ Stream ── ready, take, write ──▶ client
                 once a step, cheap                     once a write, with the text work

While a write to the client is in flight, tokens gather in the stream; the next
write takes all of them. A stream without stop strings does its text work at
the write; one with stop strings at each token, because a match must be told
to the core at once.

Token ids are delivered with the delta in which they came, text when it is
final: a delta may have ids whose text follows with a later one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from tokenloom.scheduler.front import errors
from tokenloom.scheduler.front.detokenize import Detokenizer
from tokenloom.scheduler.front.errors import (
    Absence,
    ClientTooSlow,
    DeadlinePassed,
    EndedByOperator,
    RequestError,
    Unavailable,
    fault,
)
from tokenloom.scheduler.front.record import Event
from tokenloom.scheduler.front.resuming import replay
from tokenloom.scheduler.front.stops import StopScanner
from tokenloom.scheduler.front.validate import Beginning
from tokenloom.scheduler.messages import Finished, FinishReason
from tokenloom.wire.messages import TokenLogprobs

BLOCKED_WRITE_S = 0.5
"""A write that takes longer than this when its stream fails is blocked by the client."""


NO_ROOM = Absence(
    reason="MODEL_LOST", message="the model's workers are gone; the next have no room for this"
)


@dataclass(frozen=True, kw_only=True)
class End:
    """How a completion ended."""

    finished: Finished
    stop_string: str | None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a stream has for one write."""

    first_index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprobs]
    """One for each token, or none at all."""
    end: End | None
    """Set in the last piece."""
    pauses: bool
    """Whether the client is to hear, after all this, that nothing comes for a while."""


class Stream:
    """State of one stream; its methods never wait, but for `admitted`, `ready` and `write`."""

    def __init__(
        self,
        *,
        number: int,
        detokenizer: Detokenizer,
        scanner: StopScanner | None,
        min_tokens: int,
        stop_token_ids: frozenset[int],
        max_buffer_tokens: int,
        on_stop: Callable[[int, int], None],
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        """`on_stop(number, num_tokens)` is called when the text held a stop string.

        `on_event` is told what happens, but for the tokens: of these only the first.
        """
        self.number = number
        self.error: RequestError | None = None
        self._detokenizer = detokenizer
        self._scanner = scanner
        self._min_tokens = min_tokens
        self._stop_token_ids = stop_token_ids
        self._max_buffer_tokens = max_buffer_tokens
        self._on_stop = on_stop
        self._on_event = on_event
        self._next_token_means: tuple[Event, ...] = (Event.FIRST_TOKEN,)

        self.num_tokens = 0
        """Of the completion, as far as they came."""
        self._pending: list[int] = []
        self._pending_logprobs: list[TokenLogprobs] = []
        self._pending_text = ""
        self._stop_string: str | None = None
        self.num_cached_tokens: int | None = None
        """None: the request has no place so far."""
        self._finished: Finished | None = None
        self._pauses = False
        self.is_over = False
        """Whether the core is done with the request, or never took it."""

        self._waiter: asyncio.Future[None] | None = None
        self._writer: asyncio.Task[object] | None = None
        self._patience: asyncio.TimerHandle | None = None
        """Ends a write that begins or goes on when the completion is over."""

    def resume(self, beginning: Beginning, *, max_tokens: int) -> None:
        """Takes what the client has already; must come before anything from the core.

        If that is all of the completion, the stream is over. Raises InvalidRequest.
        """
        replayed = replay(
            beginning,
            detokenizer=self._detokenizer,
            scanner=self._scanner,
            stop_token_ids=self._stop_token_ids,
            min_tokens=self._min_tokens,
            max_tokens=max_tokens,
        )
        self.num_tokens = len(beginning.token_ids)
        self._pending_text = replayed.rest
        self._stop_string = replayed.stop_string
        if replayed.reason is not None:
            self.admit(0)
            self.finish(
                Finished(
                    stream=self.number,
                    reason=replayed.reason,
                    stop_token_id=replayed.stop_token_id,
                    num_completion_tokens=self.num_tokens,
                    queue_s=None,
                    prefill_s=None,
                    decode_s=None,
                )
            )

    # From the core ---------------------------------------------------------------------------

    def refuse(self, error: RequestError) -> None:
        """The core did not take the request, or is gone with it."""
        self.is_over = True
        self.fail(error)

    def admit(self, num_cached_tokens: int) -> None:
        """The request got its place."""
        self.num_cached_tokens = num_cached_tokens
        self._on_event(Event.ADMITTED)
        self._wake()

    def push(self, token: int, logprobs: TokenLogprobs | None) -> None:
        """The next token came."""
        if self._stop_string is not None or self.error is not None:
            return  # was under way when the stream ended
        self._pauses = False  # it was over before the client heard of it
        if self._next_token_means:
            self._tell_token()
        self.num_tokens += 1
        self._pending.append(token)
        if logprobs is not None:
            self._pending_logprobs.append(logprobs)
        if self._scanner is not None:
            self._scan(self._scanner, token)
        if len(self._pending) > self._max_buffer_tokens:
            self.fail(
                ClientTooSlow(
                    f"{self._max_buffer_tokens} tokens wait to be read; "
                    "this server keeps no more for a stream"
                )
            )
        elif self._waiter is not None:
            self._wake()

    def pause(self) -> None:
        """The model is lost; the stream goes on when it is loaded again."""
        if self.num_cached_tokens is None or self.is_over or self._stop_string is not None:
            return
        self._pauses = True
        self._on_event(Event.MODEL_LOST)
        if Event.RECOVERED not in self._next_token_means:
            self._next_token_means = (Event.RECOVERED, *self._next_token_means)
        self._wake()

    def preempt(self) -> None:
        """The request lost its place for a while; the stream goes on when it has one again."""
        self._on_event(Event.PREEMPTED)

    def finish(self, finished: Finished) -> None:
        """The core's last word on the request."""
        self._finished = finished
        self._pauses = False
        self.is_over = True
        if self.error is None:
            self._conclude(finished)
        if self._writer is not None:
            self._lose_patience(self._writer)
        self._wake()

    def fail(self, error: RequestError) -> None:
        """Ends the stream with an error, soon also out of a write that the client blocks."""
        if self.error is not None:
            return
        self.error = error
        if self._writer is not None:
            # A write that is only under way must end by itself: gRPC takes no status before.
            asyncio.get_running_loop().call_later(BLOCKED_WRITE_S, self._interrupt, self._writer)
        self._wake()

    def _tell_token(self) -> None:
        """Tells what a token means that is not just one more."""
        for event in self._next_token_means:
            self._on_event(event)
        self._next_token_means = ()

    def _interrupt(self, writer: asyncio.Task[object]) -> None:
        if self._writer is writer:
            writer.cancel()

    def _lose_patience(self, writer: asyncio.Task[object]) -> None:
        """From now on the write under way has an end, whether the client reads or not."""

        def give_up() -> None:
            if self._writer is writer:
                self.fail(ClientTooSlow(f"the rest is not read within {errors.UNREAD_S:g} s"))

        self._patience = asyncio.get_running_loop().call_later(errors.UNREAD_S, give_up)

    def _conclude(self, finished: Finished) -> None:
        if finished.reason is FinishReason.NO_ROOM:
            self.fail(Unavailable(NO_ROOM))
        elif finished.reason is FinishReason.DEADLINE:
            self.fail(DeadlinePassed())
        elif self.num_cached_tokens is None:
            self.fail(EndedByOperator())
        elif finished.reason is FinishReason.FAULT:
            self.fail(fault("the model's numbers are not finite", "MODEL_FAULT"))
        elif finished.reason is FinishReason.CRASH:
            self.fail(fault("the request broke its worker, also alone", "MODEL_CRASH"))
        elif self._stop_string is None and finished.num_completion_tokens != self.num_tokens:
            what = f"{self.num_tokens} of {finished.num_completion_tokens} tokens came"
            self.fail(fault(what, "TOKENS_LOST"))
        elif self._scanner is not None and self._stop_string is None:
            self._scan_text(self._scanner, self._detokenizer.flush())
            self._pending_text += self._scanner.flush()

    def _scan(self, scanner: StopScanner, token: int) -> None:
        if token in self._stop_token_ids:
            return
        self._scan_text(scanner, self._detokenizer.feed((token,)))
        if self._stop_string is not None:
            self._on_stop(self.number, self.num_tokens)

    def _scan_text(self, scanner: StopScanner, text: str) -> None:
        final, match = scanner.feed(text, may_stop=self.num_tokens >= self._min_tokens)
        self._pending_text += final
        self._stop_string = match

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # To the client ---------------------------------------------------------------------------

    async def admitted(self) -> int:
        """Waits for the place; returns num_cached_tokens. Raises the stream's error."""
        while self.error is None and self.num_cached_tokens is None:
            await self._wait()
        if self.error is not None:
            raise self.error
        assert self.num_cached_tokens is not None
        return self.num_cached_tokens

    async def ready(self) -> None:
        """Waits until there is something to write, or an error."""
        while self.error is None and not (self._pending or self._finished or self._pauses):
            await self._wait()

    def take(self) -> Piece:
        """Takes all that there is to write. Raises the stream's error."""
        if self.error is not None:
            raise self.error
        token_ids, self._pending = self._pending, []
        logprobs, self._pending_logprobs = self._pending_logprobs, []
        text = self._take_text(token_ids)
        pauses, self._pauses = self._pauses, False
        return Piece(
            first_index=self.num_tokens - len(token_ids),
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            end=self._end(),
            pauses=pauses,
        )

    def _take_text(self, token_ids: list[int]) -> str:
        """Returns the text that became final with the ids taken now."""
        text, self._pending_text = self._pending_text, ""
        if self._scanner is not None:
            return text
        if token_ids and token_ids[-1] in self._stop_token_ids:  # the core ends there
            token_ids = token_ids[:-1]
        text += self._detokenizer.feed(token_ids)
        return text if self._finished is None else text + self._detokenizer.flush()

    def _end(self) -> End | None:
        finished = self.finished
        return None if finished is None else End(finished=finished, stop_string=self._stop_string)

    @property
    def finished(self) -> Finished | None:
        """The core's last word on the request, as the text has it; None: it has not come."""
        if self._finished is None or self._stop_string is None:
            return self._finished
        return msgspec.structs.replace(  # the core may have gone on, or ended otherwise
            self._finished,
            reason=FinishReason.STOP_STRING,
            stop_token_id=None,
            num_completion_tokens=self.num_tokens,
        )

    async def write(self, write: Awaitable[None]) -> None:
        """Waits for a write to the client. Raises the stream's error if it ends meanwhile."""
        task = asyncio.current_task()
        self._writer = task
        if self.is_over and task is not None:
            self._lose_patience(task)
        try:
            await write
        except asyncio.CancelledError:
            if self.error is None or task is None or task.uncancel() > 0:
                raise
            raise self.error from None
        finally:
            self._writer = None
            if self._patience is not None:
                self._patience.cancel()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter
