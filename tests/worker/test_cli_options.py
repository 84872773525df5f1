"""What the worker's command line says of wrong options."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tokenloom.worker.cli import worker


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--kv-memory-fraction", "2", "2 is no fraction above 0 and up to 1"),
        ("--kv-cache-bytes", "lots", "'lots' is no size; write 4096, 256MiB or 1.5GiB"),
        ("--attention", "foo", "invalid choice: 'foo'"),
        ("--cpu-threads", "0", "'0' is no whole number of 1 or more"),
        ("--spin-us", "-1", "'-1' is no whole number of 0 or more"),
        ("--profile-steps", "0", "'0' is no whole number of 1 or more"),
    ],
)
def test_a_wrong_option_is_explained(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        worker(["--connect", "ipc:///nowhere", f"{option}={value}"])
    assert exit_info.value.code == 2
    assert said in capsys.readouterr().err


KEYS = ("--server-key=scheduler.key", "--key=worker.key_secret")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--connect=tcp://10.0.0.1:5555",), "tcp://10.0.0.1:5555 takes keys: --server-key"),
        (("--connect=tcp://10.0.0.1:5555", KEYS[0]), "takes keys: --server-key"),
        (("--connect=tcp://10.0.0.1:5555", KEYS[1]), "takes keys: --server-key"),
        (("--connect=tcp://10.0.0.1:5555", *KEYS), "worker.key_secret cannot be read"),
        (("--connect=ipc:///nowhere", *KEYS), "ipc:///nowhere takes no keys"),
    ],
)
def test_tcp_takes_keys_and_nothing_else_does(
    options: tuple[str, ...], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert worker(list(options)) == 2
    assert said in caplog.text


def test_a_worker_logs_in_the_form_that_it_is_told() -> None:
    command = [sys.executable, "-m", "tokenloom.worker", "--connect=tcp://10.0.0.1:5555"]
    done = subprocess.run(
        [*command, "--log-format=json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    record = json.loads(done.stderr)
    assert (record["process"], record["level"]) == ("worker", "error")
    assert "takes keys" in record["message"]
