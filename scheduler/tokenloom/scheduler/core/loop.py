"""The core's I/O: one thread, two ROUTER sockets, and the decisions in between.

The order within a turn is what keeps the GPU busy: enter a step's result, plan
and send the next step, and only then hand the outputs on to the fronts.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, assert_never

import msgspec
import zmq

from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.core import admission, applying, crashes, planning, timeliness
from tokenloom.scheduler.core.gate import Gate
from tokenloom.scheduler.core.group import Group, GroupError
from tokenloom.scheduler.core.load import LoadPace, load_of
from tokenloom.scheduler.core.metering import samples_of
from tokenloom.scheduler.core.operators import Operators
from tokenloom.scheduler.core.progress import LoadingDisplay
from tokenloom.scheduler.core.state import Limits, ModelSpec, State
from tokenloom.scheduler.core.watch import StallWatch, StepWatch
from tokenloom.scheduler.messages import (
    Abort,
    AbortNamed,
    Attach,
    Commands,
    Drain,
    Inspect,
    Inspection,
    ModelLost,
    ModelReady,
    Ping,
    Profile,
    Pulse,
    Stop,
    Submit,
    ToFront,
    decode_from_front,
    encode,
)
from tokenloom.scheduler.sample_files import SampleFile
from tokenloom.scheduler.samples import Sample
from tokenloom.scheduler.tenants import TenantsFile
from tokenloom.wire import codec
from tokenloom.wire import messages as wire
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
    Trace,
)
from tokenloom.wire.spin import Spin

log = logging.getLogger(__name__)

MAX_STEPS_IN_FLIGHT = 2
"""The worker always has the next step when it finishes one."""

MAX_SLEEP_S = 3600.0
"""What is later than this does not fit into every clock."""

DEPARTURE_S = 0.05
"""After a peer of the worker socket left, until the core looks whether it was a rank."""

SHUTDOWN_TIMEOUT_S = 5.0
"""A worker needs two steps at most to finish what is in flight."""

LOOK_EVERY_S = 1.0
"""At the file of the tenants."""

NUM_HEARTBEATS = 3
"""A worker that answers none of so many is lost."""


class TooManyCrashesError(Exception):
    """Groups are lost faster than is worth starting others."""


class CoreLoop:
    """Drives a State between the fronts' and the workers' sockets."""

    def __init__(
        self,
        config: SchedulerConfig,
        fronts: zmq.Socket[bytes],
        workers: zmq.Socket[bytes],
        gate: Gate,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._fronts = fronts
        self._workers = workers
        self._gate = gate
        self._clock = clock
        self._state = State(
            Limits(
                max_num_requests=config.max_num_requests,
                max_mixed_prompt_tokens=config.max_mixed_prompt_tokens,
                max_waiting_requests=config.max_waiting_requests,
                max_waiting_tokens=config.max_waiting_tokens,
                max_waiting_bytes=config.max_waiting_bytes,
                deadline_admission=config.deadline_admission,
                prefix_cache=config.prefix_cache,
                tenant_stretch=config.tenant_stretch,
            )
        )
        self._tenants = TenantsFile(Path(config.tenants)) if config.tenants else None
        self._next_look_s = -math.inf
        """When the file of the tenants is to be looked at again."""
        self._front_ids: dict[int, bytes] = {}
        """By the number that the state knows a front by; no number is used twice."""
        self._front_numbers: dict[bytes, int] = {}
        self._next_front = 0
        self._operators = Operators(self._state, self._send_to_front)
        self._group = Group(config.tensor_parallel)
        self._epoch = int(1000 * time.time())
        """Grows over the lives of cores, too: workers that outlive one join the next, and names of
        older epochs are still in their stores. No core has an epoch each millisecond."""
        self._watch = StepWatch(config.step_timeout_s)
        self._stalls = StallWatch()
        self._pace = LoadPace()
        self._samples: SampleFile | None = None
        if config.metrics_listen:
            self._samples = SampleFile(Path(config.metrics_dir), "core")
        self._budget = crashes.CrashBudget(
            max_crashes=config.max_crashes, window_s=config.crash_window_s
        )
        self._num_dropped_frames = 0
        self._display = LoadingDisplay()

    def run(self, stop_fd: int) -> None:
        """Serves until `stop_fd` becomes readable, then tells the workers to shut down.

        Raises TooManyCrashesError.
        """
        poller = zmq.Poller()
        for socket in self._gate.sockets:
            poller.register(socket, zmq.POLLIN)
        poller.register(self._fronts, zmq.POLLIN)
        poller.register(self._workers, zmq.POLLIN)
        poller.register(stop_fd, zmq.POLLIN)
        spin = Spin(self._config.spin_us)
        ask_s = math.inf
        while True:
            due_s = min(ask_s, self._watch.due_s, self._pace.due_s, self._state.deadlines.next_s)
            ready = _poll(poller, spin, due_s - self._clock())
            if stop_fd in ready:
                break
            if ready:
                self._pace.note()
            if self._workers in ready:
                spin.result()
                self._receive_from_workers()
            if self._clock() >= ask_s:
                ask_s = math.inf
                self._ask_group()
            if self._gate.attend(ready):
                # ROUTER forgets a peer a moment later than it tells.
                ask_s = self._clock() + DEPARTURE_S
            if self._watch.is_overdue(self._clock()):
                step_id = self._state.in_flight[0].step_id
                self._lose_group(f"step {step_id} does not end")
            self._follow_tenants()
            if self._fronts in ready:
                self._receive_from_fronts()
            self._advance()
            if self._clock() >= self._pace.due_s:
                self._tell_load()
        if self._samples is not None:
            self._samples.close(self._measured(), self._clock())
        self._shut_down_group()

    def _advance(self) -> None:
        """Sends what steps there are to send, then what the fronts have to know."""
        timeliness.expire(self._state, self._clock())
        while self._state.spec and len(self._state.in_flight) < MAX_STEPS_IN_FLIGHT:
            now = self._clock()
            plan = planning.plan(self._state, now)
            if plan is None or not self._send_to_group(plan.to_wire(self._epoch)):
                break
            self._watch.sent(
                num_spans=len(plan.span_slots), num_tokens=int(plan.span_lengths.sum()), now=now
            )
        has_work = self._state.spec is not None and bool(self._state.requests)
        self._stalls.look(stalls=has_work and not self._state.in_flight, now=self._clock())
        self._flush()

    def _follow_tenants(self) -> None:
        """Takes over what the file of the tenants says, before the requests of this turn."""
        now = self._clock()
        if self._tenants is None or now < self._next_look_s:
            return
        if self._tenants.refresh() or self._next_look_s == -math.inf:
            self._state.set_tenants(self._tenants.tenants.by_name, now)
        self._next_look_s = now + LOOK_EVERY_S

    def _flush(self) -> None:
        for front, outputs in self._state.take_outputs().items():
            if (identity := self._front_ids.get(front)) is not None:
                self._send_to_front(identity, outputs.packed())
        self._operators.look()

    def _tell_load(self) -> None:
        """Tells all fronts how busy the core is."""
        load = load_of(self._state)
        for identity in list(self._front_ids.values()):
            self._send_to_front(identity, load)
        now = self._clock()
        self._pace.tell(now)
        if self._samples is not None and self._samples.is_due(now):
            self._samples.write(self._measured(), now)

    def _measured(self) -> Iterator[Sample]:
        """Returns the core's part of the metrics."""
        ranks = [rank.ready for rank in self._group.ranks if rank.ready is not None]
        return samples_of(self._state, ranks)

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
            if isinstance(message, Hello):
                self._on_hello(identity, message)
                continue
            rank = self._group.index(identity)
            if rank is None or not self._group.is_complete or message.epoch != self._epoch:
                self._drop(f"{type(message).__name__} of a stranger or another epoch")
                continue
            match message:
                case StepDone():
                    self._on_step_done(rank, message)
                    self._advance()
                case Progress():
                    if rank == 0:  # the others do the same at about the same time
                        self._display.show(message)
                case Ready():
                    self._on_ready(rank, message)
                case Failed():
                    self._lose_group(f"rank {rank} failed: {message.error}")
                case Trace():
                    self._operators.pass_on(rank, message)
                case _:
                    assert_never(message)

    def _on_hello(self, identity: bytes, hello: Hello) -> None:
        """Takes a new worker into the group that is gathered; beside a live one it is ignored."""
        if hello.protocol_version != PROTOCOL_VERSION:
            self._drop(
                f"worker {hello.pid} speaks protocol {hello.protocol_version}, "
                f"this core speaks {PROTOCOL_VERSION}"
            )
            return
        if self._group.is_complete:
            is_member = self._group.index(identity) is not None
            is_alive = self._ask_group()
            if is_alive and not is_member:
                self._drop(f"Hello of worker {hello.pid} beside the group that serves")
            if is_alive or is_member:
                return
        group = self._group
        if not group.join(identity, hello):
            return
        log.info("worker %d on %s is rank %d", hello.pid, hello.device, len(group.ranks) - 1)
        if group.is_complete:
            self._epoch += 1
            log.info("epoch %d begins", self._epoch)
            self._ask_group()

    def _configuration(self, rank: int) -> Configure:
        config = self._config
        return Configure(
            epoch=self._epoch,
            rank=rank,
            world_size=self._group.world_size,
            rendezvous=self._group.rendezvous,
            model=config.model,
            dtype=config.dtype,
            quantize=config.quantize,
            quantize_lm_head=config.quantize_lm_head,
            int8_threshold=config.int8_threshold,
            kv_cache=config.kv_cache,
            max_model_tokens=config.max_model_tokens,
            max_num_requests=config.max_num_requests,
            max_step_tokens=config.max_step_tokens,
        )

    def _on_ready(self, rank: int, ready: Ready) -> None:
        try:
            offer = self._group.enter(rank, ready)
        except GroupError as error:
            self._lose_group(str(error))
            return
        if offer is None:
            return
        self._display.close()
        least = min(offer.num_blocks, offer.block_size, offer.vocab_size, offer.max_model_tokens)
        if least < 1 or offer.max_step_tokens < self._config.max_num_requests:
            self._lose_group(f"the group is ready with too little to offer: {offer}")
            return
        spec = ModelSpec.of(offer, num_ranks=self._group.world_size)
        admission.begin_epoch(self._state, spec)
        self._state.totals.begin_epoch(self._clock())
        _tell_supervisor("serving", self._group.pids)
        log.info(
            "model is ready: weights %.2f GiB, KV cache %.2f GiB, %d blocks of %d positions, "
            "requests of up to %d tokens",
            offer.weights_bytes / 2**30,
            offer.kv_bytes / 2**30,
            offer.num_blocks,
            offer.block_size,
            spec.max_request_tokens,
        )
        for identity in list(self._front_ids.values()):
            self._send_to_front(identity, _model_ready(spec))

    def _on_step_done(self, rank: int, done: StepDone) -> None:
        in_flight = self._state.in_flight
        if rank or not in_flight or done.step_id != in_flight[0].step_id:
            self._drop(f"result of step {done.step_id}, which is not the oldest in flight")
            return
        now = self._clock()
        try:
            applying.apply(self._state, done, now)
        except applying.ResultError as error:
            self._lose_group(f"rank 0 broke the protocol: {error}")
        else:
            self._watch.done(now)

    def _lose_group(self, reason: str) -> None:
        """Ends the epoch and the group; requests wait for the next one.

        Raises TooManyCrashesError if there will be none.
        """
        group, self._group = self._group, Group(self._config.tensor_parallel)
        log.error("epoch %d ends: %s", self._epoch, reason)
        self._display.close()
        self._watch = StepWatch(self._config.step_timeout_s)
        for rank in group.ranks:  # those who can still hear it would wait for steps
            self._reach(rank.identity, codec.encode(Shutdown()))
        _tell_supervisor("lost", group.pids)
        if self._state.spec is not None:
            self._state.totals.lose_group(self._clock())
        crashes.lose_group(self._state)
        self._flush()  # what came before the loss, before the word of it
        for identity in list(self._front_ids.values()):
            self._send_to_front(identity, ModelLost(reason=reason))
        if self._budget.spend(self._clock()):
            raise TooManyCrashesError(
                f"{self._budget.max_crashes + 1} groups of workers were lost within "
                f"{self._budget.window_s:g} s, the last one because {reason}; "
                f"at most {self._budget.max_crashes} may be"
            )

    def _ask_group(self) -> bool:
        """Returns whether all ranks are still there; what is left is ended if they are not.

        To a live worker its own configuration again is no news; a dead one is unroutable. Before
        the group is complete nobody has one, and who lives says Hello again.
        """
        group = self._group
        if not group.is_complete:
            if group.ranks:  # who left may stand still, and keep the others waiting for ever
                _tell_supervisor("lost", group.pids)
            group.ranks.clear()
            return False
        for index, rank in enumerate(group.ranks):
            if not self._reach(rank.identity, codec.encode(self._configuration(index))):
                self._lose_group(f"rank {index} is gone")
                return False
        return True

    def _shut_down_group(self) -> None:
        """Waits until the workers have left: what they have not read is lost with this socket."""
        while self._gate.wait_for_departure(0):
            pass
        deadline_s = self._clock() + SHUTDOWN_TIMEOUT_S
        left = [r for r in self._group.ranks if self._reach(r.identity, codec.encode(Shutdown()))]
        for _ in left:
            if not self._gate.wait_for_departure(deadline_s - self._clock()):
                break

    def _send_to_group(self, message: ToWorker) -> bool:
        """Sends the same frame to all ranks; if one is gone, ends the epoch and returns False."""
        frame = codec.encode(message)
        for index, rank in enumerate(self._group.ranks):
            if not self._reach(rank.identity, frame):
                self._lose_group(f"rank {index} is gone")
                return False
        return True

    def _reach(self, identity: bytes, frame: bytes) -> bool:
        """Sends a frame; returns whether there was somebody to send it to."""
        try:
            self._workers.send_multipart([identity, frame], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in {zmq.EHOSTUNREACH, zmq.EAGAIN}:
                raise
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
                case Drain():
                    self._operators.drain(identity, message, list(self._front_ids.values()))
                case AbortNamed():
                    self._operators.abort(identity, message)
                case Profile():
                    self._profile(identity, message)
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
        self._operators.greet(identity)  # first: it must not seem ready for a moment
        if self._state.spec is not None:
            self._send_to_front(identity, _model_ready(self._state.spec))

    def _profile(self, identity: bytes, profile: Profile) -> None:
        """Asks all ranks to record. Where there is no group, who asks has heard of it."""
        if self._state.spec is not None:
            self._operators.profile(identity)
            self._send_to_group(
                wire.Profile(epoch=self._epoch, number=profile.number, num_steps=profile.num_steps)
            )

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
                case Ping():
                    self._send_to_front(identity, Pulse(stalled_s=self._stalls.stalled_s(now)))
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
            pids=tuple(self._group.pids),
            num_waiting=len(state.waiting),
            num_running=state.num_running,
            num_blocks=0 if state.pool is None else state.pool.num_blocks,
            num_free_blocks=0 if state.pool is None else state.pool.num_free,
            num_cached_blocks=0 if state.pool is None else state.pool.num_cached,
            num_steps=state.next_step_id - 1,
            num_dropped_frames=self._num_dropped_frames,
            num_preemptions=state.totals.num_preemptions,
            violations=tuple(state.check()),
        )

    def _drop(self, why: str) -> None:
        """Counts a frame that is not acted on; logs ever fewer of a flood."""
        self._num_dropped_frames += 1
        if self._num_dropped_frames.bit_count() == 1:
            log.warning("dropped frame %d: %s", self._num_dropped_frames, why)


