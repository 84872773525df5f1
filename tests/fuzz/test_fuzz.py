"""Each target for a bounded number of executions; `make fuzz` runs them for longer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import stops, validation, wire
from tokenloom.scheduler.front.stops import StopScanner

pytest.importorskip("atheris", reason="there is no build of it for this platform")
ROOT = Path(__file__).parents[2]
NUM_RUNS = 20_000
TARGETS = {"validation": validation.TARGET, "wire": wire.TARGET, "stops": stops.TARGET}


@pytest.mark.parametrize("name", TARGETS)
def test_strangers_bytes_break_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "tests.fuzz", name, f"-runs={NUM_RUNS}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    told = re.search(r"Done (\d+) runs in (\d+) second", done.stderr)
    assert told is not None
    with capsys.disabled():
        sys.stdout.write(f"[{name}: {told[1]} executions] ")
    assert int(told[1]) >= NUM_RUNS


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_reaches_its_reader_unharmed(name: str) -> None:
    for seed in TARGETS[name].seeds:
        TARGETS[name].run(seed)


def test_a_matcher_that_leaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = StopScanner.feed

    def leaking(scanner: StopScanner, text: str, *, may_stop: bool = True) -> object:
        released, match = feed(scanner, text, may_stop=may_stop)
        return released + (scanner.flush() if match is None else ""), match

    monkeypatch.setattr(StopScanner, "feed", leaking)
    with pytest.raises(AssertionError):
        stops.run(b"\x00ab\xffa\xffb")
