"""`tokenloom top` and Admin.WatchLoad on real servers: fronts, core and fake workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.e2e.server import Server, wait_until
from tests.front.checkpoints import byte_level_tokenizer, write_checkpoint
from tokenloom.client import Client
from tokenloom.v1 import admin_pb2 as pb
from tokenloom.v1.admin_pb2_grpc import AdminStub

COMMAND = (sys.executable, "-m", "tokenloom.client", "top", "--json", "--interval-s=0.2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", byte_level_tokenizer())


@pytest.fixture(scope="module")
def servers(checkpoint: Path) -> Iterator[list[Server]]:
    options = ("--admin-listen=127.0.0.1:0", "--max-crashes=20")
    worker = ("--step-ms=5", "--load-s=0.2")
    with (
        Server.of_fakes(checkpoint, *options, worker=worker) as one,
        Server.of_fakes(checkpoint, *options, "--num-fronts=2", worker=worker) as other,
    ):
        yield [one, other]


@pytest.fixture
def clients(servers: list[Server]) -> Iterator[list[Client]]:
    clients = [server.client() for server in servers]
    yield clients
    for client in clients:
        client.close()


def rows(watch: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Returns what the next line tells of the replicas."""
    assert watch.stdout is not None
    told: list[dict[str, Any]] = json.loads(watch.stdout.readline())["replicas"]
    return told


def test_top_shows_what_real_replicas_do(servers: list[Server], clients: list[Client]) -> None:
    targets = [server.admin_address for server in servers]
    with subprocess.Popen([*COMMAND, *targets], stdout=subprocess.PIPE, text=True) as watch:
        streams = [
            clients[0].generate([place, 2, 3], max_tokens=4000, ignore_eos=True)
            for place in range(3)
        ]
        for stream in streams:
            stream.admission()
        seen: list[list[dict[str, Any]]] = []

        def is_busy() -> bool:
            seen.append(rows(watch))
            busy = seen[-1][0]
            return busy["num_running"] == 3 and (busy["generated_tokens_per_s"] or 0) > 0

        wait_until(is_busy, 30)
        busy, idle = seen[-1]
        assert (busy["state"], busy["model"], busy["num_waiting"]) == ("ready", "tiny", 0)
        assert 0 < busy["kv_fraction"] <= 1
        assert 0 < busy["busy_fraction"] <= 1
        assert busy["step_s"] > 0.004
        assert (idle["num_running"], idle["kv_fraction"]) == (0, 0)
        for stream in streams:
            stream.cancel()
        os.kill(servers[0].inspect().pids[0], signal.SIGKILL)
        states = []

        def has_recovered() -> bool:
            row = rows(watch)[0]
            states.append(row["state"])
            return (row["num_recoveries"], row["state"]) == (1, "ready")

        wait_until(has_recovered, 30)
        assert "not ready" in states
        watch.terminate()


@pytest.mark.usefixtures("clients")
def test_a_replica_that_drains_is_not_ready(servers: list[Server]) -> None:
    with grpc.insecure_channel(servers[1].admin_address) as channel:
        stub = AdminStub(channel)
        reports = stub.WatchLoad(pb.WatchLoadRequest(interval_s=0.1))
        assert next(reports).is_ready
        stub.Drain(pb.DrainRequest())
        assert any(not report.is_ready for report in reports)


@pytest.mark.parametrize("interval_s", [0.0, 0.05, 61.0, float("nan"), float("inf")])
def test_an_interval_out_of_range_is_refused(servers: list[Server], interval_s: float) -> None:
    with grpc.insecure_channel(servers[0].admin_address) as channel:
        reports = AdminStub(channel).WatchLoad(pb.WatchLoadRequest(interval_s=interval_s))
        with pytest.raises(grpc.RpcError, match=r"it must be 0\.1 to 60"):
            next(reports)