def _poll(poller: zmq.Poller, spin: Spin, left_s: float) -> dict[Any, int]:
    """Returns what is readable, empty after `left_s`; sleeps unless results come fast."""
    while spin.goes_on():
        if ready := dict(poller.poll(0)):
            return ready
    left_s = min(left_s, MAX_SLEEP_S)
    return dict(poller.poll(max(0, math.ceil(1000 * left_s))))


def _tell_supervisor(word: str, pids: list[int]) -> None:
    """Writes what became of processes to standard output, where who started them listens."""
    sys.stdout.write(" ".join((word, *map(str, pids))) + "\n")
    sys.stdout.flush()


def _model_ready(spec: ModelSpec) -> ModelReady:
    return ModelReady(
        epoch=spec.epoch,
        vocab_size=spec.vocab_size,
        max_model_tokens=spec.max_request_tokens,
        block_size=spec.block_size,
        num_blocks=spec.num_blocks,
        phases=spec.phases,
        fingerprint=spec.fingerprint,
    )


def bind(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: str,
    *,
    heartbeat_timeout_s: float | None = None,
) -> zmq.Socket[bytes]:
    """Returns a bound ROUTER socket that reports unroutable peers and refuses huge frames.

    With a time-out a peer whose process stands still, or whose host is gone, counts as departed.
    """
    socket = context.socket(zmq.ROUTER)
    if heartbeat_timeout_s is not None:
        timeout_ms = round(1000 * heartbeat_timeout_s)
        socket.setsockopt(zmq.HEARTBEAT_IVL, max(1, timeout_ms // NUM_HEARTBEATS))
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, timeout_ms)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.MAXMSGSIZE, codec.MAX_FRAME_BYTES)
    socket.setsockopt(zmq.LINGER, 1000)
    # Bounds are kept by admission and by two steps in flight, not by the socket.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.bind(endpoint)
    return socket
