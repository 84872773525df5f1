"""The whole command, against a scheduler with a fake worker and against scripted answers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.client.scripted import (
    admission,
    delta,
    finish,
    one_token_and_then_silence,
    serving,
)
from tests.e2e.server import Server
from tokenloom.client import cli
from tokenloom.client.bench.workload import Lengths, random_requests
from tokenloom.v1 import inference_pb2 as pb

POCKET = Path(__file__).parents[3] / "models" / "pocket"
PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server that runs 4 requests, lets 8 wait, and steps every 2 ms."""
    limits = ("--max-num-requests", "4", "--max-waiting-requests", "8")
    with Server.of_fake(POCKET, *limits, worker=("--step-ms", "2")) as server:
        server.client().close()
        yield server.address
        server.assert_unharmed()


def bench(folder: Path, *arguments: str) -> dict[str, Any]:
    """Runs the command, which must end well; returns its JSON."""
    file = folder / "report.json"
    assert cli.main(["bench", *arguments, "--processes", "2", "--json", str(file)]) == 0
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def test_all_at_once_gets_exactly_what_was_asked_for(address: str, tmp_path: Path) -> None:
    report = bench(
        tmp_path,
        *(address, "--requests", "8", "--input", "4:12", "--output", "5:40", "--seed", "7"),
    )
    (point,) = report["points"]
    assert point["load"] == {"kind": "at_once", "value": 8}
    assert (point["num_done"], point["num_failed"], point["num_short"]) == (8, 0, 0)
    assert point["client_cpu_s"] > 0
    assert point["goodput"] is None
    listed = random_requests(
        8, prompt_tokens=Lengths(4, 12), output_tokens=Lengths(5, 40), vocab_size=512, seed=7
    )
    requests = listed.requests
    assert point["num_input_tokens"] == sum(len(each.prompt) for each in requests)
    assert point["num_output_tokens"] == sum(each.max_tokens or 0 for each in requests)


