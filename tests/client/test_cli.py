import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from tests.client.scripted import (
    abort,
    admission,
    delta,
    error_info,
    finish,
    one_token_and_then_silence,
    serving,
)
from tokenloom.client import cli
from tokenloom.v1 import inference_pb2 as pb

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(
        str(ROOT / part) for part in ("protos", "scheduler", "worker", "client")
    )
}
Responses = Iterator[pb.GenerateResponse]


def tokenloom(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tokenloom.client", *arguments],
        input=given,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
        check=False,
    )


def test_generate_prints_the_text_and_sends_the_options_that_were_given() -> None:
    with serving() as server:
        done = tokenloom(
            *("generate", "Say hello", "--target", server.address),
            *("--temperature", "0", "--stop", "x", "--stop", "y", "--timeout-s", "60"),
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello\n", "")
    assert server.requests == [
        pb.GenerateRequest(
            text="Say hello",
            sampling=pb.Sampling(temperature=0),
            stopping=pb.Stopping(stop_strings=["x", "y"]),
        )
    ]
    assert server.seconds_left[0] is not None


def test_generate_reads_a_prompt_from_standard_input_as_chat_and_prints_json() -> None:
    with serving() as server:
        done = tokenloom(
            "generate", "-", "--chat", "--json", "--target", server.address, given="Hi"
        )
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert (result["text"], result["finish_reason"]) == ("Hello", "stop_token")
    assert result["usage"]["prefill_s"] == 0.25
    assert server.requests[0].chat.messages[0].content == "Hi"


def test_failures_are_told_on_stderr_with_status_1() -> None:
    def respond(context: grpc.ServicerContext) -> Responses:
        yield admission()
        yield delta(0, 1, text="so far")
        abort(context, grpc.StatusCode.INTERNAL, "the server failed; fault f7", [])

    with serving(respond) as server:
        done = tokenloom("generate", "a", "--target", server.address)
    assert (done.returncode, done.stdout) == (1, "so far\n")
    assert done.stderr == "tokenloom: the server failed; fault f7\n"
    nobody = tokenloom("generate", "a", "--target", "127.0.0.1:1")
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert nobody.stderr.startswith("tokenloom: no server at 127.0.0.1:1: ")


def test_answer_that_takes_too_long_and_one_that_is_refused_are_told_in_words() -> None:
    def respond(context: grpc.ServicerContext) -> Responses:
        if len(server.requests) == 1:
            yield from one_token_and_then_silence(context)
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(1500)
        details = [error_info("QUEUE_FULL"), retry]
        abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "2048 requests wait", details)

    with serving(respond) as server:
        late = tokenloom("generate", "a", "--target", server.address, "--timeout-s", "0.5")
        full = tokenloom("generate", "a", "--target", server.address)
    assert (late.returncode, late.stdout) == (1, "x\n")
    assert late.stderr == "tokenloom: the answer took longer than --timeout-s allows\n"
    assert (full.returncode, full.stdout) == (1, "")
    assert full.stderr == "tokenloom: 2048 requests wait\n  try again in 1.5 s\n"


def test_wrong_command_lines_have_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["fly"]) == 2
    assert "no command 'fly'" in capsys.readouterr().err
    for arguments in (["generate"], ["generate", "a", "--top-k", "-1", "--target", "127.0.0.1:1"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
    assert "top_k" in capsys.readouterr().err


def test_help_shows_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert "generate" in capsys.readouterr().out
    for command in ("generate", "chat"):
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--help"])
        assert caught.value.code == 0
        told = " ".join(capsys.readouterr().out.split())
        assert "(default: localhost:50051)" in told
        assert told.count("(default: ") >= told.count(" N ") + told.count(" X ") - 1


def test_command_of_an_installed_part_gets_the_rest_of_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "other_part-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-part\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[tokenloom.commands]\nweave = other_part:weave\n")
    (tmp_path / "other_part.py").write_text(
        "def weave(argv):\n    print('weaving', argv)\n    return 5\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main(["weave", "--help", "me"]) == 5
    assert capsys.readouterr().out == "weaving ['--help', 'me']\n"
    assert cli.main(["--help"]) == 0
    assert re.search("weave +from other-part", capsys.readouterr().out)


def test_command_of_a_part_that_is_only_on_the_path_is_told_how_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda **_group: ())
    assert cli.main(["serve", "model"]) == 2
    assert "run `python -m tokenloom.scheduler serve`" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert cli.main(["worker"]) == 2
    assert "pip install tokenloom-worker" in capsys.readouterr().err


def test_interrupted_generate_has_the_status_of_an_interrupt() -> None:
    with serving(one_token_and_then_silence) as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "tokenloom.client", "generate", "a", "--target", server.address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
        )
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (130, b"")
        assert server.left.wait(30)


