"""Who comes to the workers' socket: who is let in over TCP, who was not, and who has left.

    worker ── handshake ──▶ ZeroMQ ── may this key come in? ──▶ Gate ── is it on the list?
           ◀── yes or no ──        ◀────────────────────────────

ZeroMQ's CURVE does the rest: both ends prove that they have their keys, and all they say is
encrypted. Only who knows the core's public key comes as far as the question. On the Unix socket
nobody is asked: its folder lets no other user in.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from tokenloom.scheduler.config import ConfigError
from tokenloom.wire.keys import PUBLIC_SUFFIX, KeyPair, read_key_pair, read_public_key

log = logging.getLogger(__name__)

_QUESTIONS = "inproc://zeromq.zap.01"
"""Where ZeroMQ asks about keys (RFC 27, ZAP)."""
_DOMAIN = b"workers"
_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_NO_HANDSHAKE = "a connection that does not speak ZeroMQ"
_MAX_REASONS = 1000
"""A stranger has as many keys as it likes."""
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _FAILED


@dataclass(frozen=True, kw_only=True)
class Keyring:
    """The core's own keys, and the workers' that may come in: public key → name."""

    own: KeyPair
    allowed: Mapping[bytes, str]


def read_keyring(own: Path, allowed: Path) -> Keyring:
    """Reads a file with the core's keys, and a folder of public keys.

    Raises ConfigError or KeyFileError.
    """
    files = sorted(allowed.glob(f"*{PUBLIC_SUFFIX}"))
    if not files:
        raise ConfigError(
            f"workers_allowed is {allowed}, where no file is called *{PUBLIC_SUFFIX}: "
            "no worker could join"
        )
    names = {read_public_key(file): file.stem for file in files}
    return Keyring(own=read_key_pair(own), allowed=names)


class Gate:
    """Watches the connections of the workers' socket, and opens it to TCP."""

    def __init__(self, workers: zmq.Socket[bytes]) -> None:
        self._workers = workers
        self._monitor: zmq.Socket[bytes] = workers.get_monitor_socket(_EVENTS)
        self._questions: zmq.Socket[bytes] | None = None
        """Only while TCP is open."""
        self._allowed: Mapping[bytes, str] = {}
        self._num_let_in = 0
        self._num_let_in_before: dict[int, int] = {}
        """By the descriptor of each connection: how many were let in before it came."""
        self._why = _NO_HANDSHAKE
        """What there is to tell of the next connection that ends before it was let in."""
        self._num_failures: Counter[str] = Counter()
        """By what was told of them."""

    def listen(self, endpoint: str, keyring: Keyring) -> None:
        """Lets workers come over TCP, too. Raises ConfigError."""
        self._allowed = keyring.allowed
        self._questions = self._workers.context.socket(zmq.REP)
        self._questions.setsockopt(zmq.LINGER, 0)
        self._questions.bind(_QUESTIONS)
        # These hold for what is bound from now on; the Unix socket stays as it is.
        self._workers.setsockopt(zmq.CURVE_SERVER, 1)
        self._workers.setsockopt(zmq.CURVE_SECRETKEY, keyring.own.secret)
        self._workers.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        self._workers.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # with nobody to ask, nobody comes in
        self._workers.setsockopt(zmq.IPV6, int("[" in endpoint))
        try:
            self._workers.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot listen for workers on {endpoint}: {error}") from error
        bound = self._workers.getsockopt_string(zmq.LAST_ENDPOINT)
        names = ", ".join(keyring.allowed.values())
        log.info("workers may join at %s with the keys of %s", bound, names)

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """What to poll."""
        return [self._monitor] if self._questions is None else [self._monitor, self._questions]

    def attend(self, ready: Collection[Any]) -> bool:
        """Takes one thing from each socket that is ready: nobody can hold up the core's turns.

        Returns whether somebody has left who may have been let in.
        """
        if self._questions is not None and self._questions in ready:
            self._answer(self._questions)
        return self._monitor in ready and self._take_event()

    def wait_for_departure(self, timeout_s: float) -> bool:
        """Returns whether somebody left, now or within the time, who may have been let in."""
        deadline_s = time.monotonic() + timeout_s
        while self._monitor.poll(max(0, round(1000 * (deadline_s - time.monotonic())))):
            if self._take_event():
                return True
        return False

    def close(self) -> None:
        """Ends the watch; the workers' socket is left to its owner."""
        self._workers.disable_monitor()
        self._monitor.close(linger=0)
        if self._questions is not None:
            self._questions.close()

    def _answer(self, questions: zmq.Socket[bytes]) -> None:
        version, number, _, address, _, _, key = questions.recv_multipart()
        name = self._allowed.get(z85.encode(key))
        if name is None:
            known = z85.encode(key).decode()
            self._warn(f"{address.decode()} has the key {known}, which is not among those allowed")
            verdict = (b"400", b"unknown key")
        else:
            log.info("the worker with the key of %s comes from %s", name, address.decode())
            verdict = (b"200", b"")
        questions.send_multipart([version, number, *verdict, b"", b""])

    def _take_event(self) -> bool:
        """Returns whether somebody has left, unless that one was surely never let in.

        ZeroMQ does not say who left, nor who was let in. But with its one thread, who came and
        left while nobody was let in was not.
        """
        event = recv_monitor_message(self._monitor)
        kind, value = event["event"], event["value"]
        if kind == zmq.EVENT_ACCEPTED:
            self._num_let_in_before[value] = self._num_let_in
        elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._num_let_in += 1
        elif kind == zmq.EVENT_DISCONNECTED:
            if self._num_let_in_before.pop(value, None) != self._num_let_in:
                return True
            why, self._why = self._why, _NO_HANDSHAKE
            if why:
                self._warn(why)
        else:
            self._why = _reason(kind, value)
        return False

    def _warn(self, why: str) -> None:
        """Tells of a connection that was not let in; ever fewer of many."""
        if len(self._num_failures) >= _MAX_REASONS:
            self._num_failures.clear()
        self._num_failures[why] += 1
        if self._num_failures[why].bit_count() == 1:
            log.warning("not let in, time %d: %s", self._num_failures[why], why)


def _reason(kind: int, value: int) -> str:
    """Returns what an event says of a handshake that failed."""
    match kind, value:
        case zmq.EVENT_HANDSHAKE_FAILED_AUTH, _:
            return ""  # the answer to the question about its key has told
        case _, zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
            return "a connection with wrong keys, such as the public one of another core"
        case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, _:
            return f"a connection that broke ZeroMQ's protocol ({value:#x})"
        case _:
            return f"a connection that ended in its handshake ({os.strerror(value)})"
