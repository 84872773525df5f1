"""Several fronts on one port, as processes: who serves whom, and what the death of one means."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import psutil
import pytest

from tests.e2e.server import Server, wait_until
from tokenloom.scheduler.config import ConfigError, SchedulerConfig
from tokenloom.scheduler.ports import shared_port
from tokenloom.v1 import inference_pb2 as pb
from tokenloom.v1.inference_pb2_grpc import InferenceStub
from tokenloom.worker.fake import FakeConfig, expected_tokens

NUM_TOKENS = 400
FAKE = FakeConfig(vocab_size=300)
TIMEOUT_S = 60.0


def fronts(server: Server) -> list[psutil.Process]:
    """Returns the fronts that listen."""
    return [
        child
        for child in psutil.Process(server.scheduler.pid).children()
        if "tokenloom.scheduler.front" in child.cmdline()
        and any(each.status == psutil.CONN_LISTEN for each in child.net_connections("tcp"))
    ]


def ports_of_clients(front: psutil.Process) -> set[int]:
    return {
        each.raddr.port
        for each in front.net_connections("tcp")
        if each.status == psutil.CONN_ESTABLISHED
    }


@pytest.fixture
def server(checkpoint: Path) -> Iterator[Server]:
    worker = ("--step-ms", "5", "--vocab-size", str(FAKE.vocab_size))
    with Server.of_fake(checkpoint, "--num-fronts", "2", worker=worker) as server:
        server.client().close()
        wait_until(lambda: len(fronts(server)) == 2, TIMEOUT_S, alive=server.scheduler)
        yield server


class Caller:
    """A client with a connection of its own, and the stream that it reads."""

    def __init__(self, address: str, seed: int) -> None:
        self.prompt, self.seed = [seed + 3] * (seed + 1), seed
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(address, options)
        request = pb.GenerateRequest(
            tokens=pb.TokenIds(ids=self.prompt),
            sampling=pb.Sampling(seed=seed),
            stopping=pb.Stopping(max_tokens=NUM_TOKENS, ignore_eos=True),
        )
        self.stream = InferenceStub(self.channel).Generate(request, timeout=TIMEOUT_S)
        assert next(self.stream).HasField("admission")

    def is_refused(self) -> bool:
        """Returns whether this connection's front refuses new requests."""
        try:
            InferenceStub(self.channel).Tokenize(pb.TokenizeRequest(text="x"))
        except grpc.RpcError as error:
            return "drains" in (error.details() or "")
        return False

    def has_all_tokens(self) -> bool:
        """Reads to the end; a status that is not OK raises grpc.RpcError."""
        tokens = [token for response in self.stream for token in response.delta.token_ids]
        return tokens == expected_tokens(self.prompt, NUM_TOKENS, seed=self.seed, config=FAKE)


@pytest.fixture
def callers(server: Server) -> Iterator[dict[int, list[Caller]]]:
    """Opens streams until each front has two; yields them by the process of their front."""
    by_pid: dict[int, list[Caller]] = {front.pid: [] for front in fronts(server)}
    with ExitStack() as stack:
        for seed in range(40):
            known = {pid: ports_of_clients(psutil.Process(pid)) for pid in by_pid}
            caller = Caller(server.address, seed)
            stack.callback(caller.channel.close)
            (pid,) = [pid for pid in by_pid if ports_of_clients(psutil.Process(pid)) - known[pid]]
            by_pid[pid].append(caller)
            if min(map(len, by_pid.values())) >= 2:
                break
        yield by_pid


def test_streams_of_a_killed_front_are_lost_and_those_of_the_others_go_on(
    server: Server, callers: dict[int, list[Caller]]
) -> None:
    victim, survivor = callers
    os.kill(victim, signal.SIGKILL)
    for caller in callers[victim]:
        with pytest.raises(grpc.RpcError) as caught:
            caller.has_all_tokens()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert all(caller.has_all_tokens() for caller in callers[survivor])
    server.assert_unharmed()
    wait_until(lambda: len(fronts(server)) == 2, TIMEOUT_S, alive=server.scheduler)
    assert victim not in {front.pid for front in fronts(server)}
    assert server.stop() == 0


def test_sigterm_drains_all_fronts_together(
    server: Server, callers: dict[int, list[Caller]]
) -> None:
    server.scheduler.send_signal(signal.SIGTERM)
    for caller in (each[0] for each in callers.values()):
        wait_until(lambda caller=caller: caller.is_refused(), TIMEOUT_S)  # type: ignore[misc]
    with ThreadPoolExecutor() as readers:
        everybody = [caller for each in callers.values() for caller in each]
        assert all(readers.map(Caller.has_all_tokens, everybody))
    assert server.scheduler.wait(TIMEOUT_S) == 0


def test_a_shared_port_is_held_while_nobody_listens() -> None:
    with shared_port("127.0.0.1:0") as address:
        port = int(address.rpartition(":")[2])
        cannot_listen = f"cannot listen on 127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=cannot_listen), shared_port(address):
            pass
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
    with shared_port(address) as again:
        assert again == address


def test_a_taken_port_is_refused_before_anything_starts(checkpoint: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        result = subprocess.run(
            [
                *(sys.executable, "-m", "tokenloom.scheduler", "scheduler", "--num-fronts=2"),
                *(f"--model={checkpoint}", f"--run-dir={tmp_path / 'run'}", f"--listen={listen}"),
            ],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert result.returncode == 2
    assert f"cannot listen on {listen}" in result.stderr


def test_a_unix_socket_has_one_front() -> None:
    with pytest.raises(ConfigError, match="num_fronts is 2 and listen is unix:/x"):
        SchedulerConfig(model="m", run_dir="/run", listen="unix:/x", num_fronts=2)
