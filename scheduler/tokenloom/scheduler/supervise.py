"""Starts the processes of one machine, watches them, and ends them in order.

Children are given in stages, in the order in which they end; each may rely on those
of the stages after it. They start the other way round.

    stages     fronts ──▶ core ──▶ worker
    start        3          2        1
    end          1          2        3       each stage is waited for before the next

A child that dies by itself ends everything, and the exit code says so, unless it may be
started again. No child survives the supervisor, not even one that is killed.

A process that stands still dies only when its parent kills it. So a child that knows of others
tells on its standard output, a line each, what became of processes that it names by their ids:

    serving PID…   they are well: deaths before do not count any more
    lost PID…      those that are children here are killed, and so start again
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import IO, TypeAlias

_PR_SET_PDEATHSIG = 1
"""<linux/prctl.h>: the signal that a process gets when its parent ends."""
_KILL_S = 5.0
"""How long anything may take to end once time is up, before it is killed."""
_FIRST_PAUSE_S = 0.1
"""Before what died starts again; each further death in a row doubles it."""
_MAX_DEATHS = 6
"""Of the same in a row; this many end everything."""
_STEADY_S = 30.0
"""A child that starts again alone and lived this long begins a new row of deaths."""
UNUSABLE_OPTIONS = 2
"""The exit code of a process that refuses its options or its configuration."""
_STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})

_log = logging.getLogger(__name__)


class Restart(Enum):
    """What the death of a child means for the others."""

    NEVER = auto()
    """All end."""
    ALONE = auto()
    """They go on, and it starts again."""
    TOGETHER = auto()
    """The rest of its stage is killed, and all of the stage starts again; the others go on."""


@dataclass(frozen=True, kw_only=True)
class Child:
    """A process to supervise."""

    name: str
    argv: tuple[str, ...]
    stop_s: float
    """How long it may take to end after SIGTERM; then it is killed."""
    hurry_signal: signal.Signals = signal.SIGTERM
    """Ends it without its grace period."""
    restart: Restart = Restart.NEVER
    tells: bool = False
    """Whether its standard output says what became of others."""
    standby_argv: tuple[str, ...] = ()
    """Of a process that becomes this child when a line comes on its standard input, and ends when
    that is closed. One is kept once the child is said to serve, so that it starts again sooner."""


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
            code = processes.wait_for_signal()
            if code is not None:
                processes.stop(in_hurry=True)
                return code
            return 0 if processes.stop(in_hurry=False) else 1
        finally:
            processes.kill()


_Wait: TypeAlias = Callable[..., set[int]]


@contextmanager
def _wakeup() -> Iterator[_Wait]:
    """Yields `wait(timeout_s, *files)`, which returns the numbers of signals that came.

    It also returns when one of the files can be read.
    """
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    old_fd = signal.set_wakeup_fd(writer)
    numbers = (*_STOP_SIGNALS, signal.SIGCHLD)
    old_actions = {number: signal.signal(number, lambda *_: None) for number in numbers}

    def wait(timeout_s: float, *files: int) -> set[int]:
        timeout = None if timeout_s == math.inf else timeout_s
        ready, _, _ = select.select([reader, *files], [], [], timeout)
        return set(os.read(reader, 4096)) if reader in ready else set()

    try:
        yield wait
    finally:
        for number, action in old_actions.items():
            signal.signal(number, action)
        signal.set_wakeup_fd(old_fd)
        os.close(reader)
        os.close(writer)


@dataclass(kw_only=True, eq=False)
class _Unit:
    """Children that start again together, and how often they have died in a row."""

    children: tuple[Child, ...]
    num_deaths: int = 0
    started_s: float = 0.0
    due_s: float | None = None
    """When they start again; None: they run."""

    @property
    def restart(self) -> Restart:
        return self.children[0].restart


class _Processes:
    """The children's processes, in the order in which they end."""

    def __init__(self, stages: Sequence[Sequence[Child]], wait: _Wait) -> None:
        self._stages = tuple(tuple(stage) for stage in stages)
        self._wait = wait
        self._running: dict[Child, subprocess.Popen[bytes]] = {}
        self._standing_by: dict[Child, subprocess.Popen[bytes]] = {}
        self._units = [unit for stage in self._stages for unit in _units(stage)]
        self._told: dict[int, _Lines] = {}
        """What children tell, by the file that it comes from."""
        self._before_exec = _die_with(os.getpid())

    def start(self) -> None:
        for stage in reversed(self._stages):
            for child in stage:
                self._start(child)

    def _start(self, child: Child) -> None:
        process = self._woken(child)
        if process is None:
            process = self._spawn(child, child.argv)
        self._running[child] = process
        if process.stdout is not None:
            self._told[process.stdout.fileno()] = _Lines(process.stdout)

    def _spawn(
        self, child: Child, argv: Sequence[str], stdin: int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            argv,
            bufsize=0,
            stdin=stdin,
            stdout=subprocess.PIPE if child.tells else None,
            process_group=0,  # Ctrl-C on the terminal goes to the supervisor alone
            preexec_fn=self._before_exec,  # noqa: PLW1509 - no thread runs here
        )

    def _stand_by(self, child: Child) -> None:
        """Has a process stand by for a child, unless one does or none can."""
        process = self._standing_by.get(child)
        if child.standby_argv and (process is None or process.poll() is not None):
            self._standing_by[child] = self._spawn(child, child.standby_argv, subprocess.PIPE)

    def _woken(self, child: Child) -> subprocess.Popen[bytes] | None:
        """Returns the process that stood by for a child, which goes on now; None if none did."""
        process = self._standing_by.pop(child, None)
        if process is None or process.stdin is None or process.poll() is not None:
            return None
        try:
            with process.stdin as line:
                line.write(b"\n")
        except OSError:  # it dies just now
            process.kill()
            process.wait()
            return None
        return process

    def wait_for_signal(self) -> int | None:
        """Waits for a signal to stop, or for a death that ends everything.

        Returns the exit code that such a death means.
        """
        while True:
            if (code := self._look_after(self._units)) is not None:
                return code
            if self._wait(self._start_due(self._units), *self._told) & _STOP_SIGNALS:
                return None
            self._listen()

    def _look_after(self, units: Sequence[_Unit]) -> int | None:
        """Deals with deaths; returns the exit code if one of them ends everything."""
        for unit in units:
            if dead := self._dead(unit):
                self._bury(unit, dead)
                if (code := self._outcome(unit, dead)) is not None:
                    return code
        return None

    def _dead(self, unit: _Unit) -> dict[Child, subprocess.Popen[bytes]]:
        running = {child: self._running[child] for child in unit.children if child in self._running}
        return {child: each for child, each in running.items() if each.poll() is not None}

    def _bury(self, unit: _Unit, dead: dict[Child, subprocess.Popen[bytes]]) -> None:
        """Forgets those that died, and ends those that do not go on without them."""
        for child in unit.children:
            process = self._running.pop(child, None)
            if process is not None and child not in dead:
                process.kill()
                process.wait()

    def _outcome(self, unit: _Unit, dead: dict[Child, subprocess.Popen[bytes]]) -> int | None:
        """Returns the exit code if a death ends everything; else the unit will start again."""
        now_s = time.monotonic()
        # Those that start together take long to load: they are well when somebody says so.
        if unit.restart is Restart.ALONE and now_s - unit.started_s >= _STEADY_S:
            unit.num_deaths = 0
        unit.num_deaths += 1
        is_unusable = any(process.returncode == UNUSABLE_OPTIONS for process in dead.values())
        restarts = (
            unit.restart is not Restart.NEVER and not is_unusable and unit.num_deaths < _MAX_DEATHS
        )
        outcome = "it starts again" if restarts else "ending everything"
        for child, process in dead.items():
            _log.error("%s %s; %s", child.name, _ending(process), outcome)
        if restarts:
            unit.due_s = now_s + _FIRST_PAUSE_S * 2 ** (unit.num_deaths - 1)
            return None
        return UNUSABLE_OPTIONS if is_unusable else 1

    def _start_due(self, units: Sequence[_Unit]) -> float:
        """Starts what has paused long enough; returns the seconds until the next is due."""
        now_s = time.monotonic()
        left_s = []
        for unit in units:
            if unit.due_s is None:
                continue
            if unit.due_s <= now_s:
                unit.started_s, unit.due_s = now_s, None
                for child in unit.children:
                    self._start(child)
            else:
                left_s.append(unit.due_s - now_s)
        return min(left_s, default=math.inf)

    def _listen(self) -> None:
        """Acts on what children tell of others."""
        for file, lines in tuple(self._told.items()):
            for line in lines.read():
                self._act(line)
            if lines.is_over:
                del self._told[file]

    def _act(self, line: str) -> None:
        word, *pids = line.split()
        for unit in self._units:
            for child in unit.children:
                process = self._running.get(child)
                if unit.restart is not Restart.TOGETHER or process is None:
                    continue
                if str(process.pid) not in pids:
                    continue
                match word:
                    case "serving":
                        unit.num_deaths = 0
                        self._stand_by(child)
                    case "lost":
                        process.kill()
                    case _:
                        _log.warning("%r tells nothing of processes", line)

    def stop(self, *, in_hurry: bool) -> bool:
        """Ends the stages in order; returns whether all children ended well, and in time."""
        all_well = True
        # The first has a grace period, in which it needs the others; once it is gone nobody does.
        needed = [unit for unit in self._units if unit.children[0] not in self._stages[0]]
        for stage in self._stages:
            children = [child for child in stage if child in self._running]
            in_hurry, are_served = self._stop(children, needed, in_hurry=in_hurry)
            all_well &= are_served
            needed = []
            for child in children:
                process = self._running.pop(child)
                # One that has not come to install its handlers ends by the signal itself.
                if process.returncode not in {0, -signal.SIGTERM, -child.hurry_signal}:
                    _log.error("%s %s", child.name, _ending(process))
                    all_well = False
        return all_well

    def _stop(
        self, children: Sequence[Child], needed: Sequence[_Unit], *, in_hurry: bool
    ) -> tuple[bool, bool]:
        """Ends children together, and looks after those that they need unless there is a hurry.

        Returns whether there is one by now, and whether none of those was lost for good.
        """
        deadlines = self._tell(children, in_hurry=in_hurry)
        are_served = True
        while left := [child for child in children if self._running[child].poll() is None]:
            now_s = time.monotonic()
            for child in left:
                if deadlines[child] <= now_s:
                    _log.error("%s does not end; it is killed", child.name)
                    self._running[child].kill()
                    self._running[child].wait()
            wait_s = max(0.0, min(deadlines[child] for child in left) - now_s)
            told: Iterable[int] = ()
            if needed and not in_hurry:
                if self._look_after(needed) is not None:
                    in_hurry, are_served = True, False
                    deadlines = self._tell(left, in_hurry=True)
                    continue
                self._listen()
                wait_s = min(wait_s, self._start_due(needed))
                told = self._told
            if self._wait(wait_s, *told) & _STOP_SIGNALS and not in_hurry:
                in_hurry = True
                deadlines = self._tell(left, in_hurry=True)
        return in_hurry, are_served

    def _tell(self, children: Sequence[Child], *, in_hurry: bool) -> dict[Child, float]:
        """Tells children to end; returns when each must have ended."""
        now_s = time.monotonic()
        for child in children:
            self._running[child].send_signal(child.hurry_signal if in_hurry else signal.SIGTERM)
        return {child: now_s + (_KILL_S if in_hurry else child.stop_s) for child in children}

    def kill(self) -> None:
        """Leaves nothing behind, whatever went wrong."""
        for process in (*self._running.values(), *self._standing_by.values()):
            process.kill()
            process.wait()


def _units(stage: Sequence[Child]) -> list[_Unit]:
    """Returns the children of a stage by who starts again with whom."""
    alone = [_Unit(children=(child,)) for child in stage if child.restart is not Restart.TOGETHER]
    together = tuple(child for child in stage if child.restart is Restart.TOGETHER)
    return [*alone, _Unit(children=together)] if together else alone


class _Lines:
    """Whole lines out of a pipe, as far as they have come."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._rest = b""
        self.is_over = False
        os.set_blocking(pipe.fileno(), False)

    def read(self) -> list[str]:
        """Returns the lines that are there; at the end the pipe is closed."""
        try:
            data = os.read(self._pipe.fileno(), 65536)
        except BlockingIOError:
            return []
        if not data:
            self.is_over = True
            self._pipe.close()
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines if line.strip()]


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
