"""Starts the processes of one machine, watches them, and ends them in order.

Children are given in stages, in the order in which they end; each may rely on those
of the stages after it. They start the other way round.

    stages     fronts ──▶ core ──▶ worker
    start        3          2        1
    end          1          2        3       each stage is waited for before the next

A child that dies by itself ends everything, and the exit code says so, unless it may be
started again. No child survives the supervisor, not even one that is killed.
"""

from __future__ import annotations

import ctypes
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

_PR_SET_PDEATHSIG = 1
"""<linux/prctl.h>: the signal that a process gets when its parent ends."""
_KILL_S = 5.0
"""How long anything may take to end once time is up, before it is killed."""
_FIRST_PAUSE_S = 0.1
"""Before a child that died starts again; each further death in a row doubles it."""
_MAX_DEATHS = 6
"""Of one child in a row; this many end everything."""
_STEADY_S = 30.0
"""A child that lived this long begins a new row of deaths."""
UNUSABLE_OPTIONS = 2
"""The exit code of a process that refuses its options or its configuration."""
_STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Child:
    """A process to supervise."""

    name: str
    argv: tuple[str, ...]
    stop_s: float
    """How long it may take to end after SIGTERM; then it is killed."""
    hurry_signal: signal.Signals = signal.SIGTERM
    """Ends it without its grace period."""
    restarts: bool = False
    """Whether the others go on when it dies, and it is started again."""


def supervise(stages: Sequence[Sequence[Child]]) -> int:
    """Runs the children until SIGTERM, SIGINT or a death; returns the exit code.

    The first signal ends the stages in order, each child within its `stop_s`; a
    second one hurries them. 0: all ended well when told; 2: a child ended by itself with
    2, as one does that cannot use its options; 1: anything else. Deaths after which a child
    is started again do not count.
    """
    with _wakeup() as wait:
        processes = _Processes(stages, wait)
        try:
            processes.start()
            dead = processes.wait_for_signal()
            if dead is not None:
                code = processes.forget(dead)
                processes.stop(in_hurry=True)
                return UNUSABLE_OPTIONS if code == UNUSABLE_OPTIONS else 1
            return 0 if processes.stop(in_hurry=False) else 1
        finally:
            processes.kill()


