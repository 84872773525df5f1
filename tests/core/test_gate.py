"""The port where workers of other hosts join, over real sockets: who is on the list comes in."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest
import zmq

from tests.core.keys import Place
from tests.core.processes import ENVIRONMENT, TIMEOUT_S, CoreProcess, FrontSocket, submit
from tests.e2e.server import wait_until
from tokenloom.wire import codec
from tokenloom.wire.messages import PROTOCOL_VERSION, Hello
from tokenloom.worker import link
from tokenloom.worker.fake import FakeConfig, expected_tokens

PROMPT = [3, 4, 5, 6]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place.make(tmp_path)


class Log:
    """What all processes of a test have written to standard error."""

    def __init__(self, capfd: Capture) -> None:
        self._capfd = capfd
        self.text = ""

    def read(self) -> str:
        self.text += self._capfd.readouterr().err
        return self.text

    def until(self, part: str) -> None:
        wait_until(lambda: part in self.read(), TIMEOUT_S)


@pytest.fixture
def log(capfd: Capture) -> Log:
    return Log(capfd)


def assert_serves(front: FrontSocket, stream: int, num_tokens: int = 20) -> None:
    front.send(submit(stream, PROMPT, num_tokens, seed=7))
    front.until(lambda: stream in front.finished)
    expected = expected_tokens(PROMPT, num_tokens, seed=7, config=FakeConfig())
    assert front.tokens[stream] == expected


def test_a_worker_over_tcp_and_one_of_this_host_are_one_group(place: Place, log: Log) -> None:
    with CoreProcess(tensor_parallel=2, **place.config) as core:
        core.start_worker(*place.worker())
        core.start_worker()
        front = core.ready_front()
        assert_serves(front, 1)
        assert front.inspect().num_dropped_frames == 0
        assert "with the key of worker comes from 127.0.0.1" in log.read()


def test_a_worker_joins_over_ipv6(tmp_path: Path) -> None:
    try:
        place = Place.make(tmp_path, host="::1")
    except OSError as error:
        pytest.skip(f"this host has no IPv6: {error}")
    with CoreProcess(**place.config) as core:
        core.start_worker(*place.worker())
        assert_serves(core.ready_front(), 1)


def test_requests_go_on_over_tcp_after_kill_9(place: Place) -> None:
    with CoreProcess(**place.config) as core:
        worker = core.start_worker("--step-ms", "5", *place.worker())
        front = core.ready_front()
        front.send(submit(1, PROMPT, 100, seed=7))
        front.until(lambda: len(front.tokens.get(1, [])) > 10)
        worker.kill()
        core.start_worker(*place.worker())
        front.until(lambda: 1 in front.finished)
        assert front.tokens[1] == expected_tokens(PROMPT, 100, seed=7, config=FakeConfig())


def test_a_worker_that_is_not_on_the_list_leaves_and_both_sides_say_why(
    place: Place, log: Log
) -> None:
    with CoreProcess(**place.config) as core:
        stranger = core.start_worker(*place.worker(key="stranger"))
        assert stranger.wait(TIMEOUT_S) == 2
        log.until("does not allow this worker's key")
        key = (place.folder / "stranger.key").read_text().split('"')[1]
        log.until(f"127.0.0.1 has the key {key}, which is not among those allowed")
        core.start_worker(*place.worker())
        front = core.ready_front()
        assert_serves(front, 1)
        assert (front.num_lost, front.inspect().num_dropped_frames) == (0, 0)


def test_a_worker_with_the_public_key_of_another_core_never_joins(place: Place, log: Log) -> None:
    with CoreProcess(**place.config) as core:
        lost = core.start_worker(*place.worker(server_key="stranger"))
        log.until("as one does to which --server-key does not belong")
        log.until("not let in, time 1: a connection with wrong keys")
        core.start_worker(*place.worker())
        front = core.ready_front()
        assert_serves(front, 1)
        assert lost.poll() is None  # the core may be exchanged
        assert front.inspect().num_dropped_frames == 0


def test_a_hello_without_keys_never_reaches_the_core(place: Place, log: Log) -> None:
    with CoreProcess(**place.config) as core, zmq.Context() as context:
        front = core.front()
        front.inspect()  # it listens
        with context.socket(zmq.DEALER) as stranger:
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.connect(place.endpoint)
            hello = Hello(protocol_version=PROTOCOL_VERSION, pid=1, device="none", address="")
            stranger.send(codec.encode(hello))
            log.until("not let in, time 1: a connection that ended in its handshake")
        assert front.inspect().num_dropped_frames == 0
        assert "is rank 0" not in log.read()
        core.start_worker(*place.worker())
        front.until(lambda: front.ready is not None)
        assert_serves(front, 1)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n" * 20, b"\xff" + b"\0" * 8 + b"\x7f\x03" + b"x" * 4000]
)
def test_garbage_on_the_port_is_told_and_harms_nobody(
    place: Place, log: Log, garbage: bytes
) -> None:
    with CoreProcess(**place.config) as core:
        core.start_worker("--step-ms", "5", *place.worker())
        front = core.ready_front()
        front.send(submit(1, PROMPT, 100, seed=7))
        with socket.create_connection(place.address) as stranger:
            stranger.sendall(garbage)
            log.until("not let in, time 1")
        front.until(lambda: 1 in front.finished)
        assert front.tokens[1] == expected_tokens(PROMPT, 100, seed=7, config=FakeConfig())
        assert (front.num_lost, front.inspect().num_dropped_frames) == (0, 0)


@contextmanager
def visitors(address: tuple[str, int]) -> Iterator[None]:
    """Somebody connects and leaves again and again, as probes of load balancers do."""
    end = Event()

    def visit() -> None:
        while not end.wait(0.07):
            socket.create_connection(address).close()

    thread = Thread(target=visit)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def test_a_group_gathers_while_strangers_come_and_go(place: Place) -> None:
    with CoreProcess(tensor_parallel=3, **place.config) as core:
        front = core.front()
        front.inspect()  # it listens
        with visitors(place.address):
            for _ in range(3):
                core.start_worker(*place.worker())
                time.sleep(0.4)  # so that their Hellos do not come together
            front.until(lambda: front.ready is not None)
            assert_serves(front, 1)


def test_a_worker_notices_a_core_that_stands_still(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "SILENCE_S", 0.6)
    parser = ArgumentParser()
    link.add_link_options(parser)
    hello = Hello(protocol_version=PROTOCOL_VERSION, pid=1, device="none", address="")
    with CoreProcess(**place.config) as core:
        worker = link.Link(link.core_address(parser.parse_args(place.worker())))
        wait_until(lambda: worker.send(hello), TIMEOUT_S)
        assert not worker.take_disconnections()
        core.process.send_signal(signal.SIGSTOP)
        wait_until(worker.take_disconnections, TIMEOUT_S)
        core.process.send_signal(signal.SIGCONT)
        wait_until(lambda: worker.send(hello), TIMEOUT_S)
        worker.close()


def exit_code(config: dict[str, str]) -> int:
    with CoreProcess(**config) as core:
        return core.process.wait(TIMEOUT_S)


def test_a_core_does_not_listen_without_its_secret_and_a_list(place: Place, log: Log) -> None:
    secret, empty = place.folder / "scheduler.key_secret", place.folder / "empty"
    empty.mkdir()
    cases: list[tuple[dict[str, str], str]] = [
        ({"workers_key": str(place.folder / "none")}, "No such file or directory"),
        ({"workers_key": str(place.folder / "scheduler.key")}, "has no secret key"),
        ({"workers_allowed": str(empty)}, "no file is called *.key: no worker could join"),
        ({"workers_listen": "tcp://nowhere"}, "cannot listen for workers on tcp://nowhere"),
    ]
    for changed, _ in cases:
        assert exit_code(place.config | changed) == 2
    secret.chmod(0o644)
    assert exit_code(place.config) == 2
    secret.chmod(0o600)
    with socket.create_server(place.address):
        assert exit_code(place.config) == 2
    told = log.read()
    for _, part in cases:
        assert part in told
    assert "is a secret and has mode 644; it must be 600" in told
    assert "Address already in use" in told
    assert "Traceback" not in told


def test_a_worker_whose_core_takes_no_keys_says_so(place: Place, log: Log) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as plain:
        plain.bind(place.endpoint)
        worker = subprocess.run(
            [sys.executable, "-m", "tokenloom.worker.fake", *place.worker()],
            env=ENVIRONMENT,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert worker.returncode == 2
    assert "is no core that takes keys" in log.read()
