"""What a front tells of its calls once they are over."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.front.fake_core import FakeCore
from tests.front.harness import Front, until
from tests.front.secured import generate, refused, secured
from tokenloom.scheduler.bearer import new_token
from tokenloom.scheduler.config import ConfigError, SchedulerConfig
from tokenloom.scheduler.front import server
from tokenloom.scheduler.front.record import MAX_EVENTS, Event, Record, TraceParent
from tokenloom.scheduler.tenants import digest_of_token
from tokenloom.wire import logs

SECRET = "xyzzy-plugh-4711"
CONFIG = SchedulerConfig(model="m", run_dir="/nowhere")


@pytest.fixture(params=["text", "json"])
def log(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """What the front's process writes, in both forms."""
    form = logs._JsonFormatter if request.param == "json" else logs._TextFormatter
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(form("front", tells_errors=False))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler.stream
    root.removeHandler(handler)
    root.setLevel(level)


async def test_a_fault_that_quotes_the_prompt_is_logged_without_it(
    front: Front, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(text: str, **_: object) -> str:
        words: dict[str, str] = {}
        try:
            return words[text]
        except KeyError as error:
            raise ValueError(f"cannot encode {text}") from error

    monkeypatch.setattr(front.text, "encode", encode)
    refusal = await front.refused(SECRET)
    assert refusal.code is grpc.StatusCode.INTERNAL
    assert SECRET not in refusal.message
    told = log.getvalue()
    assert SECRET not in told
    assert told.count(refusal.info.metadata["fault_id"]) == 2  # where it broke, and the call's line
    assert "ValueError" in told
    assert "in encode" in told


async def test_each_call_has_one_line(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tokenloom.requests")
    done = await front.generate("The quick", max_tokens=4)
    await front.refused("The quick", temperature=-1)
    call = front.stub.Generate(front.request("The quick", max_tokens=50))
    await call.read()
    call.cancel()
    await until(lambda: len(caplog.records) == 3)
    await asyncio.sleep(0.05)
    first, second, third = (vars(record)["fields"] for record in caplog.records)
    assert first["request_id"] == done.admission.request_id
    assert first["num_completion_tokens"] == 4
    assert first["queue_s"] == 0.25  # the core's own figure
    assert (first["code"], first["reason"]) == ("OK", "length")
    assert (second["code"], second["reason"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert (third["code"], third["reason"]) == ("CANCELLED", None)


async def test_a_line_tells_whose_call_it_was_and_of_what_nobody_may_ask(
    core: FakeCore,
    run_dir: Path,
    checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "tokenloom.requests")
    token, tenants = new_token(), tmp_path / "tenants.toml"
    tenants.write_text(f'[tenants.search]\ntoken_sha256 = ["{digest_of_token(token)}"]')
    async with secured(core, run_dir, checkpoint, {"tenants": str(tenants)}) as front:
        bearer = (("authorization", f"Bearer {token}"),)
        await generate(front.server.address, None, metadata=bearer)
        await refused(front.server.address, None)
        await until(lambda: len(caplog.records) == 2)
    served, stranger = (vars(record)["fields"] for record in caplog.records)
    assert (served["tenant"], served["code"]) == ("search", "OK")
    assert (stranger["tenant"], stranger["reason"]) == (None, "NO_IDENTITY")


async def test_a_stream_that_lost_its_model_tells_when_it_went_on(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[Record] = []
    monkeypatch.setattr(front.server._journal, "_tell", records.append)
    front.core.pause_after = 2
    call = front.stub.Generate(front.request("The quick", max_tokens=4))
    message: Any = await call.read()
    while message.WhichOneof("event") != "delta":
        message = await call.read()
    await front.core.lose_model()
    await front.core.load_model()
    front.core.pause_after = None
    while await call.read() is not grpc.aio.EOF:
        pass
    await until(lambda: bool(records))
    assert [event for _, event in records[0].events] == [
        Event.ADMITTED,
        Event.FIRST_TOKEN,
        Event.MODEL_LOST,
        Event.RECOVERED,
    ]
    assert records[0].fields()["num_recoveries"] == 1


@pytest.mark.parametrize(
    "value",
    [
        "",
        SECRET,
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
    ],
)
def test_what_is_no_traceparent_is_none(value: str) -> None:
    assert TraceParent.of([("traceparent", value)]) is None


def test_a_traceparent_of_a_later_version_is_read_as_far_as_it_is_known() -> None:
    value = "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what-comes"
    parent = TraceParent.of([("x", b"y"), ("traceparent", value)])
    assert parent is not None
    assert parent.flags == 1


def test_events_of_a_call_are_bounded() -> None:
    record = Record(parent=None)
    for _ in range(MAX_EVENTS + 10):
        record.mark(Event.PREEMPTED)
    assert len(record.events) == MAX_EVENTS


def test_spans_go_nowhere_unless_somebody_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert server._traces(CONFIG) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    spans = server._traces(CONFIG)
    assert spans is not None
    spans.close()
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert server._traces(CONFIG) is None


def test_an_endpoint_without_opentelemetry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenloom.scheduler.front.tracing", None)
    config = SchedulerConfig(model="m", run_dir="/nowhere", otlp_endpoint="http://localhost:4317")
    with pytest.raises(ConfigError, match=r"tokenloom-scheduler\[otel\]"):
        server._traces(config)
