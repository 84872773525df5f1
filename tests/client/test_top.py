"""`tokenloom top`: its figures, and its screen on a pseudo-terminal against an Admin service."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tokenloom.client.top.rows import Row, Sample, Sight, row_of, total_of
from tokenloom.client.top.table import as_json, table
from tokenloom.v1 import admin_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["Admin"].full_name
COMMAND = (sys.executable, "-m", "tokenloom.client", "top")


class Replica:
    """An Admin service that tells a load which grows steadily."""

    def __init__(self) -> None:
        self.report = pb.WatchLoadResponse(
            model="pocket",
            is_ready=True,
            num_running=31,
            num_waiting=4,
            num_blocks=100,
            num_used_blocks=60,
            utilization=0.6,
            step_s=0.0121,
        )
        self._port = 0
        self._server: grpc.Server | None = None
        self._left = threading.Event()

    def watch_load(
        self, request: pb.WatchLoadRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchLoadResponse]:
        while context.is_active() and not self._left.is_set():
            self.report.num_steps += 1
            self.report.num_generated_tokens += 1_000_000
            self.report.busy_s += 0.05
            yield self.report
            self._left.wait(request.interval_s)

    def start(self) -> str:
        """Listens, each time on the same port; returns the address."""
        self._left.clear()
        self._server = grpc.server(ThreadPoolExecutor(4))
        handler = grpc.unary_stream_rpc_method_handler(
            self.watch_load,
            request_deserializer=pb.WatchLoadRequest.FromString,
            response_serializer=pb.WatchLoadResponse.SerializeToString,
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {"WatchLoad": handler}),)
        )
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        self._server.start()
        return f"127.0.0.1:{self._port}"

    def stop(self) -> None:
        self._left.set()
        if self._server is not None:
            self._server.stop(0).wait()


class Terminal:
    """`tokenloom top` on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._fd, inner = pty.openpty()
        environment = os.environ | {"COLUMNS": "200", "LINES": "30", "TERM": "xterm"}
        self.process = subprocess.Popen(
            [*COMMAND, "--interval-s=0.1", *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=environment,
        )
        os.close(inner)
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._fd, 65536)
            except OSError:
                return
            if not data:
                return
            self.text += data.decode(errors="replace")

    def page(self) -> str:
        """Returns the last page that is whole, without its colours."""
        pages = self.text.split("\x1b[H")[1:-1]
        return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", pages[-1]) if pages else ""

    def until(self, condition: Callable[[str], bool]) -> str:
        deadline_s = time.monotonic() + 30
        while not condition(page := self.page()):
            assert time.monotonic() < deadline_s, self.text[-2000:]
            time.sleep(0.02)
        return page

    def press(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def wait(self) -> int:
        code = self.process.wait(30)
        self._reader.join(5)
        os.close(self._fd)
        return code


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    replicas = [Replica(), Replica()]
    yield replicas
    for replica in replicas:
        replica.stop()


def report(**fields: float) -> pb.WatchLoadResponse:
    made = pb.WatchLoadResponse(model="m", is_ready=True)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def sight(*samples: tuple[float, pb.WatchLoadResponse]) -> Sight:
    before, last = (Sample(at_s=at_s, report=each) for at_s, each in samples)
    return Sight(target="a:1", before=before, last=last)


def test_rates_are_growth_over_the_time_between_two_reports() -> None:
    before = report(num_steps=10, num_prompt_tokens=100, busy_s=1.0, num_refused=3)
    after = report(num_steps=30, num_prompt_tokens=600, busy_s=2.5, num_refused=4)
    row = row_of(sight((5.0, before), (7.0, after)))
    assert (row.prompt_tokens_per_s, row.busy_fraction, row.refused_per_s) == (250.0, 0.75, 0.5)


def test_a_core_that_began_anew_has_no_rates_but_figures() -> None:
    row = row_of(sight((5.0, report(num_steps=10)), (6.0, report(num_steps=2, num_running=7))))
    assert row.prompt_tokens_per_s is None
    assert row.num_running == 7


def test_one_report_has_figures_and_no_rates() -> None:
    only = Sample(at_s=1.0, report=report(num_running=7, num_used_blocks=1, num_blocks=4))
    row = row_of(Sight(target="a:1", last=only))
    assert (row.state, row.num_running, row.kv_fraction) == ("ready", 7, 0.25)
    assert row.generated_tokens_per_s is None


def test_all_together_are_sums_and_the_fullest_and_leave_out_who_is_away() -> None:
    rows = [
        Row(
            target="a", state="ready", model="m", num_running=3, num_blocks=10, num_used_blocks=5,
            utilization=0.5, busy_fraction=1.0, generated_tokens_per_s=10.0,
        ),
        Row(
            target="b", state="not ready", model="m", num_running=1, num_blocks=30,
            num_used_blocks=5, utilization=0.9, busy_fraction=0.5,
        ),
        Row(target="c", state="away", error="UNAVAILABLE: gone"),
    ]  # fmt: skip
    total = total_of(rows)
    assert (total.num_running, total.kv_fraction, total.utilization) == (4, 0.25, 0.9)
    assert (total.busy_fraction, total.generated_tokens_per_s) == (0.75, 10.0)
    assert (total.state, total.model) == ("away", "m")
    lines = table(rows)
    assert [line.state for line in lines] == [None, "away", "ready", "not ready", "away"]
    assert lines[4].text.endswith("UNAVAILABLE: gone")
    assert json.loads(as_json(rows, "now"))["all"]["num_running"] == 4


def test_what_a_replica_says_cannot_steer_the_terminal() -> None:
    row = Row(target="a", state="away", error="UNAVAILABLE: \x1b]0;owned\x07\nnext")
    assert table([row])[1].text.endswith("away  UNAVAILABLE:  ]0;owned  next")


def test_the_screen_follows_replicas_that_go_and_come_back(replicas: list[Replica]) -> None:
    targets = [replica.start() for replica in replicas]
    terminal = Terminal(*targets)
    page = terminal.until(lambda page: page.count("pocket") == 3 and "OUT tok/s" in page)
    assert re.search(rf"{targets[0]} +pocket +ready +31 +4 +60 +60", page)
    assert re.search(r"all +pocket +2/2 ready +62 +8 +60 +60", page)
    replicas[1].stop()
    terminal.until(lambda page: f"{targets[1]}  " in page and "away" in page)
    replicas[1].start()
    terminal.until(lambda page: "2/2 ready" in page)
    terminal.press(b"q")
    assert terminal.wait() == 0
    assert terminal.text.rstrip().endswith("\x1b[?25h\x1b[?1049l")  # the terminal is as it was


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_the_terminal_as_it_was(
    replicas: list[Replica], number: signal.Signals, code: int
) -> None:
    terminal = Terminal(replicas[0].start())
    terminal.until(lambda page: "ready" in page)
    terminal.process.send_signal(number)
    assert terminal.wait() == code
    assert terminal.text.rstrip().endswith("\x1b[?25h\x1b[?1049l")
    assert "Traceback" not in terminal.text


def test_once_prints_a_table_with_rates(replicas: list[Replica]) -> None:
    command = [*COMMAND, "--once", "--interval-s=0.2", replicas[0].start()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    heading, line, *rest = done.stdout.splitlines()
    assert heading.split()[:5] == ["REPLICA", "MODEL", "STATE", "RUN", "WAIT"]
    assert rest == [""]
    figures = dict(zip(re.split(r"  +", heading), re.split(r"  +", line), strict=True))
    assert figures["STATE"] == "ready"
    assert int(figures["OUT tok/s"].replace(",", "")) > 0
    assert figures["STEP ms"] == "12.1"


def test_json_is_an_object_a_line_and_who_is_away_decides_the_status(
    replicas: list[Replica],
) -> None:
    command = [*COMMAND, "--once", "--json", "--interval-s=0.2", replicas[0].start(), "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert [row["state"] for row in told["replicas"]] == ["ready", "away"]
    assert "UNAVAILABLE" in told["replicas"][1]["error"]
    assert told["all"]["num_running"] == 31


def test_in_a_pipe_tables_follow_each_other_until_the_reader_has_seen_enough(
    replicas: list[Replica],
) -> None:
    command = [*COMMAND, "--json", "--interval-s=0.1", replicas[0].start()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(3):
            assert json.loads(process.stdout.readline())["all"]["state"] == "ready"
        process.stdout.close()
        assert process.wait(30) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""
