"""One process of a load: sends its share and notes what comes.

parent                              process
  │── spawn with the run ─────────────▶│ connects, builds the requests that are known
  │◀───────────────────────── ready ───│
  │── start, on the host's clock ─────▶│ sends and reads …
  │── stop (Ctrl-C), or gone ─────────▶│ … cuts off what runs
  │◀────────────────── its records ────│
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from multiprocessing.connection import Connection
from typing import assert_never

from tokenloom.client.bench.grpc_calls import GrpcCaller
from tokenloom.client.bench.load import Grpc, OpenAI, Run
from tokenloom.client.bench.openai import OpenAICaller
from tokenloom.client.bench.record import Caller, CallFailed, Clock, Record, Send
from tokenloom.client.bench.workload import Request
from tokenloom.client.errors import TokenloomError

_PAUSE_AFTER_ERROR_S = 0.1


def work(run: Run, process: int, pipe: Connection) -> None:
    """Does the share of one process. The pipe carries JSON both ways."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the parent that says when to stop
    with (
        # Without a parent there is nobody who wants the records.
        contextlib.suppress(EOFError, BrokenPipeError),
        asyncio.Runner(loop_factory=_loop_factory()) as runner,
    ):
        runner.run(_converse(run, process, pipe))


async def _converse(run: Run, process: int, pipe: Connection) -> None:
    try:
        async with _caller(run) as caller:
            share = Share(run, process, caller)
            pipe.send_bytes(json.dumps({"ready": True}).encode())
            start_s = json.loads(await asyncio.to_thread(pipe.recv_bytes))["start_s"]
            if start_s is not None:
                await _until_stopped(share.send_all(Clock(start_s)), pipe)
            answer = {
                "records": [vars(record) for record in share.records],
                "cpu_s": share.cpu_s(),
            }
    except TokenloomError as error:
        answer = {"failure": str(error)}
    pipe.send_bytes(json.dumps(answer).encode())


async def _until_stopped(sending: Coroutine[None, None, None], pipe: Connection) -> None:
    """Runs a coroutine; cancels it as soon as the parent says something more, or is gone."""
    task = asyncio.create_task(sending)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_reader(pipe.fileno())
        task.cancel()

    loop.add_reader(pipe.fileno(), stop)
    try:
        with contextlib.suppress(asyncio.CancelledError):  # nobody else cancels it
            await task
    finally:
        loop.remove_reader(pipe.fileno())
        os.set_blocking(pipe.fileno(), True)  # uvloop has turned it off


def _caller(run: Run) -> Caller:
    match run.endpoint:
        case Grpc():
            return GrpcCaller(
                run.endpoint,
                ignore_eos=run.ignore_eos,
                temperature=run.temperature,
                timeout_s=run.timeout_s,
            )
        case OpenAI():
            return OpenAICaller(
                run.endpoint,
                ignore_eos=run.ignore_eos,
                temperature=run.temperature,
                timeout_s=run.timeout_s,
            )
        case _:
            assert_never(run.endpoint)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Returns uvloop's where it is installed; it takes less of the CPU that is measured."""
    try:
        import uvloop  # noqa: PLC0415 - only the load's processes need it, if it is there
    except ImportError:
        return None
    return uvloop.new_event_loop


class Share:
    """The requests of one process: each index that leaves its number as the remainder."""

    def __init__(self, run: Run, process: int, caller: Caller) -> None:
        self.records: list[Record] = []
        self._run = run
        self._process = process
        self._caller = caller
        self._cpu_marks_s: list[float] = []
        # What is known beforehand is built beforehand, so it takes nothing from the run.
        self._indices = self._all_indices()
        self._prepared: dict[int, tuple[Send, Request]] = {}
        if run.num_requests is not None:
            self._prepared = {index: self._prepare(index) for index in self._all_indices()}

    async def send_all(self, clock: Clock) -> None:
        """Sends the share and returns when all of it has ended. Cancelling cuts it off."""
        run = self._run
        loop = asyncio.get_running_loop()
        loop.call_later(max(0.0, run.warmup_s - clock.now_s()), self._mark_cpu)
        if run.end_s is not None:
            loop.call_later(max(0.0, run.end_s - clock.now_s()), self._mark_cpu)
        await clock.sleep_until(0.0)
        async with asyncio.TaskGroup() as group:
            if run.arrivals_s is None:
                for _ in range(run.num_streams(self._process)):
                    group.create_task(self._keep_sending(clock))
                return
            for index in self._indices:
                due_s = run.arrivals_s[index]
                await clock.sleep_until(due_s)
                group.create_task(self._send(index, due_s, clock))

    def cpu_s(self) -> float:
        """Returns the CPU seconds of this process in the measured time, which may not be over."""
        marks_s = [*self._cpu_marks_s, time.process_time()]
        return marks_s[1] - marks_s[0] if len(marks_s) > 1 else 0.0

    async def _keep_sending(self, clock: Clock) -> None:
        end_s = self._run.end_s
        for index in self._indices:  # one iterator for all streams: each takes the next
            if end_s is not None and clock.now_s() >= end_s:
                return
            if not await self._send(index, None, clock):
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)

    async def _send(self, index: int, due_s: float | None, clock: Clock) -> bool:
        """Sends one request and reads it to its end; returns whether it ended well."""
        prepared = self._prepared.pop(index) if index in self._prepared else self._prepare(index)
        send, request = prepared
        now_s = clock.now_s()
        record = Record(
            index=index,
            due_s=now_s if due_s is None else due_s,
            sent_s=now_s,
            num_asked_tokens=request.max_tokens,
            # Of a text the server tells the number.
            num_prompt_tokens=0 if isinstance(request.prompt, str) else len(request.prompt),
        )
        self.records.append(record)
        try:
            await send(record, clock)
        except CallFailed as error:
            record.error = (error.code, error.reason)
            return False
        record.end_s = clock.now_s()
        return True

    def _prepare(self, index: int) -> tuple[Send, Request]:
        request = self._run.source.request(index)
        return self._caller.prepare(request), request

    def _all_indices(self) -> Iterator[int]:
        run = self._run
        if run.num_requests is None:
            return itertools.count(self._process, run.num_processes)
        return iter(range(self._process, run.num_requests, run.num_processes))

    def _mark_cpu(self) -> None:
        self._cpu_marks_s.append(time.process_time())
