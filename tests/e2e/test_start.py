"""What a server tells of its start, and a trace of its steps, as a user asks for them."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from tests.e2e.server import Server, wait_until

POCKET = Path(__file__).parents[2] / "models" / "pocket"


def test_a_server_tells_its_start_by_phases_and_traces_steps(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    traces, kernels = tmp_path / "traces", tmp_path / "kernels"
    options = ("--profile", str(traces), "--profile-steps", "5", "--profile-skip", "2")
    with Server.of_model(POCKET, "--kernel-cache", str(kernels), *options) as server:
        with server.client() as client:
            question = [{"role": "user", "content": "What is 47 + 38?"}]
            assert client.chat(question, temperature=0, max_tokens=20).result().text == "85"
            client.generate([1, 4, 300], max_tokens=20, ignore_eos=True).result()
        wait_until(lambda: any(traces.glob("*.json.gz")), 60, alive=server.scheduler)
        server.assert_unharmed()
        assert server.stop() == 0
    (path,) = traces.iterdir()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert "aten::linear" in {event.get("name") for event in events}
    assert kernels.stat().st_mode & 0o777 == 0o700
    told = re.search(
        r"serving pocket on \S+, ([\d.]+) s after the start; the worker: (.*)",
        capfd.readouterr().err,
    )
    assert told is not None
    phases = {name: float(seconds) for name, seconds in re.findall(r"([a-z ]+) ([\d.]+)", told[2])}
    names = [name.strip() for name in phases]
    assert names[:3] == ["imports", "device", "waiting for the core"]
    assert names[-1] == "loading weights"
    assert 0 < sum(phases.values()) <= float(told[1]) + 0.1 * len(phases)
