"""The worker's conversation with the core, without a word about models.

    connect ─▶ Hello every second ─▶ Configure ─▶ Runner.configure ─▶ Ready
                    ▲                                                  │
                    └── disconnected ◀── Step … StepDone, two in flight┘

`serve` drives any Runner: the real one and the fake one speak through it. All ranks of a group
compute the same steps; rank 0 alone tells their results.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, assert_never

import msgspec

from tokenloom.wire.messages import (
    PROTOCOL_VERSION,
    Configure,
    Failed,
    Hello,
    Profile,
    Progress,
    Ready,
    Shutdown,
    Step,
    StepDone,
    Trace,
)
from tokenloom.wire.spin import Spin
from tokenloom.worker.errors import LinkError, LoadError
from tokenloom.worker.link import CoreAddress, Link
from tokenloom.worker.phases import Phases

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_log = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_CRASHED = 1
"""Another start may help."""
EXIT_LOAD_FAILED = 2
"""No start will help: an option, a key or the checkpoint cannot be used."""

HELLO_INTERVAL_S = 1.0
MAX_TRACE_BYTES = 64 * 1024 * 1024
"""A larger recording is not sent: some hundred steps of a large model are smaller."""
_PIECE_BYTES = 256 * 1024
_FAILED_LINGER_MS = 2000
"""How long the last word of a failing worker may take to leave."""


class Pending(Protocol):
    """A step that was launched."""

    def remaining_s(self) -> float:
        """Returns a guess of the seconds until the result is there; 0: it is there."""

    def result(self) -> StepDone:
        """Returns the result, waiting for it if need be."""


class Runner(Protocol):
    """What computes. All calls come from one thread."""

    def configure(self, configure: Configure, report: Callable[[str, float], None]) -> Ready:
        """Loads the model, or forgets all requests if it is loaded already.

        `report` takes a phase and a fraction in [0, 1]. Raises LoadError.
        """

    def launch(self, step: Step) -> Pending:
        """Starts a step and returns without waiting for it, where the device allows.

        Steps follow each other in the order of the calls. Raises ProtocolError.
        """


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Recorded steps as a gzip file in Chrome's trace event format, or why there is none."""

    data: bytes = b""
    error: str = ""


class Recorder(Protocol):
    """What can record the steps of the runner. All calls come from its thread."""

    def record(self, num_steps: int) -> None:
        """Records steps from the next one on; 0 forgets what is being recorded."""

    def take(self) -> Recording | None:
        """Returns what was recorded, once it is whole; None: there is nothing yet."""


def serve(
    runner: Runner,
    *,
    recorder: Recorder | None = None,
    core: CoreAddress,
    device: str,
    address: str = "",
    phases: Phases,
    spin_us: int | None = None,
) -> int:
    """Speaks with the core until Shutdown, SIGTERM or an error.

    `recorder` answers who wants to see steps; without one there is nothing to see.
    `address` is where this process listens for other ranks; without one it can serve alone.
    `phases` are those of the start; the core gets them with the first Ready.
    While results follow each other within `spin_us` it does not sleep; None: as the host allows.

    Returns the exit code: 0 after Shutdown or SIGTERM, 2 after a LoadError or if the core does
    not let this process in, 1 after whatever else went wrong in loading or in a step. Runs in the
    main thread.
    """
    signal.signal(signal.SIGTERM, _exit_at_once)
    phases.begin("waiting for the core")
    try:
        link = Link(core)
    except LinkError as error:
        return _refused(error)
    linger_ms = 0
    try:
        hello = Hello(
            protocol_version=PROTOCOL_VERSION, pid=os.getpid(), device=device, address=address
        )
        recordings = _Recordings(link, recorder)
        code = _Conversation(link, runner, recordings, phases, Spin(spin_us), hello).run()
        linger_ms = _FAILED_LINGER_MS
    except LinkError as error:
        code = _refused(error)
    finally:
        # Nothing is left to end, and an exiting interpreter would show the exception.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        link.close(linger_ms)
    return code


def _refused(error: LinkError) -> int:
    _log.error("%s", error)
    return EXIT_LOAD_FAILED


