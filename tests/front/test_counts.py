"""What a front counts of its calls, and that nothing a client sends becomes a label."""

from __future__ import annotations

import random
import re
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import grpc
import grpc.aio
import pytest

from tests.architecture.repository import ROOT
from tests.front.fake_core import FakeCore
from tests.front.harness import Front, until
from tokenloom.scheduler import metrics
from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.front.counts import OTHER, CallCounts
from tokenloom.scheduler.front.record import Event, Record
from tokenloom.scheduler.front.server import FrontServer
from tokenloom.scheduler.front.text import load_text_model
from tokenloom.scheduler.messages import RefusalReason, Refused
from tokenloom.scheduler.sample_files import read_all
from tokenloom.scheduler.samples import Sample

PRICE = 7.2

_Call: TypeAlias = grpc.aio.UnaryStreamMultiCallable[bytes, bytes]


@pytest.fixture
async def front(core: FakeCore, run_dir: Path, checkpoint: Path) -> AsyncIterator[Front]:
    (run_dir / "metrics").mkdir()
    config = SchedulerConfig(
        model=str(checkpoint),
        run_dir=str(run_dir),
        listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
        gpu_hour_price=PRICE,
    )
    text = load_text_model(config.model)
    server = FrontServer(config, text)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        front = Front(server=server, core=core, text=text, channel=channel)
        await front.wait_ready()
        yield front
    await server.stop()


async def told(run_dir: Path) -> list[Sample]:
    """Returns what the front writes from now on."""
    now_s = time.monotonic()
    await until(lambda: next(read_all(run_dir / "metrics")).written_s > now_s)
    return list(next(read_all(run_dir / "metrics")).samples)


def refusals(samples: list[Sample]) -> dict[str, float]:
    name = metrics.REQUESTS_REFUSED.name
    return {sample.labels[0]: sample.value for sample in samples if sample.name == name}


def num_observed(samples: list[Sample], metric: metrics.Metric) -> int:
    (sample,) = (sample for sample in samples if sample.name == metric.name)
    return sum(sample.counts)


async def test_calls_are_counted_by_how_they_ended(front: Front, run_dir: Path) -> None:
    for _ in range(3):
        await front.generate("The quick", max_tokens=4)
    for _ in range(2):
        await front.refused("x", temperature=-1.0)
    left = front.stub.Generate(front.request("The quick", max_tokens=200))
    await left.read()
    left.cancel()
    front.core.answer = lambda submit: Refused(
        stream=submit.stream, reason=RefusalReason.QUEUE_FULL, detail="full", retry_after_s=1.0
    )
    await front.refused("x")
    samples = await told(run_dir)
    assert refusals(samples) == {"INVALID_REQUEST": 2, "QUEUE_FULL": 1}
    assert num_observed(samples, metrics.E2E_REQUEST_LATENCY) == 3
    assert num_observed(samples, metrics.TIME_TO_FIRST_TOKEN) in {3, 4}


async def test_a_finish_tells_the_cost_and_its_price(front: Front) -> None:
    completion = await front.generate("The quick", max_tokens=4)
    assert completion.finish is not None
    cost = completion.finish.cost
    assert (cost.gpu_s, cost.kv_block_s) == (0.5, 3.0)
    assert (cost.num_recomputed_tokens, cost.num_preemptions) == (7, 1)
    assert cost.price == pytest.approx(0.5 * 0.002)


async def test_whatever_clients_send_makes_no_new_series(front: Front, run_dir: Path) -> None:
    chance = random.Random(5)
    call: _Call = front.channel.unary_stream("/tokenloom.v1.Inference/Generate")
    for number in range(150):
        data = chance.randbytes(chance.randint(0, 40))
        if number % 2:
            request = front.request([chance.randrange(1000) for _ in range(3)])
            request.sampling.temperature = chance.uniform(-2, 2)
            data = request.SerializeToString()
        metadata = (
            ("tenant", f"tenant{number}"),
            ("authorization", f"Bearer {number}"),
            ("x-model", f"model{number}"),
        )
        with suppress(grpc.aio.AioRpcError):
            async for _ in call(data, metadata=metadata):
                pass
    samples = await told(run_dir)
    for sample in samples:
        labels = metrics.METRICS_BY_NAME[sample.name].labels
        assert labels in {(), ("reason",)}
        assert set(sample.labels) <= set(metrics.REFUSALS)


def refused_record(reason: str, tenant: str = "") -> Record:
    return Record(parent=None, tenant=tenant, code="UNAVAILABLE", error_reason=reason, ended_s=1.0)


def test_a_reason_that_nobody_foresaw_counts_as_other() -> None:
    counts = CallCounts()
    for reason in ("QUEUE_FULL", "NEVER_HEARD_OF", "NEITHER"):
        counts.end(refused_record(reason))
    assert refusals(list(counts.samples())) == {"QUEUE_FULL": 1, OTHER: 2}


def test_who_was_admitted_is_not_refused_whatever_comes_then() -> None:
    counts = CallCounts()
    record = refused_record("MODEL_FAULT")
    record.mark(Event.ADMITTED)
    counts.end(record)
    assert refusals(list(counts.samples())) == {}


def test_a_tenants_calls_are_counted_for_it_too() -> None:
    counts = CallCounts()
    counts.end(refused_record("TENANT_LIMIT", tenant="search"))
    record = Record(parent=None, tenant="search")
    record.mark(Event.FIRST_TOKEN)
    counts.first_token(record)
    by_name = {sample.name: sample for sample in counts.samples()}
    assert by_name[metrics.TENANT_REQUESTS_REFUSED.name].labels == ("search", "TENANT_LIMIT")
    waited = by_name[metrics.TENANT_TIME_TO_FIRST_TOKEN.name]
    assert (waited.labels, sum(waited.counts)) == (("search",), 1)


def test_every_reason_of_the_protocol_that_refuses_has_its_name_in_metrics() -> None:
    rows = [
        line.split("|")
        for line in (ROOT / "docs/protocol.md").read_text().splitlines()
        if re.match(r"\| [A-Z_, ]+ \| [A-Z_, ]+ \|", line)
    ]
    reasons = {reason.strip() for row in rows for reason in row[2].split(",")}
    after_admission = {"MODEL_CRASH", "MODEL_FAULT", "TOKENS_LOST"}
    assert reasons > after_admission
    assert reasons - after_admission <= set(metrics.REFUSALS)
