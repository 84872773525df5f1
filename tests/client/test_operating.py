"""Commands for operators that are given the address that callers dial."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest


@pytest.fixture
def address() -> Iterator[str]:
    """Of a server without a service for operators."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.parametrize(
    ("command", "options"),
    [("drain", ()), ("abort", ("some-request",)), ("profile", ()), ("top", ("--once",))],
)
def test_who_dials_where_callers_do_is_told_of_the_operators_address(
    address: str, command: str, options: tuple[str, ...]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tokenloom.client", command, address, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "--admin-listen" in done.stdout + done.stderr