@contextmanager
def _wakeup() -> Iterator[Callable[[float | None], set[int]]]:
    """Yields `wait(timeout_s)`, which returns the numbers of signals that came."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    old_fd = signal.set_wakeup_fd(writer)
    numbers = (*_STOP_SIGNALS, signal.SIGCHLD)
    old_actions = {number: signal.signal(number, lambda *_: None) for number in numbers}

    def wait(timeout_s: float | None) -> set[int]:
        ready, _, _ = select.select([reader], [], [], timeout_s)
        return set(os.read(reader, 4096)) if ready else set()

    try:
        yield wait
    finally:
        for number, action in old_actions.items():
            signal.signal(number, action)
        signal.set_wakeup_fd(old_fd)
        os.close(reader)
        os.close(writer)


@dataclass(kw_only=True)
class _Deaths:
    """How often a child that may be started again has died in a row."""

    num: int = 0
    started_s: float = 0.0
    due_s: float | None = None
    """When it starts again; None: it runs."""


class _Processes:
    """The children's processes, in the order in which they end."""

    def __init__(
        self, stages: Sequence[Sequence[Child]], wait: Callable[[float | None], set[int]]
    ) -> None:
        self._stages = tuple(tuple(stage) for stage in stages)
        self._wait = wait
        self._running: dict[Child, subprocess.Popen[bytes]] = {}
        self._deaths = {child: _Deaths() for stage in stages for child in stage if child.restarts}
        self._before_exec = _die_with(os.getpid())

    def start(self) -> None:
        for stage in reversed(self._stages):
            for child in stage:
                self._start(child)

    def _start(self, child: Child) -> None:
        self._running[child] = subprocess.Popen(
            child.argv,
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C on the terminal goes to the supervisor alone
            preexec_fn=self._before_exec,  # noqa: PLW1509 - no thread runs here
        )
        if (deaths := self._deaths.get(child)) is not None:
            deaths.started_s, deaths.due_s = time.monotonic(), None

    def wait_for_signal(self) -> Child | None:
        """Waits for a signal to stop, or returns the first child whose death ends everything."""
        while True:
            for child, process in tuple(self._running.items()):
                if process.poll() is None:
                    continue
                pause_s = self._pause_s(child, process)
                if pause_s is None:
                    _log.error("%s %s; ending everything", child.name, _ending(process))
                    return child
                _log.error("%s %s; it starts again", child.name, _ending(process))
                del self._running[child]
                self._deaths[child].due_s = time.monotonic() + pause_s
            if self._wait(self._start_due()) & _STOP_SIGNALS:
                return None

    def _pause_s(self, child: Child, process: subprocess.Popen[bytes]) -> float | None:
        """Returns how long a child that died pauses; None: it does not start again."""
        deaths = self._deaths.get(child)
        if deaths is None or process.returncode == UNUSABLE_OPTIONS:
            return None
        if time.monotonic() - deaths.started_s >= _STEADY_S:
            deaths.num = 0
        deaths.num += 1
        return None if deaths.num >= _MAX_DEATHS else _FIRST_PAUSE_S * 2 ** (deaths.num - 1)

    def _start_due(self) -> float | None:
        """Starts what has paused long enough; returns the seconds until the next is due."""
        now_s = time.monotonic()
        left_s = []
        for child, deaths in self._deaths.items():
            if deaths.due_s is None:
                continue
            if deaths.due_s <= now_s:
                self._start(child)
            else:
                left_s.append(deaths.due_s - now_s)
        return min(left_s, default=None)

    def forget(self, dead: Child) -> int:
        """Leaves a child out that has died and was told of; returns its exit code."""
        return int(self._running.pop(dead).returncode)

    def stop(self, *, in_hurry: bool) -> bool:
        """Ends the stages in order; returns whether all children ended well, and in time."""
        all_well = True
        for stage in self._stages:
            children = [child for child in stage if child in self._running]
            in_hurry = self._stop(children, in_hurry=in_hurry)
            for child in children:
                process = self._running.pop(child)
                # One that has not come to install its handlers ends by the signal itself.
                if process.returncode not in {0, -signal.SIGTERM, -child.hurry_signal}:
                    _log.error("%s %s", child.name, _ending(process))
                    all_well = False
        return all_well

    def _stop(self, children: Sequence[Child], *, in_hurry: bool) -> bool:
        """Ends children together; returns whether there is a hurry by now."""
        deadlines = self._tell(children, in_hurry=in_hurry)
        while left := [child for child in children if self._running[child].poll() is None]:
            now_s = time.monotonic()
            for child in left:
                if deadlines[child] <= now_s:
                    _log.error("%s does not end; it is killed", child.name)
                    self._running[child].kill()
                    self._running[child].wait()
            wait_s = max(0.0, min(deadlines[child] for child in left) - now_s)
            if self._wait(wait_s) & _STOP_SIGNALS and not in_hurry:
                in_hurry = True
                deadlines = self._tell(left, in_hurry=True)
        return in_hurry

    def _tell(self, children: Sequence[Child], *, in_hurry: bool) -> dict[Child, float]:
        """Tells children to end; returns when each must have ended."""
        now_s = time.monotonic()
        for child in children:
            self._running[child].send_signal(child.hurry_signal if in_hurry else signal.SIGTERM)
        return {child: now_s + (_KILL_S if in_hurry else child.stop_s) for child in children}

    def kill(self) -> None:
        """Leaves nothing behind, whatever went wrong."""
        for process in self._running.values():
            process.kill()
            process.wait()


def _die_with(parent: int) -> Callable[[], None] | None:
    """Returns what a child runs before exec so that it does not outlive its parent."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork: there it could wait for a lock

    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return before_exec


def _ending(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code is not None and code < 0:
        return f"(pid {process.pid}) was killed by {signal.Signals(-code).name}"
    return f"(pid {process.pid}) exited with code {code}"
