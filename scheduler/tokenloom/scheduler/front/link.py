"""The front's link to the core: one packed message a turn there, one a step back."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable
from typing import assert_never

import numpy as np
import zmq
import zmq.utils.monitor

from tokenloom.scheduler.front.errors import (
    Absence,
    Unavailable,
    fault_of,
    refusal_error,
)
from tokenloom.scheduler.front.streams import Stream
from tokenloom.scheduler.messages import (
    Abort,
    Aborted,
    Attach,
    Commands,
    Drained,
    Draining,
    Inspection,
    Load,
    ModelLost,
    ModelReady,
    Outputs,
    Ping,
    Pulse,
    Stop,
    Submit,
    ToFront,
    TraceData,
    decode_to_front,
    encode,
)

_log = logging.getLogger(__name__)


class CoreLink:
    """A DEALER socket in the event loop, and the streams that it feeds.

    The sockets' descriptors are watched with `add_reader`: ZeroMQ signals
    edges, so every wake-up, and every send, reads until nothing is left.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        on_model: Callable[[ModelReady | Absence], None],
        on_pulse: Callable[[Pulse], None],
        on_load: Callable[[Load], None],
        on_draining: Callable[[Draining], None],
    ) -> None:
        """`on_model` is told what the core serves, or why it serves nothing; `on_pulse`, its life.

        The latter is the answer to `ping`. `on_load` is told how busy it is, `on_draining` what an
        operator wants.
        """
        self._endpoint = endpoint
        self._on_model = on_model
        self._on_pulse = on_pulse
        self._on_load = on_load
        self._on_draining = on_draining
        self._streams: dict[int, Stream] = {}
        self._commands: list[Submit | Abort | Stop | Ping] = []
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes)
        self._socket.setsockopt(zmq.LINGER, 0)
        # A core that says something must not be made to drop it: what waits
        # here is bounded by the streams, whose buffers are.
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_attached = False
        self.load: Load | None = None
        """The last that the core told of how busy it is."""

    def open(self) -> None:
        """Connects; must run in the event loop. The core may come later."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._read)
        self._loop.add_reader(self._monitor.fileno(), self._read_monitor)
        self._socket.connect(self._endpoint)
        self._read_monitor()  # an edge from before the watch began is not signalled again

    def close(self) -> None:
        """Sends what is left and closes the sockets."""
        self._flush()
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_reader(self._monitor.fileno())
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=100)
        self._context.term()

    # Commands --------------------------------------------------------------------------------

    def submit(self, stream: Stream, submit: Submit) -> None:
        """Sends a request; from now on the stream is fed, until `release`."""
        self._streams[stream.number] = stream
        self._command(submit)

    def stop(self, number: int, num_tokens: int) -> None:
        """Ends a stream's request at a stop string."""
        self._command(Stop(stream=number, num_tokens=num_tokens))

    def ping(self) -> None:
        """Asks the core for a pulse, if there is one."""
        if self._is_attached:
            self._command(Ping())

    def release(self, stream: Stream) -> None:
        """Forgets a stream; its request is aborted if it still runs."""
        if self._streams.pop(stream.number, None) is not None and not stream.is_over:
            self._command(Abort(stream=stream.number))

    def fail_all(self, absence: Absence) -> None:
        """Ends all streams."""
        for stream in self._streams.values():
            stream.fail(Unavailable(absence))

    def _command(self, command: Submit | Abort | Stop | Ping) -> None:
        if not self._commands and self._loop is not None:
            self._loop.call_soon(self._flush)
        self._commands.append(command)

    def _flush(self) -> None:
        """Sends all commands of this turn of the event loop as one message."""
        if self._commands:
            commands, self._commands = tuple(self._commands), []
            self._send(Commands(commands=commands))

    def _send(self, message: Attach | Commands) -> None:
        if self._socket.closed:
            return
        self._socket.send(encode(message), zmq.NOBLOCK)
        self._read()  # a send may have swallowed the edge that signals input

    # Outputs ---------------------------------------------------------------------------------

    def _read(self) -> None:
        while not self._socket.closed and self._socket.poll(0):
            frame = self._socket.recv(zmq.NOBLOCK)
            try:
                self._apply(decode_to_front(frame))
            except Exception as error:  # noqa: BLE001 - the link outlives any one message
                fault_of(error)

    def _apply(self, message: ToFront) -> None:
        match message:
            case Outputs():
                self._apply_outputs(message)
            case ModelReady():
                self._on_model(message)
            case ModelLost():
                _log.warning("the model is lost: %s", message.reason)
                self._on_model(Absence(reason="MODEL_LOST", message="the model's worker is gone"))
                for stream in self._streams.values():
                    stream.pause()
            case Pulse():
                self._on_pulse(message)
            case Load():
                self.load = message
                self._on_load(message)
            case Draining():
                self._on_draining(message)
            case Inspection() | Drained() | Aborted() | TraceData():
                pass  # a front never asks
            case _:
                assert_never(message)

    def _apply_outputs(self, outputs: Outputs) -> None:
        streams = self._streams
        for refused in outputs.refused:
            if (stream := streams.get(refused.stream)) is not None:
                stream.refuse(refusal_error(refused))
        for admitted in outputs.admitted:
            if (stream := streams.get(admitted.stream)) is not None:
                stream.admit(admitted.num_cached_tokens)
        self._push_tokens(outputs)
        for finished in outputs.finished:
            if (stream := streams.get(finished.stream)) is not None:
                try:
                    stream.finish(finished)
                except Exception as error:  # noqa: BLE001 - one stream's error never ends another
                    stream.fail(fault_of(error))
        for number in outputs.preempted:
            if (stream := streams.get(number)) is not None:
                stream.preempt()

    def _push_tokens(self, outputs: Outputs) -> None:
        streams = self._streams
        logprobs = {entry.row: entry for entry in outputs.logprobs}
        numbers = np.frombuffer(outputs.streams, "<i8").tolist()
        tokens = np.frombuffer(outputs.tokens, "<i4").tolist()
        for row, (number, token) in enumerate(zip(numbers, tokens, strict=True)):
            stream = streams.get(number)
            if stream is None:
                continue  # left while the token was under way
            try:
                stream.push(token, logprobs.get(row))
            except Exception as error:  # noqa: BLE001 - as above
                stream.fail(fault_of(error))

    def _read_monitor(self) -> None:
        while not self._monitor.closed and self._monitor.poll(0):
            event = zmq.utils.monitor.parse_monitor_message(
                self._monitor.recv_multipart(zmq.NOBLOCK)
            )
            if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._send(Attach(pid=os.getpid()))
                self._is_attached = True
            elif event["event"] == zmq.EVENT_DISCONNECTED:
                self._lose_core()

    def _lose_core(self) -> None:
        _log.warning("the core at %s is gone", self._endpoint)
        self._is_attached = False
        absence = Absence(reason="CORE_LOST", message="the scheduler's core is gone")
        self._on_model(absence)
        for stream in self._streams.values():
            if not stream.is_over:
                stream.refuse(Unavailable(absence))
