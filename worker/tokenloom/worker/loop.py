"""The worker's conversation with the core, without a word about models.

    connect ─▶ Hello every second ─▶ Configure ─▶ Runner.configure ─▶ Ready
                    ▲                                                  │
                    └── disconnected ◀── Step … StepDone, two in flight┘

`serve` drives any Runner: the real one and the fake one speak through it.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol, assert_never

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from tokenloom.wire.codec import MAX_FRAME_BYTES, FrameError, decode_to_worker, encode
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
    ToCore,
    ToWorker,
)
from tokenloom.wire.spin import Spin
from tokenloom.worker.phases import Phases

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_log = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_STEP_FAILED = 1
EXIT_LOAD_FAILED = 2

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


class Link:
    """A DEALER socket to the core that notices when the core is gone."""

    def __init__(self, endpoint: str) -> None:
        self.num_dropped_frames = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        # Without a peer a send fails at once and nothing piles up for a core to come.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._socket.connect(endpoint)

    def send(self, message: ToCore) -> bool:
        """Sends a message; False when there is no core to take it."""
        try:
            self._socket.send(encode(message), zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def receive(self) -> ToWorker | None:
        """Returns the next message, None if there is none; drops what is no message."""
        while True:
            try:
                parts = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return None
            if len(parts) != 1:
                self.drop(f"a frame of {len(parts)} parts")
                continue
            try:
                return decode_to_worker(parts[0])
            except FrameError as error:
                self.drop(str(error))

    def drop(self, why: str) -> None:
        """Counts and logs a frame that is ignored."""
        self.num_dropped_frames += 1
        _log.warning("dropped frame %d: %s", self.num_dropped_frames, why)

    def wait(self, timeout_s: float) -> None:
        """Returns when a frame or a disconnection may be there, or after `timeout_s`."""
        if timeout_s >= 0.001:
            self._poller.poll(int(timeout_s * 1000))
        elif timeout_s > 0:
            # ZeroMQ counts in milliseconds; a shorter wait must not become a busy one.
            time.sleep(timeout_s)

    def take_disconnections(self) -> bool:
        """Returns whether the core was lost since the last call."""
        lost = False
        while self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            lost = True
        return lost

    def close(self, linger_ms: int = 0) -> None:
        """Closes the socket after at most `linger_ms` for what was sent."""
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger_ms)
        self._context.term()


def serve(
    runner: Runner,
    *,
    endpoint: str,
    rank: int,
    device: str,
    phases: Phases,
    address: str = "",
    spin_us: int | None = None,
) -> int:
    """Speaks with the core at `endpoint` until Shutdown, SIGTERM or an error.

    `phases` are those of the start; the core gets them with the first Ready. `address` is where
    the process listens for other ranks.
    While results follow each other within `spin_us` it does not sleep; None: as the host allows.

    Returns the exit code: 0 after Shutdown or SIGTERM, 1 after a step that
    failed, 2 when the configuration cannot be loaded. Runs in the main thread.
    """
    signal.signal(signal.SIGTERM, _exit_at_once)
    phases.begin("waiting for the core")
    link = Link(endpoint)
    linger_ms = 0
    try:
        conversation = _Conversation(
            link, runner, phases, Spin(spin_us), rank=rank, device=device, address=address
        )
        code = conversation.run()
        linger_ms = _FAILED_LINGER_MS
    finally:
        # Nothing is left to end, and an exiting interpreter would show the exception.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        link.close(linger_ms)
    return code


class _Conversation:
    def __init__(
        self,
        link: Link,
        runner: Runner,
        phases: Phases,
        spin: Spin,
        *,
        rank: int,
        device: str,
        address: str,
    ) -> None:
        self._link = link
        self._runner = runner
        self._phases: Phases | None = phases
        """Until the first epoch is ready."""
        self._spin = spin
        self._hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            rank=rank,
            pid=os.getpid(),
            device=device,
            address=address,
        )
        self._epoch: int | None = None
        """None while a Configure is awaited, of whatever epoch."""
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
            return self._fail(epoch, error, EXIT_LOAD_FAILED)
        self._epoch = epoch
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
            return self._fail(step.epoch, error, EXIT_STEP_FAILED)
        return None

    def _send_results(self, *, wait: bool = False) -> int | None:
        """Sends what is done, in the order of the steps; with `wait`, all that was launched."""
        while self._pending and (wait or self._remaining_s() <= 0):
            try:
                done = self._pending.popleft().result()
            except Exception as error:  # noqa: BLE001 - whatever it is, the core must hear of it
                return self._fail(self._epoch or 0, error, EXIT_STEP_FAILED)
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
