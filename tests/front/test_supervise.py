from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

# A child that notes what happens to it. With a grace period it ends when its file `go` is there,
# or at once when it is hurried.
CHILD = """
import os, signal, sys, time
name, folder, kind = sys.argv[1:]

def note(word):
    with open(f"{folder}/log", "a") as log:
        log.write(f"{name} {word}\\n")

def on_term(*_):
    note("term")
    if kind == "graceful":
        while not os.path.exists(f"{folder}/go"):
            time.sleep(0.01)
    if kind != "deaf":
        note("end")
        sys.exit(0)

def on_int(*_):
    note("int")
    sys.exit(0)

if kind == "standby":
    open(f"{folder}/{name}.standby", "w").write(str(os.getpid()))
    note("standby")
    if not sys.stdin.readline():
        sys.exit(0)
    note("woken")
signal.signal(signal.SIGTERM, on_term)
signal.signal(signal.SIGINT, on_int)
open(f"{folder}/{name}.pid", "w").write(str(os.getpid()))
note("start")
if os.path.exists(f"{folder}/{name}.code"):
    sys.exit(int(open(f"{folder}/{name}.code").read()))
while not os.path.exists(f"{folder}/{name}.die"):
    if kind == "telling" and os.path.exists(f"{folder}/say"):
        print(open(f"{folder}/say").read(), flush=True)
        os.remove(f"{folder}/say")
    time.sleep(0.01)
sys.exit(3)
"""
SUPERVISOR = """
import logging, signal, sys
from tokenloom.scheduler.supervise import Child, Restart, supervise
logging.basicConfig(level=logging.INFO, format="%(message)s")
child, folder, kind = sys.argv[1:]
RESTARTS = {"restarting": Restart.ALONE, "together": Restart.TOGETHER}
def make(name, kind, stop_s=60.0):
    return Child(
        name=name,
        argv=(sys.executable, child, name, folder, kind),
        stop_s=stop_s,
        hurry_signal=signal.SIGINT,
        restart=RESTARTS.get(kind, Restart.NEVER),
        tells=kind == "telling",
        standby_argv=(sys.executable, child, name, folder, "standby") if name == "third" else (),
    )
if kind == "together":
    stages = [[make("first", "telling")], [make("second", kind), make("third", kind)]]
elif kind == "draining":
    stages = [[make("first", "graceful")], [make("second", "telling")], [make("third", "together")]]
else:
    first = make("first", kind, 0.3 if kind == "deaf" else 60.0)
    stages = [[first], [make("second", "plain")], [make("third", "plain")]]
sys.exit(supervise(stages))
"""
NAMES = ("first", "second", "third")


