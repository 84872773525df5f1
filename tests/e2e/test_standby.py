"""A worker that stood by takes the place of one that was killed, and the stream goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from tests.e2e.server import START_TIMEOUT_S, Server, wait_until

POCKET = Path(__file__).parents[2] / "models" / "pocket"
PROMPT = [1, *range(300, 340)]
ASKED: dict[str, Any] = {"temperature": 0, "max_tokens": 200, "ignore_eos": True}
OPTIONS = ("--standby", "--kv-cache-bytes=16MiB", "--cpu-threads=1")


def test_a_stream_goes_on_with_the_worker_that_stood_by() -> None:
    with Server.of_model(POCKET, *OPTIONS) as server, server.client() as client:
        expected = client.generate(PROMPT, **ASKED).result().token_ids
        [worker] = server.inspect().pids

        def has_come() -> bool:
            return len(server.workers()) == 2

        wait_until(has_come, START_TIMEOUT_S, alive=server.scheduler)
        [standby] = [each for each in server.workers() if each.pid != worker]
        with client.generate(PROMPT, **ASKED) as stream:
            next(iter(stream))
            psutil.Process(worker).kill()
            result = stream.result()
        assert result.token_ids == expected
        assert server.inspect().pids == (standby.pid,)
        assert server.stop() == 0
        assert not standby.is_running()
