"""A trace of serving steps beside the same tokens as without."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest
import torch

from tests.worker.checkpoints import make_checkpoint
from tests.worker.driver import Driver, configuration
from tokenloom.worker.loop import Recording
from tokenloom.worker.options import WorkerOptions
from tokenloom.worker.profile import ProfiledRunner
from tokenloom.worker.runner import ModelRunner

PROMPTS = [[5, 3, 80, 41, 7], [9, 9, 2]]
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint(folder, "llama")
    return folder


def runner() -> ModelRunner:
    return ModelRunner(WorkerOptions(device="cpu", kv_cache_bytes=1024 * 1024))


def complete(running: ModelRunner | ProfiledRunner, checkpoint: Path) -> list[list[int]]:
    ready = running.configure(configuration(str(checkpoint)), lambda *_: None)
    return Driver(lambda step: running.launch(step).result(), ready).generate(PROMPTS, NUM_TOKENS)


def profiled(folder: Path, *, num_steps: int, num_skipped: int) -> ProfiledRunner:
    profiling = ProfiledRunner(runner(), device=torch.device("cpu"))
    profiling.write(folder, num_steps=num_steps, num_skipped=num_skipped)
    return profiling


def traced_steps(folder: Path) -> list[str]:
    """Returns the ranges of the one trace, in order, after a look for operations."""
    (path,) = folder.iterdir()
    return steps_of(path.read_bytes())


def steps_of(trace: bytes) -> list[str]:
    events = json.loads(gzip.decompress(trace))["traceEvents"]
    assert "aten::linear" in {event.get("name") for event in events}
    steps = {
        event["ts"]: event["name"] for event in events if event.get("cat") == "user_annotation"
    }
    return [steps[start] for start in sorted(steps)]


def recorded(profiling: ProfiledRunner) -> Recording:
    """Waits for what a thread packs."""
    deadline_s = time.monotonic() + 60
    while (recording := profiling.take()) is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return recording


def test_the_steps_asked_for_are_traced_and_tokens_stay_the_same(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with profiled(tmp_path / "traces", num_steps=3, num_skipped=2) as profiling:
        tokens = complete(profiling, checkpoint)
        assert traced_steps(tmp_path / "traces") == ["step 3", "step 4", "step 5"]
    assert tokens == complete(runner(), checkpoint)
    assert "trace of 3 steps in" in caplog.text
    assert "aten::addmm" in caplog.text or "aten::mm" in caplog.text


def test_a_worker_that_ends_early_writes_what_it_has(checkpoint: Path, tmp_path: Path) -> None:
    with profiled(tmp_path, num_steps=1000, num_skipped=0) as profiling:
        complete(profiling, checkpoint)
        assert not list(tmp_path.iterdir())
    assert len(traced_steps(tmp_path)) >= NUM_TOKENS


def test_a_trace_that_cannot_be_written_costs_no_request(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with profiled(tmp_path / "file" / "traces", num_steps=1, num_skipped=0) as profiling:
        assert [len(tokens) for tokens in complete(profiling, checkpoint)] == [NUM_TOKENS] * 2
    assert "the trace cannot be written" in caplog.text


def test_steps_are_recorded_on_demand_again_and_again(checkpoint: Path) -> None:
    with ProfiledRunner(runner(), device=torch.device("cpu")) as profiling:
        for _ in range(2):
            profiling.record(3)
            assert profiling.take() is None
            complete(profiling, checkpoint)
            assert len(steps_of(recorded(profiling).data)) == 3
            assert profiling.take() is None


def test_a_recording_beside_another_is_refused_and_one_that_is_forgotten_leaves_nothing(
    checkpoint: Path,
) -> None:
    with ProfiledRunner(runner(), device=torch.device("cpu")) as profiling:
        profiling.record(1000)
        complete(profiling, checkpoint)
        profiling.record(5)
        assert "traced already" in recorded(profiling).error
        profiling.record(0)
        profiling.record(2)
        complete(profiling, checkpoint)
        assert len(steps_of(recorded(profiling).data)) == 2
