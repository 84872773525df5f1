"""The core's I/O: one thread, two ROUTER sockets, and the decisions in between.

The order within a turn is what keeps the GPU busy: enter a step's result, plan
and send the next step, and only then hand the outputs on to the fronts.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any, assert_never

import msgspec
import zmq

from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.core import admission, applying, planning
from tokenloom.scheduler.core.progress import LoadingDisplay
from tokenloom.scheduler.core.state import Limits, ModelSpec, State
from tokenloom.scheduler.messages import (
    Abort,
    Attach,
    Commands,
    Inspect,
    Inspection,
    ModelLost,
    ModelReady,
    Stop,
    Submit,
    ToFront,
    decode_from_front,
    encode,
)
from tokenloom.wire import codec
from tokenloom.wire.messages import (
    PROTOCOL_VERSION,
    Configure,
    Failed,
    Hello,
    Progress,
    Ready,
    Shutdown,
    StepDone,
    ToWorker,
)
from tokenloom.wire.spin import Spin

log = logging.getLogger(__name__)

MAX_STEPS_IN_FLIGHT = 2
"""The worker always has the next step when it finishes one."""

DEPARTURE_S = 0.05
"""After a peer of the worker socket left, until the core looks whether it was the worker."""

SHUTDOWN_TIMEOUT_MS = 5000
"""A worker needs two steps at most to finish what is in flight."""


class CoreLoop:
    """Drives a State between the fronts' and the workers' sockets."""

    def __init__(
        self,
        config: SchedulerConfig,
        fronts: zmq.Socket[bytes],
        workers: zmq.Socket[bytes],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._fronts = fronts
        self._workers = workers
        self._clock = clock
        self._state = State(
            Limits(
                max_num_requests=config.max_num_requests,
                max_mixed_prompt_tokens=config.max_mixed_prompt_tokens,
                max_waiting_requests=config.max_waiting_requests,
                max_waiting_tokens=config.max_waiting_tokens,
                prefix_cache=config.prefix_cache,
            )
        )
        self._front_ids: dict[int, bytes] = {}
        """By the number that the state knows a front by; no number is used twice."""
        self._front_numbers: dict[bytes, int] = {}
        self._next_front = 0
        self._worker: bytes | None = None
        self._configure: Configure | None = None
        self._epoch = 0
        self._num_dropped_frames = 0
        self._display = LoadingDisplay()

    def run(self, stop_fd: int) -> None:
        """Serves until `stop_fd` becomes readable, then tells the worker to shut down."""
        departures = self._workers.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        poller = zmq.Poller()
        poller.register(departures, zmq.POLLIN)
        poller.register(self._fronts, zmq.POLLIN)
        poller.register(self._workers, zmq.POLLIN)
        poller.register(stop_fd, zmq.POLLIN)
        spin = Spin(self._config.spin_us)
        due_s: float | None = None
        while True:
            ready = _poll(poller, spin, due_s)
            if stop_fd in ready:
                break
            if self._workers in ready:
                spin.result()
                self._receive_from_workers()
            if due_s is not None and time.monotonic() >= due_s:
                due_s = None
                self._ask_worker()
            if departures in ready:
                # Who left is not said, and ROUTER forgets a peer a moment later than it tells.
                departures.recv_multipart()
                due_s = time.monotonic() + DEPARTURE_S
            if self._fronts in ready:
                self._receive_from_fronts()
            self._advance()
        if self._worker is not None:
            self._shut_down_worker(departures)
        self._workers.disable_monitor()
        departures.close(linger=0)

    def _advance(self) -> None:
        """Sends what steps there are to send, then what the fronts have to know."""
        while self._state.spec and len(self._state.in_flight) < MAX_STEPS_IN_FLIGHT:
            plan = planning.plan(self._state, self._clock())
            if plan is None or not self._send_to_worker(plan.to_wire(self._epoch)):
                break
        self._flush()

    def _flush(self) -> None:
        for front, outputs in self._state.take_outputs().items():
            if (identity := self._front_ids.get(front)) is not None:
                self._send_to_front(identity, outputs.packed())

    # Workers

    def _receive_from_workers(self) -> None:
        """Takes all frames that have come, one result a turn so that outputs stay in order."""
        while True:
            try:
                identity, *frames = self._workers.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = codec.decode_to_core(b"".join(frames))
            except codec.FrameError as error:
                self._drop(f"unreadable frame from a worker: {error}")
                continue
            match message:
                case Hello():
                    self._on_hello(identity, message)
                case _ if identity != self._worker or message.epoch != self._epoch:
                    self._drop(f"{type(message).__name__} of a stranger or another epoch")
                case StepDone():
                    self._on_step_done(message)
                    self._advance()
                case Progress():
                    self._display.show(message)
                case Ready():
                    self._on_ready(message)
                case Failed():
                    self._lose_worker(f"worker failed: {message.error}")
                case _:
                    assert_never(message)

    def _on_hello(self, identity: bytes, hello: Hello) -> None:
        """Gives a new worker its configuration; a second worker beside a live one is ignored."""
        if hello.protocol_version != PROTOCOL_VERSION:
            self._drop(
                f"worker {hello.pid} speaks protocol {hello.protocol_version}, "
                f"this core speaks {PROTOCOL_VERSION}"
            )
            return
        if self._worker is not None and self._configure is not None:
            alive = self._ask_worker()
            if identity == self._worker:
                return
            if alive:
                self._drop(f"Hello of worker {hello.pid} beside the one that serves")
                return
        self._epoch += 1
        self._worker = identity
        self._configure = Configure(
            epoch=self._epoch,
            rank=hello.rank,
            world_size=1,
            rendezvous="",
            model=self._config.model,
            dtype=self._config.dtype,
            quantize=self._config.quantize,
            quantize_lm_head=self._config.quantize_lm_head,
            int8_threshold=self._config.int8_threshold,
            kv_cache=self._config.kv_cache,
            max_model_tokens=self._config.max_model_tokens,
            max_num_requests=self._config.max_num_requests,
            max_step_tokens=self._config.max_step_tokens,
        )
        log.info("worker %d on %s joins epoch %d", hello.pid, hello.device, self._epoch)
        self._send_to_worker(self._configure)

    def _on_ready(self, ready: Ready) -> None:
        self._display.close()
        least = min(ready.num_blocks, ready.block_size, ready.vocab_size, ready.max_model_tokens)
        if least < 1 or ready.max_step_tokens < self._config.max_num_requests:
            self._dismiss_worker(f"worker is ready with too little to offer: {ready}")
            return
        spec = ModelSpec.of(ready)
        admission.begin_epoch(self._state, spec)
        log.info(
            "model is ready: weights %.2f GiB, KV cache %.2f GiB, %d blocks of %d positions, "
            "requests of up to %d tokens",
            ready.weights_bytes / 2**30,
            ready.kv_bytes / 2**30,
            ready.num_blocks,
            ready.block_size,
            spec.max_request_tokens,
        )
        for identity in list(self._front_ids.values()):
            self._send_to_front(identity, _model_ready(spec))

    def _on_step_done(self, done: StepDone) -> None:
        in_flight = self._state.in_flight
        if not in_flight or done.step_id != in_flight[0].step_id:
            self._drop(f"result of step {done.step_id}, which is not the oldest in flight")
            return
        try:
            applying.apply(self._state, done, self._clock())
        except applying.ResultError as error:
            self._dismiss_worker(f"worker broke the protocol: {error}")

    def _dismiss_worker(self, reason: str) -> None:
        """Ends the epoch and the worker: it would wait for steps and never greet again."""
        if self._send_to_worker(Shutdown()):
            self._lose_worker(reason)

    def _lose_worker(self, reason: str) -> None:
        """Ends the epoch; requests wait for the next worker."""
        log.error("%s", reason)
        self._display.close()
        self._worker = None
        self._configure = None
        self._epoch += 1
        admission.end_epoch(self._state)
        for identity in list(self._front_ids.values()):
            self._send_to_front(identity, ModelLost(reason="the worker is gone"))

    def _ask_worker(self) -> bool:
        """Returns whether the worker is still there; ends the epoch if it is not.

        To a live worker its own configuration again is no news; a dead one is unroutable.
        """
        return self._configure is not None and self._send_to_worker(self._configure)

    def _shut_down_worker(self, departures: zmq.Socket[bytes]) -> None:
        """Waits until the worker has left: what it has not read is lost when this socket closes."""
        while departures.poll(0):
            departures.recv_multipart()
        if self._send_to_worker(Shutdown()):
            departures.poll(SHUTDOWN_TIMEOUT_MS)

    def _send_to_worker(self, message: ToWorker) -> bool:
        """Sends to the worker; if it is no longer there, ends the epoch and returns False."""
        assert self._worker is not None
        try:
            self._workers.send_multipart([self._worker, codec.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in {zmq.EHOSTUNREACH, zmq.EAGAIN}:
                raise
            self._lose_worker(f"worker is unreachable: {error}")
            return False
        return True

    # Fronts

    def _receive_from_fronts(self) -> None:
        while True:
            try:
                identity, *frames = self._fronts.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = decode_from_front(b"".join(frames))
            except msgspec.DecodeError as error:
                self._drop(f"unreadable frame from a front: {error}")
                continue
            match message:
                case Attach():
                    self._attach(identity, message)
                case Commands():
                    self._execute(identity, message)
                case _:
                    assert_never(message)

    def _attach(self, identity: bytes, attach: Attach) -> None:
        if identity in self._front_numbers:
            # It lost the connection, and with it what it knew of its requests.
            self._forget_front(identity)
        self._front_numbers[identity] = self._next_front
        self._front_ids[self._next_front] = identity
        self._next_front += 1
        log.info("front %d attaches", attach.pid)
        if self._state.spec is not None:
            self._send_to_front(identity, _model_ready(self._state.spec))

    def _execute(self, identity: bytes, message: Commands) -> None:
        front = self._front_numbers.get(identity)
        if front is None:
            self._drop("commands of a front that did not attach")
            return
        now = self._clock()
        for command in message.commands:
            match command:
                case Submit():
                    admission.submit(self._state, front, command, now)
                case Abort():
                    admission.abort(self._state, front, command)
                case Stop():
                    admission.stop(self._state, front, command)
                case Inspect():
                    self._send_to_front(identity, self._inspection())
                case _:
                    assert_never(command)

    def _send_to_front(self, identity: bytes, message: ToFront) -> None:
        try:
            self._fronts.send_multipart([identity, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in {zmq.EHOSTUNREACH, zmq.EAGAIN}:
                raise
            self._forget_front(identity)

    def _forget_front(self, identity: bytes) -> None:
        """Ends the requests of a front that is gone: nobody reads them."""
        front = self._front_numbers.pop(identity)
        del self._front_ids[front]
        streams = [stream for owner, stream in self._state.requests if owner == front]
        if streams:
            log.error("a front is gone; its %d requests end", len(streams))
        for stream in streams:
            admission.abort(self._state, front, Abort(stream=stream))
        self._state.outputs.pop(front, None)

    def _inspection(self) -> Inspection:
        state = self._state
        return Inspection(
            epoch=self._epoch,
            num_waiting=len(state.waiting),
            num_running=state.num_running,
            num_blocks=0 if state.pool is None else state.pool.num_blocks,
            num_free_blocks=0 if state.pool is None else state.pool.num_free,
            num_cached_blocks=0 if state.pool is None else state.pool.num_cached,
            num_steps=state.next_step_id - 1,
            num_dropped_frames=self._num_dropped_frames,
            num_preemptions=state.num_preemptions,
            violations=tuple(state.check()),
        )

    def _drop(self, why: str) -> None:
        """Counts a frame that is not acted on; logs ever fewer of a flood."""
        self._num_dropped_frames += 1
        if self._num_dropped_frames.bit_count() == 1:
            log.warning("dropped frame %d: %s", self._num_dropped_frames, why)


def _poll(poller: zmq.Poller, spin: Spin, due_s: float | None) -> dict[Any, int]:
    """Returns what is readable, empty once `due_s` is there; sleeps unless results come fast."""
    while spin.goes_on():
        if ready := dict(poller.poll(0)):
            break
    else:
        left_s = None if due_s is None else max(0.0, due_s - time.monotonic())
        ready = dict(poller.poll(None if left_s is None else math.ceil(1000 * left_s)))
    return ready


def _model_ready(spec: ModelSpec) -> ModelReady:
    return ModelReady(
        epoch=spec.epoch,
        vocab_size=spec.vocab_size,
        max_model_tokens=spec.max_request_tokens,
        block_size=spec.block_size,
        num_blocks=spec.num_blocks,
        phases=spec.phases,
    )


def bind(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    """Returns a bound ROUTER socket that reports unroutable peers and refuses huge frames."""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.MAXMSGSIZE, codec.MAX_FRAME_BYTES)
    socket.setsockopt(zmq.LINGER, 1000)
    # Bounds are kept by admission and by two steps in flight, not by the socket.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.bind(endpoint)
    return socket
