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
from typing import TYPE_CHECKING, Protocol, assert_never

import msgspec

from tokenloom.wire.messages import (
    PROTOCOL_VERSION,
    Configure,
    Failed,
    Hello,
    Progress,
    Ready,
    Shutdown,
    Step,
    StepDone,
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


def serve(
    runner: Runner,
    *,
    core: CoreAddress,
    device: str,
    address: str = "",
    phases: Phases,
    spin_us: int | None = None,
) -> int:
    """Speaks with the core until Shutdown, SIGTERM or an error.

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
        code = _Conversation(link, runner, phases, Spin(spin_us), hello).run()
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
        self, link: Link, runner: Runner, phases: Phases, spin: Spin, hello: Hello
    ) -> None:
        self._link = link
        self._runner = runner
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
            message = self._link.receive()
            match message:
                case None:
                    failure = None
                    self._idle()
                case Configure():
                    failure = self._configure(message)
                case Step():
                    failure = self._launch(message)
                case Shutdown():
                    return self._send_results(wait=True) or EXIT_OK
                case _:
                    assert_never(message)
            if failure is not None:
                return failure

    def _idle(self) -> None:
        """Waits for a frame or a result, and for a core while there is none."""
        if self._spin.goes_on():
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


def _exit_at_once(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(EXIT_OK)
