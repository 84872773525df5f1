"""Starts the processes of one machine, watches them, and ends them in order.

Children are given in the order in which they end; each may rely on those
after it. They start the other way round.

    children   front ──▶ core ──▶ worker
    start        3         2        1
    end          1         2        3       each is waited for before the next

A child that dies by itself ends everything, and the exit code says so. No child
survives the supervisor, not even one that is killed.
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


def supervise(children: Sequence[Child]) -> int:
    """Runs the children until SIGTERM, SIGINT or the death of one; returns the exit code.

    The first signal ends the children in order, each within its `stop_s`; a
    second one hurries them. 0: all ended well when told; 2: a child ended by itself with
    2, as one does that cannot use its options; 1: anything else.
    """
    with _wakeup() as wait:
        processes = _Processes(children, wait)
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


class _Processes:
    """The children's processes, in the order in which they end."""

    def __init__(self, children: Sequence[Child], wait: Callable[[float | None], set[int]]) -> None:
        self._children = tuple(children)
        self._wait = wait
        self._running: dict[Child, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        before_exec = _die_with(os.getpid())
        for child in reversed(self._children):
            self._running[child] = subprocess.Popen(
                child.argv,
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C on the terminal goes to the supervisor alone
                preexec_fn=before_exec,  # noqa: PLW1509 - no thread runs here
            )

    def wait_for_signal(self) -> Child | None:
        """Waits for a signal to stop, or returns the first child that died."""
        while True:
            for child, process in self._running.items():
                if process.poll() is not None:
                    _log.error("%s %s; ending everything", child.name, _ending(process))
                    return child
            if self._wait(None) & _STOP_SIGNALS:
                return None

    def forget(self, dead: Child) -> int:
        """Leaves a child out that has died and was told of; returns its exit code."""
        return int(self._running.pop(dead).returncode)

    def stop(self, *, in_hurry: bool) -> bool:
        """Ends the children in order; returns whether all ended well, and in time."""
        all_well = True
        for child in self._children:
            process = self._running.get(child)
            if process is None:
                continue
            in_hurry = self._stop(child, process, in_hurry=in_hurry)
            # A process that has not come to install its handlers ends by the signal itself.
            if process.returncode not in {0, -signal.SIGTERM, -child.hurry_signal}:
                _log.error("%s %s", child.name, _ending(process))
                all_well = False
            del self._running[child]
        return all_well

    def _stop(self, child: Child, process: subprocess.Popen[bytes], *, in_hurry: bool) -> bool:
        """Ends one child; returns whether there is a hurry by now."""
        process.send_signal(child.hurry_signal if in_hurry else signal.SIGTERM)
        deadline = time.monotonic() + (_KILL_S if in_hurry else child.stop_s)
        while process.poll() is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                _log.error("%s does not end; it is killed", child.name)
                process.kill()
                process.wait()
            elif self._wait(left_s) & _STOP_SIGNALS and not in_hurry:
                in_hurry = True
                process.send_signal(child.hurry_signal)
                deadline = time.monotonic() + _KILL_S
        return in_hurry

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