class Supervised:
    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        (folder / "child.py").write_text(textwrap.dedent(CHILD))
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, str(folder / "child.py"), str(folder), kind],
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in NAMES:
            self.until(f"{name} start")
        pids = [int((folder / f"{name}.pid").read_text()) for name in NAMES]
        self.children = [psutil.Process(pid) for pid in pids]

    @property
    def log_file(self) -> Path:
        return self.folder / "log"

    @property
    def log(self) -> list[str]:
        return self.log_file.read_text().splitlines() if self.log_file.exists() else []

    def until(self, line: str) -> None:
        deadline = time.monotonic() + 30
        while line not in self.log:
            assert time.monotonic() < deadline, f"{line!r} never came; {self.log}"
            time.sleep(0.01)

    def ended(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors

    def say(self, word: str, *names: str) -> None:
        """Has the first child tell of others."""
        pids = [(self.folder / f"{name}.pid").read_text() for name in names]
        (self.folder / "draft").write_text(" ".join((word, *pids)))
        (self.folder / "draft").rename(self.folder / "say")

    def until_started_again(self, *names: str) -> None:
        for name in names:
            self.until(f"{name} start")
        for place, name in enumerate(NAMES):
            if name in names:
                pid = int((self.folder / f"{name}.pid").read_text())
                self.children[place] = psutil.Process(pid)

    def standby(self, name: str) -> psutil.Process:
        """Returns the process that began last to stand by for a child."""
        return psutil.Process(int((self.folder / f"{name}.standby").read_text()))

    def no_child_is_left(self) -> bool:
        gone, _ = psutil.wait_procs(self.children, timeout=20)
        return len(gone) == len(self.children)


@pytest.fixture
def kind() -> str:
    return "plain"


@pytest.fixture
def supervised(tmp_path: Path, kind: str) -> Iterator[Supervised]:
    supervised = Supervised(tmp_path, kind)
    yield supervised
    supervised.process.kill()
    supervised.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_children_start_from_last_to_first_and_end_from_first_to_last(
    supervised: Supervised, number: signal.Signals
) -> None:
    supervised.process.send_signal(number)
    assert supervised.ended() == (0, "")
    words = [line for line in supervised.log if "start" not in line]
    assert words == [f"{name} {word}" for name in NAMES for word in ("term", "end")]


@pytest.mark.parametrize("kind", ["graceful"])
def test_a_child_is_waited_for_before_the_next_is_told(supervised: Supervised) -> None:
    supervised.process.send_signal(signal.SIGTERM)
    supervised.until("first term")
    assert "second term" not in supervised.log
    (supervised.folder / "go").touch()
    assert supervised.ended() == (0, "")
    assert supervised.log.index("first end") < supervised.log.index("second term")


@pytest.mark.parametrize("kind", ["draining"])
def test_who_dies_or_hangs_in_the_grace_period_of_others_is_started_again(
    supervised: Supervised,
) -> None:
    supervised.process.send_signal(signal.SIGTERM)
    supervised.until("first term")
    supervised.log_file.unlink()
    supervised.children[2].kill()
    supervised.until_started_again("third")
    supervised.log_file.unlink()
    supervised.children[2].suspend()
    supervised.say("lost", "third")
    supervised.until_started_again("third")
    (supervised.folder / "go").touch()
    assert supervised.ended()[0] == 0
    assert supervised.log[-5:] == [
        "first end",
        *(f"{name} {word}" for name in ("second", "third") for word in ("term", "end")),
    ]
    assert supervised.no_child_is_left()


@pytest.mark.parametrize("kind", ["draining"])
def test_a_death_that_ends_everything_ends_a_grace_period(supervised: Supervised) -> None:
    supervised.process.send_signal(signal.SIGTERM)
    supervised.until("first term")
    (supervised.folder / "second.die").touch()
    code, errors = supervised.ended()
    assert code == 1
    assert "exited with code 3; ending everything" in errors
    assert "first int" in supervised.log
    assert supervised.no_child_is_left()


@pytest.mark.parametrize("kind", ["graceful"])
def test_a_second_signal_ends_the_grace_period(supervised: Supervised) -> None:
    supervised.process.send_signal(signal.SIGTERM)
    supervised.until("first term")
    supervised.process.send_signal(signal.SIGINT)
    assert supervised.ended() == (0, "")
    assert "first int" in supervised.log


@pytest.mark.parametrize("name", NAMES)
def test_a_child_that_dies_ends_everything(supervised: Supervised, name: str) -> None:
    (supervised.folder / f"{name}.die").touch()
    code, errors = supervised.ended()
    assert code == 1
    assert f"{name} (pid " in errors
    assert "exited with code 3; ending everything" in errors
    assert errors.count("exited with code 3") == 1
    assert supervised.no_child_is_left()
    for other in NAMES:
        assert (f"{other} int" in supervised.log) == (other != name)


@pytest.mark.parametrize("kind", ["restarting"])
def test_a_child_that_may_be_started_again_is_and_the_others_go_on(supervised: Supervised) -> None:
    for _ in range(2):
        supervised.log_file.unlink()
        supervised.children[0].kill()
        supervised.until("first start")
        supervised.children[0] = psutil.Process(int((supervised.folder / "first.pid").read_text()))
        assert supervised.log == ["first start"]
    supervised.process.send_signal(signal.SIGTERM)
    code, errors = supervised.ended()
    assert code == 0
    assert errors.count("was killed by SIGKILL; it starts again") == 2
    assert supervised.no_child_is_left()


@pytest.mark.parametrize("kind", ["restarting"])
@pytest.mark.parametrize(("code", "num_starts"), [(2, 2), (3, 6)])
def test_a_child_that_cannot_run_ends_everything(
    supervised: Supervised, code: int, num_starts: int
) -> None:
    """By its exit code at once, else when it has died six times in a row."""
    (supervised.folder / "first.code").write_text(str(code))
    supervised.children[0].kill()
    assert supervised.ended()[0] == (2 if code == 2 else 1)
    assert supervised.log.count("first start") == num_starts
    assert "third int" in supervised.log


@pytest.mark.parametrize("kind", ["together"])
@pytest.mark.parametrize("victim", [1, 2])
def test_who_starts_together_is_killed_together_and_the_others_go_on(
    supervised: Supervised, victim: int
) -> None:
    other = supervised.children[3 - victim]
    other.suspend()  # as one that waits for the victim and hears nothing
    supervised.log_file.unlink()
    supervised.children[victim].kill()
    supervised.until_started_again("second", "third")
    assert not other.is_running()
    assert sorted(supervised.log) == ["second start", "third start"]
    supervised.process.send_signal(signal.SIGTERM)
    code, errors = supervised.ended()
    assert code == 0
    assert errors.count("it starts again") == 1
    assert supervised.no_child_is_left()


@pytest.mark.parametrize("kind", ["together"])
def test_a_child_that_stands_still_is_killed_by_the_word_of_another(
    supervised: Supervised,
) -> None:
    supervised.children[1].suspend()
    supervised.log_file.unlink()
    supervised.say("lost", "first", "second")
    supervised.until_started_again("second", "third")
    assert supervised.children[0].is_running()  # who does not start again is not killed
    supervised.process.kill()
    assert supervised.no_child_is_left()


@pytest.mark.parametrize("kind", ["together"])
def test_only_deaths_since_the_last_word_of_serving_count(supervised: Supervised) -> None:
    for _ in range(8):
        supervised.say("serving", "second", "third")
        while (supervised.folder / "say").exists():
            time.sleep(0.01)
        supervised.log_file.unlink()
        supervised.children[1].kill()
        supervised.until_started_again("second", "third")
    assert supervised.process.poll() is None
    (supervised.folder / "second.code").write_text("3")
    supervised.children[1].kill()
    assert supervised.ended()[0] == 1


@pytest.mark.parametrize("kind", ["together"])
def test_one_that_stands_by_takes_the_place_of_one_that_died(supervised: Supervised) -> None:
    supervised.say("serving", "second", "third")
    supervised.until("third standby")
    assert "second standby" not in supervised.log
    stood_by = supervised.standby("third")
    supervised.log_file.unlink()
    supervised.children[1].kill()
    supervised.until_started_again("second", "third")
    assert supervised.log.index("third woken") < supervised.log.index("third start")
    assert supervised.children[2] == stood_by
    # The next one comes when they serve again.
    assert "third standby" not in supervised.log
    supervised.say("serving", "second", "third")
    supervised.until("third standby")
    assert supervised.standby("third") != stood_by


@pytest.mark.parametrize("kind", ["together"])
def test_one_that_died_while_it_stood_by_is_not_missed(supervised: Supervised) -> None:
    supervised.say("serving", "third")
    supervised.until("third standby")
    stood_by = supervised.standby("third")
    stood_by.kill()
    psutil.wait_procs([stood_by], timeout=20)
    supervised.log_file.unlink()
    supervised.children[2].kill()
    supervised.until_started_again("second", "third")
    assert "third woken" not in supervised.log
    assert supervised.children[2] != stood_by


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("kind", ["together"])
def test_none_stands_by_for_a_supervisor_that_is_gone(
    supervised: Supervised, number: signal.Signals
) -> None:
    supervised.say("serving", "third")
    supervised.until("third standby")
    supervised.children.append(supervised.standby("third"))
    supervised.process.send_signal(number)
    supervised.ended()
    assert supervised.no_child_is_left()


def test_a_killed_child_is_told_by_its_signal(supervised: Supervised) -> None:
    os.kill(supervised.children[1].pid, signal.SIGKILL)
    code, errors = supervised.ended()
    assert code == 1
    assert "was killed by SIGKILL; ending everything" in errors


@pytest.mark.parametrize("kind", ["deaf"])
def test_a_child_that_does_not_end_is_killed(supervised: Supervised) -> None:
    supervised.process.send_signal(signal.SIGTERM)
    code, errors = supervised.ended()
    assert code == 1
    assert "first does not end; it is killed" in errors
    assert supervised.log[-1] == "third end"


def test_kill_minus_9_of_the_supervisor_leaves_nothing_behind(supervised: Supervised) -> None:
    supervised.process.kill()
    assert supervised.no_child_is_left()


def test_ctrl_c_on_the_terminal_reaches_the_supervisor_alone(supervised: Supervised) -> None:
    groups = {os.getpgid(child.pid) for child in supervised.children}
    assert os.getpgid(supervised.process.pid) not in groups
    assert len(groups) == len(NAMES)
