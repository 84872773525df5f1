"""Spans and log lines of real servers: fronts, core and fake workers as processes of their own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import TracerProvider

from tests.e2e.collector import Collector, attributes, events
from tests.e2e.server import Server, wait_until
from tests.front.checkpoints import byte_level_tokenizer, write_checkpoint
from tokenloom.client import Client, ServerError, TokenloomError
from tokenloom.v1 import inference_pb2 as pb
from tokenloom.v1.inference_pb2_grpc import InferenceStub

FAULTY, FATAL = 398, 399
WORKER = (
    *("--vocab-size=400", "--step-ms=5", "--crash=raise", "--log-format=json"),
    *(f"--faulty-token-id={FAULTY}", f"--fatal-token-id={FATAL}"),
    *("--num-blocks=12", "--block-size=16", "--max-model-tokens=192"),
)
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "xyzzy-plugh-4711"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", byte_level_tokenizer())


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "log"


@pytest.fixture(scope="module")
def server(checkpoint: Path, collector: Collector, log: Path) -> Iterator[Server]:
    options = (
        *(f"--otlp-endpoint={collector.endpoint}", "--log-format=json"),
        *("--max-crashes=20", "--gpu-hour-price=1800"),
    )
    stderr = os.dup(2)
    try:
        with log.open("wb") as file, pytest.MonkeyPatch.context() as patch:
            os.dup2(file.fileno(), 2)  # which the processes inherit
            patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
            with Server.of_fakes(checkpoint, "--num-fronts=2", *options, worker=WORKER) as server:
                os.dup2(stderr, 2)
                server.client().close()
                yield server
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.address) as client:
        client.wait_ready(timeout_s=30)
        yield client


def ended(log: Path, request_id: str) -> dict[str, Any]:
    """Waits for the line of a request."""
    found: list[dict[str, Any]] = []

    def has_come() -> bool:
        lines = log.read_text().rpartition("\n")[0].splitlines()
        records = [json.loads(line) for line in lines if request_id in line]
        found.extend(record for record in records if record["message"] == "request ended")
        return bool(found)

    wait_until(has_come, 30)
    return found[0]


def generate(server: Server, request: pb.GenerateRequest, *metadata: tuple[str, str]) -> str:
    """Returns the id of a request that went well."""
    with grpc.insecure_channel(server.address) as channel:
        first, *_ = InferenceStub(channel).Generate(request, metadata=metadata)
        return str(first.admission.request_id)


def request(tokens: tuple[int, ...] = (1, 2, 3), max_tokens: int = 5) -> pb.GenerateRequest:
    made = pb.GenerateRequest(tokens=pb.TokenIds(ids=tokens))
    made.stopping.max_tokens = max_tokens
    made.stopping.ignore_eos = True
    return made


def test_a_span_tells_what_became_of_a_request(
    server: Server, collector: Collector, log: Path
) -> None:
    parent = ("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-01")
    made = request(max_tokens=5)
    made.sampling.temperature = 0.5
    request_id = generate(server, made, parent, ("tracestate", "vendor=1"))
    span = collector.span(request_id)
    assert span.name == "tokenloom.v1.Inference/Generate"
    assert span.kind == Span.SPAN_KIND_SERVER
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
    assert span.trace_state == "vendor=1"
    assert events(span) == ["tokenloom.admitted", "tokenloom.first_token"]
    told = attributes(span)
    assert (
        told.items()
        >= {
            "rpc.system.name": "grpc",
            "rpc.response.status_code": "OK",
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": "tiny",
            "gen_ai.request.max_tokens": 5,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.usage.input_tokens": 3,
            "gen_ai.usage.output_tokens": 5,
            "gen_ai.usage.cache_read.input_tokens": 0,
        }.items()
    )
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    line = ended(log, request_id)
    assert (
        line.items()
        >= {
            "process": "front",
            "code": "OK",
            "reason": "length",
            "num_prompt_tokens": 3,
            "num_completion_tokens": 5,
            "trace_id": TRACE_ID,
            "span_id": span.span_id.hex(),
        }.items()
    )
    assert 0 < line["first_token_s"] <= line["total_s"]
    assert 0 < line["gpu_s"] == pytest.approx(2 * line["price"], abs=1e-5)
    assert told["tokenloom.gpu_s"] == pytest.approx(line["gpu_s"], abs=1e-5)
    assert {each["service.name"] for each in collector.resources} == {"tokenloom"}


def test_without_a_parent_a_span_begins_a_trace(server: Server, collector: Collector) -> None:
    span = collector.span(generate(server, request()))
    assert span.parent_span_id == b""


def test_what_the_parent_does_not_sample_is_not_sent_and_is_in_the_log(
    server: Server, collector: Collector, log: Path
) -> None:
    trace_id = "1" * 32
    quiet = generate(server, request(), ("traceparent", f"00-{trace_id}-{SPAN_ID}-00"))
    assert ended(log, quiet)["trace_id"] == trace_id
    collector.span(generate(server, request()))
    assert trace_id not in {span.trace_id.hex() for span in collector.spans}


def test_a_caller_with_a_current_span_is_the_parent(client: Client, collector: Collector) -> None:
    trace.set_tracer_provider(TracerProvider())
    with trace.get_tracer("caller").start_as_current_span("caller") as caller:
        stream = client.generate([1, 2, 3], max_tokens=2)
        stream.result()
    span = collector.span(stream.admission().request_id)
    assert int.from_bytes(span.parent_span_id) == caller.get_span_context().span_id


def test_a_refusal_has_a_span_with_its_status(client: Client, collector: Collector) -> None:
    with pytest.raises(TokenloomError):
        client.generate([1, 2, 3], temperature=-1).result()
    span = collector.wait_for("error.type", "INVALID_REQUEST")
    assert attributes(span)["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert span.status.code == span.status.STATUS_CODE_UNSET  # the client's fault
    assert events(span) == []


def test_a_deadline_that_passes_and_a_client_that_leaves_are_told_apart(
    client: Client, collector: Collector, log: Path
) -> None:
    left = client.generate([1, 2, 3], max_tokens=180, ignore_eos=True)
    request_id = left.admission().request_id
    left.cancel()
    assert attributes(collector.span(request_id))["rpc.response.status_code"] == "CANCELLED"
    assert ended(log, request_id)["num_completion_tokens"] < 180
    late = client.generate([1, 2, 3], max_tokens=180, ignore_eos=True, timeout_s=0.3)
    request_id = late.admission().request_id
    with pytest.raises(TokenloomError):
        late.result()
    span = collector.span(request_id)
    assert attributes(span)["rpc.response.status_code"] == "DEADLINE_EXCEEDED"
    assert span.status.code == span.status.STATUS_CODE_ERROR


def test_a_fault_has_its_id_in_span_and_log(
    client: Client, collector: Collector, log: Path
) -> None:
    with pytest.raises(ServerError) as raised:
        client.generate([1, FAULTY], max_tokens=2).result()
    span = collector.wait_for("tokenloom.fault_id", raised.value.fault_id)
    assert attributes(span)["error.type"] == "MODEL_FAULT"
    assert span.status.code == span.status.STATUS_CODE_ERROR
    assert ended(log, str(raised.value.fault_id))["reason"] == "MODEL_FAULT"


def test_preemption_is_an_event(client: Client, collector: Collector) -> None:
    # Two of 8 blocks each do not fit into 12.
    streams = [
        client.generate([place, 2, 3], max_tokens=125, ignore_eos=True) for place in range(2)
    ]
    ids = [stream.admission().request_id for stream in streams]
    for stream in streams:
        stream.result()
    told = [events(collector.span(request_id)) for request_id in ids]
    assert "tokenloom.preempted" in told[1]
    assert "tokenloom.preempted" not in told[0]


def test_recovery_is_an_event(server: Server, client: Client, collector: Collector) -> None:
    stream = client.generate([1, 2, 3], max_tokens=150, ignore_eos=True)
    next(stream)
    os.kill(server.inspect().pids[0], signal.SIGKILL)
    stream.result()
    assert events(collector.span(stream.admission().request_id)) == [
        "tokenloom.admitted",
        "tokenloom.first_token",
        "tokenloom.model_lost",
        "tokenloom.recovered",
    ]


def test_no_log_and_no_span_has_a_word_of_what_callers_send(
    server: Server, client: Client, collector: Collector, log: Path
) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content=SECRET)])
    stranger = pb.Chat(messages=[pb.ChatMessage(role=SECRET, content="x")])
    stopping = pb.Stopping(max_tokens=20, stop_strings=[SECRET, SECRET[:2]])
    resume = pb.ResumeFrom(fingerprint=SECRET, token_ids=[1])
    wrong = pb.Sampling(temperature=-1)
    requests = [
        pb.GenerateRequest(text=SECRET, stopping=stopping),
        pb.GenerateRequest(chat=chat, stopping=stopping),
        pb.GenerateRequest(chat=stranger, stopping=stopping),
        pb.GenerateRequest(text=SECRET, stopping=stopping, sampling=wrong),
        pb.GenerateRequest(
            text=SECRET, stopping=stopping, resume_from=resume, sampling=pb.Sampling(seed=1)
        ),
        pb.GenerateRequest(text=40 * SECRET, stopping=stopping),
    ]
    keys = ("traceparent", "tracestate", "authorization", "x-secret")
    metadata: list[tuple[str, str | bytes]] = [(key, SECRET) for key in keys]
    metadata.append(("secret-bin", SECRET.encode()))
    told = tuple(metadata)
    with grpc.insecure_channel(server.address) as channel:
        stub = InferenceStub(channel)
        for each in requests:
            with suppress(grpc.RpcError):
                list(stub.Generate(each, metadata=told))
        garbage: Any = channel.unary_stream("/tokenloom.v1.Inference/Generate")
        with suppress(grpc.RpcError):
            list(garbage(b"\xff" + SECRET.encode(), metadata=told))
        with suppress(grpc.RpcError):
            stub.Tokenize(pb.TokenizeRequest(chat=stranger), metadata=told)
    with pytest.raises(ServerError):
        client.generate([1, FATAL], max_tokens=2).result()  # breaks its worker again and again
    wait_until(lambda: server.inspect().num_blocks > 0, 30)
    last = generate(server, request())
    collector.span(last)
    ended(log, last)
    assert SECRET not in log.read_text()
    assert not any(SECRET.encode() in span.SerializeToString() for span in collector.spans)


@pytest.mark.usefixtures("client")
def test_every_line_of_every_process_is_json(log: Path) -> None:
    lines = log.read_text().rpartition("\n")[0].splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["process"] for record in records} == {"serve", "core", "front", "worker"}
    fronts = [record["pid"] for record in records if "listening on" in record["message"]]
    assert len(fronts) == 2


@pytest.mark.parametrize("is_there", [False, True])
def test_a_collector_that_is_away_or_hangs_costs_no_stream_and_not_the_end(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    with Collector() as collector:
        collector.may_answer.clear()
        endpoint = collector.endpoint if is_there else "http://127.0.0.1:1"
        with Server.of_fake(checkpoint, f"--otlp-endpoint={endpoint}") as server:
            with server.client() as client:
                for _ in range(20):  # more than there is room for
                    result = client.generate([1, 2, 3], max_tokens=2, ignore_eos=True).result()
                    assert result.finish_reason == "length"
            assert server.stop() == 0
        assert collector.spans == []
