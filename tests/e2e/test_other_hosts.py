"""A model served by workers that reach the scheduler over TCP, as those of other hosts do."""

from __future__ import annotations

from pathlib import Path

from tests.core.keys import Place
from tests.e2e.server import Server
from tokenloom.client import Client

POCKET = Path(__file__).parents[2] / "models" / "pocket"
TEXT = "The quick brown fox"
WORKER = ("--device=cpu", "--cpu-threads=1", "--kv-cache-bytes=16MiB")


def scheduler(place: Place, *options: str) -> Server:
    given = [f"--{name.replace('_', '-')}={value}" for name, value in place.config.items()]
    return Server("scheduler", "--model", str(POCKET), *given, *options)


def completion(client: Client) -> str:
    return client.generate(TEXT, max_tokens=24, temperature=0.0).result().text


def test_one_rank_and_two_of_two_addresses_answer_the_same(tmp_path: Path) -> None:
    place = Place.make(tmp_path)
    with scheduler(place) as server:
        server.start("tokenloom.worker", *place.worker(), *WORKER)
        with server.client() as client:
            alone = completion(client)
        server.assert_unharmed()
        assert server.stop() == 0
    with scheduler(place, "--tensor-parallel=2") as server:
        workers = [
            server.start("tokenloom.worker", *place.worker(), *WORKER, f"--host={host}")
            for host in ("127.0.0.1", "127.0.0.2")
        ]
        with server.client() as client:
            assert completion(client) == alone
        server.assert_unharmed()
        assert server.stop() == 0
        assert [worker.wait(30) for worker in workers] == [0, 0]
