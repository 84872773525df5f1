"""Runs a load: starts its processes, gathers their records."""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

from tokenloom.client.bench.load import Run
from tokenloom.client.bench.process import work
from tokenloom.client.bench.record import Record

_HEAD_START_S = 0.1
"""So that the word to start is with each process before the start."""
_EXIT_TIMEOUT_S = 10.0


class BenchError(Exception):
    """A load could not be run; what the server refuses is no such error, it is counted."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What the processes of a run noted, in the order in which requests were sent."""

    records: tuple[Record, ...]
    client_cpu_s: float
    stopped_s: float
    """When the run was interrupted; inf: it was not."""


def measure(run: Run) -> Measurement:
    """Runs a load. Raises BenchError if it cannot be run.

    SIGINT, if this is the main thread, ends the run early: what was noted until then comes back.
    A second one raises KeyboardInterrupt.
    """
    stopped_s = math.inf
    clock_start_s = math.inf
    with ExitStack() as stack:
        on_interrupt = stack.enter_context(_interrupts())
        # The processes inherit that SIGINT is ignored: a terminal sends it to them too.
        workers = [stack.enter_context(_process(run, index)) for index in range(run.num_processes)]
        pipes = [pipe for _, pipe in workers]

        def stop() -> None:
            nonlocal stopped_s
            stopped_s = time.monotonic()
            for pipe in pipes:
                _tell(pipe, None)

        on_interrupt(stop)
        for worker in workers:
            _hear(worker)
        clock_start_s = time.monotonic() + _HEAD_START_S
        for pipe in pipes:
            _tell(pipe, clock_start_s)
        answers = [_hear(worker) for worker in workers]
    records = [Record.from_json(fields) for answer in answers for fields in answer["records"]]
    return Measurement(
        records=tuple(sorted(records, key=lambda record: record.sent_s)),
        client_cpu_s=sum(answer["cpu_s"] for answer in answers),
        stopped_s=max(0.0, stopped_s - clock_start_s),
    )


@contextmanager
def _process(run: Run, index: int) -> Iterator[tuple[SpawnProcess, Connection]]:
    context = multiprocessing.get_context("spawn")
    pipe, far_end = context.Pipe()
    process = context.Process(target=work, args=(run, index, far_end), daemon=True)
    try:
        process.start()
        far_end.close()  # so that a process that dies is seen as the end of its pipe
        yield process, pipe
    finally:
        pipe.close()
        process.join(_EXIT_TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()


def _hear(worker: tuple[SpawnProcess, Connection]) -> dict[str, Any]:
    """Returns the next message of a process. Raises BenchError if it failed or is gone."""
    process, pipe = worker
    try:
        message: dict[str, Any] = json.loads(pipe.recv_bytes())
    except (EOFError, OSError):
        process.join(_EXIT_TIMEOUT_S)
        raise BenchError(f"a process of the load ended with status {process.exitcode}") from None
    if "failure" in message:
        raise BenchError(message["failure"])
    return message


def _tell(pipe: Connection, start_s: float | None) -> None:
    """Tells a process when to start, or (None) to stop; one that has ended needs neither."""
    with suppress(OSError):
        pipe.send_bytes(json.dumps({"start_s": start_s}).encode())


@contextmanager
def _interrupts() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Ignores SIGINT until it is told what to do at the first; a second raises KeyboardInterrupt.

    A handler that does not raise leaves whole what is being read from a pipe.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda _stop: None
        return

    def on_interrupt(stop: Callable[[], None]) -> None:
        def handle(_signal: int, _frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            stop()

        signal.signal(signal.SIGINT, handle)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield on_interrupt
    finally:
        signal.signal(signal.SIGINT, before)