class Terminal:
    """A process on a terminal of its own, as a person has it."""

    def __init__(self, keyboard: int) -> None:
        self._keyboard = keyboard
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self._keyboard, text.encode())

    def wait_for(self, text: str) -> None:
        """Reads until the text is on the screen, below what was waited for before."""
        while text not in self.screen:
            ready, _, _ = select.select([self._keyboard], [], [], 60)
            assert ready, f"no {text!r} in {self.screen!r}"
            self.screen += os.read(self._keyboard, 4096).decode()
        self.screen = self.screen[self.screen.index(text) + len(text) :]

    def press(self, key: str, text: str) -> None:
        """Types a key, again each second, until the text is on the screen.

        Python's readline does not see a signal that comes between its prompt and its wait for
        the keyboard until the next key.
        """
        for _ in range(60):
            self.type(key)
            ready, _, _ = select.select([self._keyboard], [], [], 1.0)
            if ready:
                break
        self.wait_for(text)


@contextmanager
def chatting(address: str, *arguments: str) -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    keyboard, screen = pty.openpty()
    become_foreground = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    run = "import runpy; runpy.run_module('tokenloom.client', run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", become_foreground + run, "chat", "--target", address, *arguments],
        stdin=screen,
        stdout=screen,
        stderr=screen,
        env=ENVIRONMENT | {"TERM": "dumb"},
        start_new_session=True,
    )
    os.close(screen)
    try:
        yield Terminal(keyboard), process
    finally:
        process.kill()
        process.wait()
        os.close(keyboard)


def test_interrupt_in_a_chat_cancels_the_answer_and_not_the_session() -> None:
    def respond(context: grpc.ServicerContext) -> Responses:
        if len(server.requests) == 1:
            return one_token_and_then_silence(context)
        return iter([admission(), delta(0, 5, text="second answer"), finish(1)])

    with serving(respond) as server, chatting(server.address) as (terminal, process):
        terminal.wait_for("> ")
        terminal.type("first\n")
        terminal.wait_for("x")
        terminal.type("\x03")
        terminal.wait_for("[cancelled]")
        assert server.left.wait(30)
        terminal.wait_for("> ")
        terminal.type("second\n")
        terminal.wait_for("second answer")
        terminal.wait_for("> ")
        terminal.press("\x03", "Ctrl-D leaves")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert process.wait(60) == 0
    said = [(turn.role, turn.content) for turn in server.requests[1].chat.messages]
    assert said == [("user", "first"), ("assistant", "x"), ("user", "second")]


def test_chat_keeps_its_history_until_it_is_reset() -> None:
    lines = ["one", "two", "/reset", "three", "/system Be brief.", "four", "/system", "five", ""]
    with serving() as server:
        done = tokenloom("chat", "--target", server.address, given="\n".join(lines))
    assert (done.returncode, done.stdout) == (0, "Hello\n" * 5)
    assert [
        [(turn.role[0], turn.content) for turn in request.chat.messages]
        for request in server.requests
    ] == [
        [("u", "one")],
        [("u", "one"), ("a", "Hello"), ("u", "two")],
        [("u", "three")],
        [("s", "Be brief."), ("u", "four")],
        [("u", "five")],
    ]


def test_failed_answer_leaves_the_session_and_the_history_as_they_were() -> None:
    def respond(context: grpc.ServicerContext) -> Responses:
        if len(server.requests) == 1:
            abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "full", [error_info("QUEUE_FULL")])
        return iter([admission(), delta(0, 1, text="ok"), finish(1)])

    with serving(respond) as server:
        done = tokenloom("chat", "--target", server.address, given="one\ntwo\n")
    assert (done.returncode, done.stdout) == (0, "ok\n")
    assert done.stderr == "tokenloom: full\n"
    assert [turn.content for turn in server.requests[1].chat.messages] == ["two"]


def test_import_of_the_client_loads_nothing_of_the_other_parts() -> None:
    script = "import sys, tokenloom.client, tokenloom.client.testing; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "grpc" in loaded
    others = {"tokenloom.scheduler", "tokenloom.worker", "tokenloom.wire", "google.rpc"}
    assert others.union({"torch", "zmq", "msgspec", "numpy", "rich"}).isdisjoint(loaded)