def test_fixed_concurrencies_run_for_their_time_one_after_the_other(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "seen.png"
    report = bench(
        tmp_path,
        *(address, "--concurrency", "1", "3", "--seconds", "0.6", "--warmup-s", "0.2"),
        *("--input", "4", "--output", "8", "--ttft-ms", "60000", "--plot", str(picture)),
    )
    assert [point["load"]["value"] for point in report["points"]] == [1, 3]
    for point in report["points"]:
        assert point["load"]["kind"] == "concurrency"
        assert point["measured_s"] == pytest.approx(0.6)
        assert point["num_done"] == point["num_requests"] == point["goodput"]["num_requests"] > 0
        assert point["num_failed"] == point["num_cut"] == point["num_short"] == 0
    assert picture.read_bytes().startswith(PNG)
    told = capsys.readouterr().out
    assert "3 streams kept busy" in told
    assert "out tok/s" in told


def test_poisson_arrivals_at_several_rates(address: str, tmp_path: Path) -> None:
    report = bench(
        tmp_path,
        *(address, "--rate", "20", "40", "--requests", "12", "--input", "4", "--output", "2:4"),
    )
    assert [point["load"] for point in report["points"]] == [
        {"kind": "rate", "value": 20.0},
        {"kind": "rate", "value": 40.0},
    ]
    assert [point["num_done"] for point in report["points"]] == [12, 12]
    assert all(point["late_ms"]["p50"] >= 0 for point in report["points"])


def test_what_the_server_refuses_is_counted_by_status_and_reason(
    address: str, tmp_path: Path
) -> None:
    report = bench(tmp_path, address, "--requests", "40", "--input", "4", "--output", "200")
    (point,) = report["points"]
    assert point["num_done"] + point["num_failed"] == 40
    assert point["num_failed"] > 0
    assert point["errors"] == [
        {"code": "RESOURCE_EXHAUSTED", "reason": "QUEUE_FULL", "count": point["num_failed"]}
    ]
    assert point["num_output_tokens"] == 200 * point["num_done"]


def test_prompts_of_a_file_are_sent_as_they_stand(tmp_path: Path) -> None:
    lines = ["one", [5, 6], {"text": "two", "max_tokens": 2}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def respond(_context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        return iter([admission(), delta(0, 9, text="x"), finish(1)])

    with serving(respond) as server:
        report = bench(
            tmp_path,
            *(server.address, "--prompts", str(tmp_path / "prompts.jsonl"), "--no-ignore-eos"),
            *("--output", "4", "--temperature", "0.5"),
        )
    sampling = pb.Sampling(temperature=0.5)
    stopping = pb.Stopping(max_tokens=4, ignore_eos=False)
    expected = [
        pb.GenerateRequest(text="one", sampling=sampling, stopping=stopping),
        pb.GenerateRequest(tokens=pb.TokenIds(ids=[5, 6]), sampling=sampling, stopping=stopping),
        pb.GenerateRequest(
            text="two", sampling=sampling, stopping=pb.Stopping(max_tokens=2, ignore_eos=False)
        ),
    ]
    assert sorted(map(str, server.requests)) == sorted(map(str, expected))
    # An answer may be short of its limit where ends are not ignored; inputs are as admitted.
    (point,) = report["points"]
    assert (point["num_done"], point["num_short"], point["num_input_tokens"]) == (3, 0, 9)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [([admission(), delta(1, 5), finish(1)], "GAP"), ([admission(), delta(0, 5)], "NO_FINISH")],
)
def test_stream_that_breaks_its_contract_is_an_error(
    messages: list[pb.GenerateResponse], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lambda _context: iter(messages)) as server:
        assert cli.main(["bench", server.address, "--requests", "2"]) == 1
    assert f"2 × DATA_LOSS {reason}" in capsys.readouterr().out


def test_deadline_of_a_request_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(one_token_and_then_silence) as server:
        arguments = ["bench", server.address, "--requests", "2", "--timeout-s", "0.5"]
        assert cli.main(arguments) == 1
        assert server.left.wait(30)
    assert "2 × DEADLINE_EXCEEDED" in capsys.readouterr().out


def test_interrupt_tells_what_there_is() -> None:
    with serving(one_token_and_then_silence) as server:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tokenloom.client", "bench", server.address),
                *("--concurrency", "4", "--seconds", "600", "--processes", "2", "--json", "-"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while len(server.requests) < 4:
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all its processes
        out, told = process.communicate(timeout=60)
        assert server.left.wait(30)
    assert process.returncode == 130
    (point,) = json.loads(out)["points"]
    assert point["interrupted"] is True
    assert (point["num_requests"], point["num_cut"], point["num_failed"]) == (4, 4, 0)
    assert point["measured_s"] < 600
    assert "4 streams kept busy (interrupted)" in told
    assert "Traceback" not in told


LATENCY = {"mean", "p50", "p90", "p99", "max"}


def test_fields_of_the_json_are_stable(address: str, tmp_path: Path) -> None:
    report = bench(
        tmp_path,
        *(address, "--requests", "2", "--input", "4", "--output", "3"),
        *("--ttft-ms", "1", "--itl-ms", "1"),
    )
    (point,) = report.pop("points")
    assert report.pop("schema") == "tokenloom-bench-1"
    assert set(report) == set(
        "started_at api target model server_version workload ignore_eos temperature "
        "num_processes".split()
    )
    assert (report["api"], report["target"], report["model"]) == ("grpc", address, "pocket")
    assert set(point) == set(
        "load interrupted measured_s num_requests num_done num_failed num_cut num_short "
        "num_output_tokens num_input_tokens output_tokens_per_s input_tokens_per_s requests_per_s "
        "deltas_per_s tokens_per_delta ttft_ms itl_ms gap_ms e2e_ms late_ms longest_stall goodput "
        "errors client_cpu_s".split()
    )
    assert all(
        set(point[name]) == LATENCY for name in ("ttft_ms", "itl_ms", "gap_ms", "e2e_ms", "late_ms")
    )
    assert set(point["longest_stall"]) == {"times_median_itl", "ms"}
    assert set(point["goodput"]) == set(
        "ttft_ms itl_ms num_requests share requests_per_s output_tokens_per_s".split()
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "say --requests"),
        (["--concurrency", "2"], "say --requests or --seconds"),
        (["--requests", "2", "--seconds", "1"], "not allowed with"),
        (["--case", "b1", "--seconds", "3"], "--seconds needs"),
        (["--case", "b1", "--seed", "0"], "has its own --seed"),
        (["--case", "b1", "--rate", "1", "--concurrency", "1"], "not allowed with"),
        (["--case", "b1", "--model", "m"], "go together"),
        (["here:1", "--case", "b1", "--openai", "http://there", "--model", "m"], "one server"),
        (["--requests", "1", "--openai", "http://there", "--model", "m"], "say --vocab-size"),
        (["--requests", "1", "--input", "5:4"], "5:4"),
        (["--requests", "0"], "less than 1"),
        (["--prompts", "f", "--output", "1:2"], "is one number"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *arguments])
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_case_of_larger_ids_than_the_model_has_is_refused(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", address, "--case", "b1"])
    assert "pocket has" in capsys.readouterr().err


def test_plot_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "--case", "b1", "--plot", "x.png"])
    assert caught.value.code == 2
    assert "pip install 'tokenloom-client[plot]'" in capsys.readouterr().err


def test_server_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "127.0.0.1:1", "--case", "b1", "--ready-timeout-s", "0.3"]
    assert cli.main(arguments) == 1
    assert "not ready within 0.3 s" in capsys.readouterr().err


def test_interrupt_of_a_later_load_keeps_those_that_are_whole(tmp_path: Path) -> None:
    """The first load ends; the server is silent in the second, which an interrupt ends."""
    file = tmp_path / "report.json"

    def respond(context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        if len(server.requests) <= 2:
            return iter([admission(), delta(0, 9), finish(1)])
        return one_token_and_then_silence(context)

    with serving(respond) as server:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tokenloom.client", "bench", server.address),
                *("--concurrency", "1", "2", "--requests", "2", "--processes", "1"),
                *("--no-ignore-eos", "--json", str(file)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while len(server.requests) < 4:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "")
    assert "2 streams kept busy (interrupted)" in out
    points = json.loads(file.read_text())["points"]
    assert [(each["num_done"], each["num_cut"]) for each in points] == [(2, 0), (0, 2)]
