"""The exporter beside a real server: what dies and comes back takes no count with it."""

from __future__ import annotations

import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.server import Server, wait_until
from tests.front.checkpoints import byte_level_tokenizer, write_checkpoint

TIMEOUT_S = 60.0
NUM_CALLS = 5


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    checkpoint = write_checkpoint(tmp_path / "model", byte_level_tokenizer())
    options = ("--metrics-listen=127.0.0.1:0", "--num-fronts=2")
    with Server.of_fake(checkpoint, *options, worker=("--vocab-size=300",)) as server:
        yield server


def scrape(server: Server) -> dict[str, float]:
    """Returns the samples without labels but the model's name; empty while there is no exporter."""
    try:
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as response:
            text = response.read().decode()
    except urllib.error.URLError:
        return {}
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if set(sample.labels) == {"model_name"}
    }


def call(server: Server) -> None:
    """Makes calls until it has succeeded a few times, on connections of their own."""
    for _ in range(NUM_CALLS):
        with server.client() as client:
            client.generate([5, 6, 7], max_tokens=3, ignore_eos=True).result()


def processes(server: Server, module: str) -> list[psutil.Process]:
    return server.children(f"tokenloom.scheduler.{module}")


def num_front_files(server: Server) -> int:
    return len(list((server.run_dir / "metrics").glob("front-*.samples")))


def test_no_count_dies_with_a_front_or_the_exporter(server: Server) -> None:
    finished = "tokenloom_e2e_request_latency_seconds_count"
    call(server)
    wait_until(lambda: scrape(server).get(finished) == NUM_CALLS, TIMEOUT_S)

    wait_until(lambda: num_front_files(server) == 2, TIMEOUT_S)
    wait_until(lambda: scrape(server)["tokenloom_ready"] == 1, TIMEOUT_S)
    for front in processes(server, "front"):
        front.send_signal(signal.SIGKILL)
    wait_until(lambda: len(processes(server, "front")) == 2, TIMEOUT_S)
    call(server)
    wait_until(lambda: scrape(server).get(finished) == 2 * NUM_CALLS, TIMEOUT_S)
    assert num_front_files(server) == 2

    (exporter,) = processes(server, "exporter")
    exporter.kill()
    wait_until(lambda: processes(server, "exporter") not in ([], [exporter]), TIMEOUT_S)
    wait_until(lambda: scrape(server).get(finished) == 2 * NUM_CALLS, TIMEOUT_S)
    drawn = "tokenloom_generation_tokens_total"
    wait_until(lambda: scrape(server).get(drawn) == 6 * NUM_CALLS, TIMEOUT_S)


def test_nothing_of_a_server_before_is_told(server: Server) -> None:
    call(server)
    name = "tokenloom_generation_tokens_total"
    wait_until(lambda: scrape(server).get(name) == 3 * NUM_CALLS, TIMEOUT_S)
    (exporter,) = processes(server, "exporter")
    server.restart_scheduler()
    exporter.wait(TIMEOUT_S)
    wait_until(lambda: scrape(server).get(name) == 0, TIMEOUT_S)


def test_metrics_are_for_this_user_alone_on_disk(server: Server) -> None:
    call(server)
    folder = server.run_dir / "metrics"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_uid == os.getuid()