class _Conversation:
    def __init__(
        self,
        link: Link,
        runner: Runner,
        recordings: _Recordings,
        phases: Phases,
        spin: Spin,
        hello: Hello,
    ) -> None:
        self._link = link
        self._runner = runner
        self._recordings = recordings
        self._phases: Phases | None = phases
        """Until the first epoch is ready."""
        self._spin = spin
        self._hello = hello
        self._epoch: int | None = None
        """None while a Configure is awaited, of whatever epoch."""
        self._rank = 0
        self._hello_due_s = 0.0
        self._pending: deque[Pending] = deque()

    def run(self) -> int:
        """Returns the exit code."""
        while True:
            failure = self._send_results()
            if failure is not None:
                return failure
            self._recordings.send_piece()
            message = self._link.receive()
            match message:
                case None:
                    failure = None
                    self._idle()
                case Configure():
                    failure = self._configure(message)
                case Step():
                    failure = self._launch(message)
                case Profile():
                    if message.epoch == self._epoch:
                        self._recordings.begin(message)
                case Shutdown():
                    return self._send_results(wait=True) or EXIT_OK
                case _:
                    assert_never(message)
            if failure is not None:
                return failure

    def _idle(self) -> None:
        """Waits for a frame or a result, and for a core while there is none."""
        if self._spin.goes_on() or self._recordings.has_more:
            return
        if self._link.take_disconnections() and self._epoch is not None:
            _log.warning("the core is gone; waiting for another")
            self._epoch = None
            self._pending.clear()
        if self._pending:
            self._link.wait(self._remaining_s())
        elif self._epoch is not None:
            self._link.wait(HELLO_INTERVAL_S)
        else:
            self._greet()

    def _greet(self) -> None:
        now_s = time.monotonic()
        if now_s < self._hello_due_s:
            self._link.wait(max(0.001, self._hello_due_s - now_s))
            return
        # With nobody there yet, look again soon; after that a core has a second to answer.
        sent = self._link.send(self._hello)
        self._hello_due_s = now_s + (HELLO_INTERVAL_S if sent else HELLO_INTERVAL_S / 20)

    def _configure(self, configure: Configure) -> int | None:
        if configure.epoch == self._epoch:  # the core asks whether this worker lives
            return None
        if self._epoch is not None and configure.epoch < self._epoch:
            self._link.drop(f"Configure of epoch {configure.epoch} in epoch {self._epoch}")
            return None
        self._pending.clear()
        self._recordings.forget()
        epoch = configure.epoch
        phases = self._phases or Phases("configuring", time.monotonic())

        def report(phase: str, fraction: float) -> None:
            phases.begin(phase)
            self._link.send(Progress(epoch=epoch, phase=phase, fraction=fraction))

        try:
            ready = self._runner.configure(configure, report)
        except Exception as error:  # noqa: BLE001 - whatever it is, the core must hear of it
            code = EXIT_LOAD_FAILED if isinstance(error, LoadError) else EXIT_CRASHED
            return self._fail(epoch, error, code)
        self._epoch, self._rank = epoch, configure.rank
        self._phases = None
        self._link.send(msgspec.structs.replace(ready, phases=phases.end()))
        return None

    def _launch(self, step: Step) -> int | None:
        if step.epoch != self._epoch:
            self._link.drop(f"step {step.step_id} of epoch {step.epoch} in epoch {self._epoch}")
            return None
        try:
            self._pending.append(self._runner.launch(step))
        except Exception as error:  # noqa: BLE001 - whatever it is, the core must hear of it
            return self._fail(step.epoch, error, EXIT_CRASHED)
        return None

    def _send_results(self, *, wait: bool = False) -> int | None:
        """Takes what is done, in the order of the steps; with `wait`, all that was launched.

        The core hears of it from rank 0, whose results are every rank's.
        """
        while self._pending and (wait or self._remaining_s() <= 0):
            try:
                done = self._pending.popleft().result()
            except Exception as error:  # noqa: BLE001 - whatever it is, the core must hear of it
                return self._fail(self._epoch or 0, error, EXIT_CRASHED)
            if self._rank == 0:
                self._link.send(done)
            self._spin.result()
        return None

    def _remaining_s(self) -> float:
        """Returns a guess of the seconds until the oldest step in flight has its result."""
        try:
            return self._pending[0].remaining_s()
        except Exception:  # noqa: BLE001 - the result will say what went wrong on the device
            return 0.0

    def _fail(self, epoch: int, error: Exception, code: int) -> int:
        _log.error("epoch %d cannot go on", epoch, exc_info=error)
        self._link.send(Failed(epoch=epoch, error=f"{type(error).__name__}: {error}"))
        return code


class _Recordings:
    """What was recorded, on its way to the core: a piece a turn, for results go first."""

    def __init__(self, link: Link, recorder: Recorder | None) -> None:
        self._link = link
        self._recorder = recorder
        self._asked = Profile(epoch=0, number=0, num_steps=0)
        self._is_wanted = False
        self._pieces: deque[Trace] = deque()

    @property
    def has_more(self) -> bool:
        """Whether there is a piece to send."""
        return bool(self._pieces)

    def begin(self, profile: Profile) -> None:
        """Records steps, or no longer."""
        self._pieces.clear()
        self._asked = profile
        if self._recorder is None:
            unable = Recording(error="this worker cannot record its steps")
            self._pieces.extend(_pieces(profile, unable))
            return
        self._recorder.record(profile.num_steps)
        self._is_wanted = profile.num_steps > 0

    def forget(self) -> None:
        """Another epoch: nobody waits for this any more."""
        self._pieces.clear()
        if self._recorder is not None and self._is_wanted:
            self._recorder.record(0)
        self._is_wanted = False

    def send_piece(self) -> None:
        """Sends the next piece, if there is one."""
        if self._is_wanted and self._recorder is not None:
            recording = self._recorder.take()
            if recording is not None:
                self._is_wanted = False
                self._pieces.extend(_pieces(self._asked, recording))
        if self._pieces:
            self._link.send(self._pieces.popleft())


def _pieces(asked: Profile, recording: Recording) -> list[Trace]:
    def piece(data: bytes, *, is_last: bool, error: str = "") -> Trace:
        return Trace(
            epoch=asked.epoch, number=asked.number, data=data, is_last=is_last, error=error
        )

    data, error = recording.data, recording.error
    if len(data) > MAX_TRACE_BYTES:
        error = f"the trace has {len(data)} bytes; at most {MAX_TRACE_BYTES} are sent"
    if error:
        return [piece(b"", is_last=True, error=error)]
    return [
        piece(data[start : start + _PIECE_BYTES], is_last=start + _PIECE_BYTES >= len(data))
        for start in range(0, len(data), _PIECE_BYTES)
    ]


def _exit_at_once(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(EXIT_OK)
