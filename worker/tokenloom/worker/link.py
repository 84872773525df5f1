"""A worker's connection to the core, over a Unix socket or, with keys, over TCP."""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from tokenloom.wire.codec import MAX_FRAME_BYTES, FrameError, decode_to_worker, encode
from tokenloom.wire.keys import KeyFileError, KeyPair, read_key_pair, read_public_key
from tokenloom.wire.messages import ToCore, ToWorker
from tokenloom.worker.errors import LinkError, LoadError

_log = logging.getLogger(__name__)

SILENCE_S = 10.0
"""A core on another host that answers nothing for so long is gone."""
_TCP = "tcp://"
_EVENTS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What a worker proves itself with over TCP, and what the core does."""

    own: KeyPair
    core: bytes
    """The core's public key."""


@dataclass(frozen=True, kw_only=True)
class CoreAddress:
    """Where the core is, as ZeroMQ writes it, and how it is known."""

    endpoint: str
    keys: Keys | None = None
    """Over TCP."""


def add_link_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options out of which `core_address` makes the core's address."""
    parser.add_argument(
        "--connect",
        required=True,
        metavar="ENDPOINT",
        help="where the core listens, as ZeroMQ writes it: ipc:///run/tokenloom/worker.sock, or "
        "tcp://HOST:PORT with keys",
    )
    parser.add_argument(
        "--server-key",
        type=Path,
        metavar="FILE",
        help="over TCP: the scheduler's public key, NAME.key of `tokenloom keys`",
    )
    parser.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="over TCP: this worker's key pair, NAME.key_secret of `tokenloom keys`",
    )


def core_address(args: argparse.Namespace) -> CoreAddress:
    """Returns the core's address, with the keys out of the files that are given.

    Raises LoadError for TCP without keys, keys without TCP, and files that have none.
    """
    endpoint: str = args.connect
    if not endpoint.startswith(_TCP):
        if args.server_key or args.key:
            raise LoadError(f"{endpoint} takes no keys: --server-key and --key are for {_TCP}")
        return CoreAddress(endpoint=endpoint)
    if args.server_key is None or args.key is None:
        raise LoadError(
            f"{endpoint} takes keys: --server-key, the scheduler's NAME.key, and --key, this "
            "worker's NAME.key_secret; `tokenloom keys` makes them"
        )
    try:
        keys = Keys(own=read_key_pair(args.key), core=read_public_key(args.server_key))
    except KeyFileError as error:
        raise LoadError(str(error)) from error
    return CoreAddress(endpoint=endpoint, keys=keys)


class Link:
    """A DEALER socket to the core that notices when the core is gone, or does not want it."""

    def __init__(self, core: CoreAddress) -> None:
        """Connects in the background. Raises LinkError if there can be no such connection."""
        self.num_dropped_frames = 0
        self._endpoint = core.endpoint
        self._num_failed_handshakes = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        # Without a peer a send fails at once and nothing piles up for a core to come.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._socket.setsockopt(zmq.IPV6, int("[" in core.endpoint))
        try:
            if core.keys is not None:
                # A host that is gone closes no connection.
                self._socket.setsockopt(zmq.HEARTBEAT_IVL, round(1000 * SILENCE_S / 3))
                self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(1000 * SILENCE_S))
                self._socket.setsockopt(zmq.CURVE_SERVERKEY, core.keys.core)
                self._socket.setsockopt(zmq.CURVE_PUBLICKEY, core.keys.own.public)
                self._socket.setsockopt(zmq.CURVE_SECRETKEY, core.keys.own.secret)
            self._socket.connect(core.endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise LinkError(f"there is no connecting to {core.endpoint}: {error}") from error

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
        """Returns whether the core was lost since the last call.

        Raises LinkError if it does not let this process in, and never will.
        """
        lost = False
        while self._monitor.poll(0):
            match recv_monitor_message(self._monitor)["event"]:
                case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    raise LinkError(
                        f"the core at {self._endpoint} does not allow this worker's key"
                    )
                case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                    raise LinkError(f"what listens at {self._endpoint} is no core that takes keys")
                case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                    self._note_failed_handshake()
                case _:
                    lost = True
        return lost

    def _note_failed_handshake(self) -> None:
        """Tells of it, ever less often: it is tried again, for the core may just have ended."""
        self._num_failed_handshakes += 1
        if self._num_failed_handshakes.bit_count() == 1:
            _log.warning(
                "%s broke off handshake %d, as one does to which --server-key does not belong",
                self._endpoint,
                self._num_failed_handshakes,
            )

    def close(self, linger_ms: int = 0) -> None:
        """Closes the socket after at most `linger_ms` for what was sent."""
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger_ms)
        self._context.term()
