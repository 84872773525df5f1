"""A core without a model: it answers fronts over real ZeroMQ with tokens that a test scripts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import zmq
import zmq.asyncio

from tokenloom.scheduler.messages import (
    Abort,
    Admitted,
    Attach,
    Commands,
    Finished,
    FinishReason,
    Inspect,
    ModelLost,
    ModelReady,
    Outputs,
    Ping,
    Pulse,
    Refused,
    Stop,
    Submit,
    ToFront,
    decode_from_front,
    encode,
)
from tokenloom.wire.messages import TokenLogprobs

READY = ModelReady(epoch=1, vocab_size=512, max_model_tokens=256, block_size=16, num_blocks=64)


@dataclass(kw_only=True)
class _Run:
    """A request on its way."""

    submit: Submit
    tokens: Sequence[int]
    num_sent: int = 0
    stop_at: int | None = None


def echo(submit: Submit) -> list[int]:
    """Returns the prompt's own tokens, again and again, up to max_tokens."""
    tokens = np.frombuffer(submit.tokens, "<i4").tolist()
    prompt = tokens[: len(tokens) - submit.num_completion_tokens]
    return [prompt[place % len(prompt)] for place in range(submit.max_tokens)]


class FakeCore:
    """Runs every request it gets, one token a step, unless told otherwise."""

    def __init__(self, endpoint: str) -> None:
        self.script: Callable[[Submit], Sequence[int]] = echo
        """The tokens of a request; it ends by LENGTH after the last."""
        self.answer: Callable[[Submit], Refused | None] = lambda _: None
        """The refusal of a request, if any."""
        self.is_admitting = True
        self.pause_after: int | None = None
        """No request gets more tokens than this, until it is None again."""
        self.stop_tokens = False
        """Whether a stop token ends a request, as in the real core."""
        self.end_early: tuple[int, FinishReason] | None = None
        """After how many tokens each request ends, and by what."""
        self.num_untold = 0
        """Tokens that a Finished counts and that were never sent."""
        self.step_s = 0.001
        self.pulse: Pulse | None = Pulse(stalled_s=0.0)
        """None: it does not answer a Ping."""
        self.submits: list[Submit] = []
        self.aborts: list[int] = []
        self.stops: list[Stop] = []
        self.num_messages = 0
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.bind(endpoint)
        self._fronts: list[bytes] = []
        self._runs: dict[int, _Run] = {}
        self._waiting: list[Submit] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._ready: ModelReady | None = READY

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._steps())]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close_socket()
        self._context.term()

    async def close_socket(self) -> None:
        """What a front sees of a core's death."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()

    @property
    def num_running(self) -> int:
        return len(self._runs)

    async def lose_model(self) -> None:
        self._ready = None
        await self._tell(ModelLost(reason="killed by a test"))

    async def load_model(self, ready: ModelReady = READY) -> None:
        self._ready = ready
        await self._tell(ready)

    async def end_waiting(self, reason: FinishReason) -> None:
        """Ends all requests that are not admitted."""
        waiting, self._waiting = self._waiting, []
        runs = [_Run(submit=submit, tokens=()) for submit in waiting]
        await self._tell(outputs(finished=[_finished(run, reason) for run in runs]))

    async def send_raw(self, frame: bytes) -> None:
        for front in self._fronts:
            await self._socket.send_multipart([front, frame])

    async def _tell(self, message: ToFront) -> None:
        await self.send_raw(encode(message))

    async def _receive(self) -> None:
        while True:
            identity, frame = await self._socket.recv_multipart()
            self.num_messages += 1
            message = decode_from_front(frame)
            match message:
                case Attach():
                    self._fronts = [identity]
                    if self._ready is not None:
                        await self._tell(self._ready)
                case Commands():
                    await self._execute(message)

    async def _execute(self, commands: Commands) -> None:
        refused, finished = [], []
        for command in commands.commands:
            match command:
                case Submit():
                    self.submits.append(command)
                    refusal = self.answer(command)
                    if refusal is None:
                        self._waiting.append(command)
                    else:
                        refused.append(refusal)
                case Abort():
                    self.aborts.append(command.stream)
                    if (run := self._runs.pop(command.stream, None)) is not None:
                        finished.append(_finished(run, FinishReason.CANCELLED))
                case Stop():
                    self.stops.append(command)
                    if (run := self._runs.get(command.stream)) is not None:
                        run.stop_at = command.num_tokens
                case Ping():
                    if self.pulse is not None:
                        await self._tell(self.pulse)
                case Inspect():
                    pass
        if refused or finished:
            await self._tell(outputs(refused=refused, finished=finished))

    async def _steps(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            await self._step()

    async def _step(self) -> None:
        admitted = []
        if self.is_admitting:
            for submit in self._waiting:
                tokens = self.script(submit)[submit.num_completion_tokens :]
                self._runs[submit.stream] = _Run(submit=submit, tokens=tokens)
                admitted.append(Admitted(stream=submit.stream, num_cached_tokens=3))
            self._waiting = []
        streams: list[int] = []
        drawn: list[int] = []
        logprobs: list[TokenLogprobs] = []
        finished: list[Finished] = []
        for number, run in list(self._runs.items()):
            reason = self._reason(run)
            if reason is None and self._may_run(run):
                token = run.tokens[run.num_sent]
                run.num_sent += 1
                if run.submit.sampling.num_top_logprobs is not None:
                    logprobs.append(_logprobs(len(drawn), run.submit))
                streams.append(number)
                drawn.append(token)
                reason = self._reason(run)
            if reason is not None:
                finished.append(_finished(run, reason, num_untold=self.num_untold))
                del self._runs[number]
        if admitted or streams or finished:
            await self._tell(
                outputs(
                    admitted=admitted,
                    streams=streams,
                    tokens=drawn,
                    logprobs=logprobs,
                    finished=finished,
                )
            )

    def _may_run(self, run: _Run) -> bool:
        return self.pause_after is None or run.num_sent < self.pause_after

    def _reason(self, run: _Run) -> FinishReason | None:
        stops = run.submit.sampling.stop_token_ids
        if run.stop_at is not None:
            return FinishReason.STOP_STRING
        if self.end_early is not None and run.num_sent >= self.end_early[0]:
            return self.end_early[1]
        if self.stop_tokens and run.num_sent and run.tokens[run.num_sent - 1] in stops:
            return FinishReason.STOP_TOKEN
        return FinishReason.LENGTH if run.num_sent == len(run.tokens) else None


def outputs(
    *,
    refused: Sequence[Refused] = (),
    admitted: Sequence[Admitted] = (),
    streams: Sequence[int] = (),
    tokens: Sequence[int] = (),
    logprobs: Sequence[TokenLogprobs] = (),
    finished: Sequence[Finished] = (),
) -> Outputs:
    return Outputs(
        refused=tuple(refused),
        admitted=tuple(admitted),
        streams=np.asarray(streams, "<i8").tobytes(),
        tokens=np.asarray(tokens, "<i4").tobytes(),
        logprobs=tuple(logprobs),
        finished=tuple(finished),
    )


def _finished(run: _Run, reason: FinishReason, *, num_untold: int = 0) -> Finished:
    is_stop = reason is FinishReason.STOP_TOKEN
    is_string = reason is FinishReason.STOP_STRING
    assert not is_string or run.stop_at is not None
    num_tokens = run.submit.num_completion_tokens + run.num_sent + num_untold
    return Finished(
        stream=run.submit.stream,
        reason=reason,
        stop_token_id=run.tokens[run.num_sent - 1] if is_stop else None,
        num_completion_tokens=run.stop_at if run.stop_at is not None else num_tokens,
        queue_s=0.25,
        prefill_s=0.5 if run.num_sent else None,
        decode_s=None,
        gpu_s=0.5,
        kv_block_s=3.0,
        num_recomputed_tokens=7,
        num_preemptions=1,
    )


def _logprobs(row: int, submit: Submit) -> TokenLogprobs:
    num_top = submit.sampling.num_top_logprobs or 0
    return TokenLogprobs(
        row=row,
        logprob=-0.5,
        top_ids=np.arange(num_top, dtype="<i4").tobytes(),
        top_logprobs=(-np.arange(num_top, dtype="<f4")).tobytes(),
    )
