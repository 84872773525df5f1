"""What a start is made of, and where it begins."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import count

from tests.worker.core_socket import environment
from tokenloom.wire.started import process_start_s
from tokenloom.worker.phases import Phases


def test_phases_follow_each_other_without_a_gap() -> None:
    seconds = count(10)
    phases = Phases("imports", 7.5, clock=lambda: float(next(seconds)))
    for phase in ("loading", "loading", "warming up", "loading"):
        phases.begin(phase)
    told = phases.end()
    assert told == (("imports", 2.5), ("loading", 3.0), ("warming up", 1.0))
    assert sum(seconds for _, seconds in told) == 14 - 7.5


def test_a_process_counts_from_before_its_interpreter_ran() -> None:
    before_s = time.monotonic()
    code = "from tokenloom.wire.started import process_start_s; print(process_start_s())"
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, check=True, text=True
    )
    tick_s = 0.02  # the kernel counts in hundredths
    assert before_s - tick_s <= float(told.stdout) <= time.monotonic()


def test_a_parents_start_lies_before_its_childs() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert process_start_s() <= process_start_s(child.pid)


def test_a_process_that_is_gone_counts_from_now() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    before_s = time.monotonic()
    assert process_start_s(child.pid) >= before_s
