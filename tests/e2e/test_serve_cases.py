"""The comparison's script, with a fake worker and with the pocket model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import serve_cases
from bench.serve_cases import Peer, Result
from tests.e2e.server import Server
from tokenloom.client.bench.figures import Figures, figures
from tokenloom.client.bench.record import Record

POCKET = Path(__file__).parents[2] / "models" / "pocket"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server that runs 4 requests, lets 8 wait, and steps every 2 ms."""
    limits = ("--max-num-requests", "4", "--max-waiting-requests", "8")
    with Server.of_fake(POCKET, *limits, worker=("--step-ms", "2")) as server:
        server.client().close()
        yield server.address
        server.assert_unharmed()


def measured(folder: Path, *arguments: str, status: int = 0) -> dict[str, Any]:
    """Runs the script; returns its JSON."""
    file = folder / "figures.json"
    assert serve_cases.main([*arguments, "--processes", "2", "--json", str(file)]) == status
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def served() -> set[psutil.Process]:
    """Returns the processes of servers that this one has started."""
    children = psutil.Process().children(recursive=True)
    return {each for each in children if "tokenloom.scheduler" in " ".join(each.cmdline())}


def one_request(*delta_s: float) -> Figures:
    """Figures of a request whose tokens came one by one."""
    record = Record(
        index=0,
        due_s=0.0,
        sent_s=0.0,
        num_asked_tokens=len(delta_s),
        delta_s=list(delta_s),
        delta_tokens=[1] * len(delta_s),
        end_s=delta_s[-1],
    )
    return figures(
        [record], begin_s=0, end_s=None, target=None, exact_lengths=True, client_cpu_s=0.0
    )


def test_each_run_of_a_case_is_answered_in_full_and_the_best_is_told(
    address: str, tmp_path: Path
) -> None:
    report = measured(
        tmp_path, "--target", address, "--cases", "6x4:9/5:8", "1x4/3", "--repeat", "3"
    )
    several, single = report["results"]
    assert several["name"] == "6x4:9/5:8"
    assert len(several["runs_s"]) == 3
    assert several["best"]["measured_s"] == min(several["runs_s"])
    assert several["best"]["num_done"] == 6
    assert 6 * 5 <= several["best"]["num_output_tokens"] <= 6 * 8
    assert single["best"]["num_output_tokens"] == 3
    assert report["serving_s"] is None


def test_the_open_load_is_seven_tenths_of_what_saturates(address: str, tmp_path: Path) -> None:
    report = measured(tmp_path, "--target", address, "--open", "4x4/8:12", "--open-seconds", "1.5")
    saturated, below = report["results"]
    saturated_requests_per_s = saturated["best"]["output_tokens_per_s"] / 10
    assert below["name"] == f"open {0.7 * saturated_requests_per_s:.1f}/s"
    for result in (saturated, below):
        assert result["best"]["num_done"] > 0
        assert result["best"]["measured_s"] == pytest.approx(1.5)


def test_a_case_that_is_refused_spoils_no_other(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = measured(
        tmp_path, "--target", address, "--cases", "40x4/200", "1x4/3", "--repeat", "1", status=1
    )
    assert [result["name"] for result in report["results"]] == ["1x4/3"]
    assert "RESOURCE_EXHAUSTED QUEUE_FULL" in capsys.readouterr().err


def test_a_checkpoint_is_served_for_the_cases_and_then_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "serve.log"
    before = served()
    report = measured(
        tmp_path,
        *(str(POCKET), "--cases", "2x8/4", "--repeat", "1", "--log", str(log)),
        "--serve-args=--device cpu --max-num-requests 3",
    )
    assert report["serving_s"] > 0
    assert report["results"][0]["best"]["num_output_tokens"] == 8
    assert "time to SERVING" in capsys.readouterr().out
    assert "weights" in log.read_text()
    assert served() <= before


def test_a_server_that_cannot_start_is_told_by_the_end_of_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve_cases.main([str(tmp_path), "--cases", "1x4/3"]) == 1
    told = capsys.readouterr()
    assert "no config.json" in told.out
    assert "ended with status 2" in told.err


def test_a_peers_ids_are_not_replaced_by_those_of_a_small_vocabulary(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "peer.log"
    log.write_text('RESULT {"case": "b1", "s": 2}\n')
    assert serve_cases.main(["--target", address, "--beside", str(log)]) == 1
    assert "100000" in capsys.readouterr().err


def test_decode_is_compared_without_the_time_to_the_first_token(tmp_path: Path) -> None:
    log = tmp_path / "peer.log"
    log.write_text(
        "loading\n"
        'RESULT {"system": "peer", "init_s": 84.5}\n'
        '12:00 RESULT {"system": "peer", "case": "long", "s": 5.0}\n'
        'RESULT {"system": "peer", "case": "long.first", "s": 1.0}\n'
        'RESULT {"system": "peer", "case": "other", "s": 3.0}\n'
    )
    peer = Peer.read(log)
    assert peer.start_s == 84.5
    assert peer.seconds == {"long": 5.0, "long.first": 1.0, "other": 3.0}

    seen = one_request(2.0, 2.5, 3.0)
    result = Result(name="long", runs_s=(3.0,), best=seen, gpu_share=None)
    assert result.decode_tokens_per_s == pytest.approx(2.0)
    assert peer.decode_tokens_per_s(result) == pytest.approx(2 / 4.0)
    other = Result(name="other", runs_s=(3.0,), best=seen, gpu_share=None)
    assert peer.decode_tokens_per_s(other) is None


def test_the_gpus_share_is_what_the_worker_logged_during_the_case(tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    log.write_text("worker INFO the GPU ran 12.5 % of 5.00 s: 2 steps, median 1.000 ms\n")
    server = serve_cases.Server(address="", log=log)
    before = server.log_bytes()
    assert server.gpu_share(before) is None
    with log.open("a") as file:
        file.write("worker INFO the GPU ran 90.0 % of 2.50 s: 7 steps, median 1.000 ms\n")
        file.write("worker INFO the GPU ran 98.0 % of 7.50 s: 9 steps, median 1.000 ms\n")
    assert server.gpu_share(before) == pytest.approx(0.96)
