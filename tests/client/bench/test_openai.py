"""The OpenAI side against a small HTTP server that streams events."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tokenloom.client import cli
from tokenloom.client.bench.load import OpenAI
from tokenloom.client.bench.openai import OpenAICaller
from tokenloom.client.bench.record import CallFailed, Clock, Record
from tokenloom.client.bench.workload import Request


class Endpoint:
    """Answers each request with the same status and body, cut into pieces of the transfer."""

    def __init__(self, status: int, pieces: Sequence[bytes], *, chunked: bool = True) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.status = status
        self.pieces = pieces
        self.chunked = chunked


@contextmanager
def answering(endpoint: Endpoint) -> Iterator[Endpoint]:
    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            endpoint.bodies.append(json.loads(self.rfile.read(size)))
            endpoint.paths.append(self.path)
            self.send_response(endpoint.status)
            self.send_header("Content-Type", "text/event-stream")
            if endpoint.chunked:
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in endpoint.pieces:
                data = b"%x\r\n%s\r\n" % (len(piece), piece) if endpoint.chunked else piece
                self.wfile.write(data)
                self.wfile.flush()
            if endpoint.chunked:
                self.wfile.write(b"0\r\n\r\n")
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as its base
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def event(text: str | None = None, usage: tuple[int, int] | None = None) -> bytes:
    chunk: dict[str, Any] = {"choices": [] if text is None else [{"text": text}]}
    if usage is not None:
        chunk["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
TOLD_EACH = [event("a", (3, 1)), event("", (3, 2)), event("bcd", (3, 5)), event(None, (3, 5)), DONE]


async def call(endpoint: Endpoint, prompt: str | list[int] = "x") -> Record:
    record = Record(index=0, due_s=0.0, sent_s=0.0, num_asked_tokens=5)
    server = OpenAI(url=endpoint.url, model="m")
    caller = OpenAICaller(server, ignore_eos=True, temperature=0.0, timeout_s=30.0)
    async with caller:
        await caller.prepare(Request(prompt=prompt, max_tokens=5))(record, Clock(0.0))
    return record


async def test_request_asks_for_a_stream_of_exactly_so_many_tokens() -> None:
    with answering(Endpoint(200, TOLD_EACH)) as endpoint:
        await call(endpoint, [7, 8, 9])
        await call(endpoint, "text")
    assert endpoint.paths == ["/v1/completions"] * 2
    first, second = endpoint.bodies
    assert (first["prompt"], second["prompt"]) == ([7, 8, 9], "text")
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("m", 5, 0.0)
    assert (first["stream"], first["ignore_eos"]) == (True, True)


async def test_tokens_of_a_chunk_are_what_its_usage_tells() -> None:
    with answering(Endpoint(200, TOLD_EACH)) as endpoint:
        record = await call(endpoint)
    assert record.delta_tokens == [1, 1, 3]
    assert len(record.delta_s) == 3
    assert sorted(record.delta_s) == record.delta_s
    assert record.num_prompt_tokens == 3


async def test_events_may_be_cut_anywhere_and_need_no_chunked_transfer() -> None:
    whole = b"".join(TOLD_EACH)
    for size in (1, 7, len(whole)):
        pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
        for chunked in (True, False):
            with answering(Endpoint(200, pieces, chunked=chunked)) as endpoint:
                assert (await call(endpoint)).delta_tokens == [1, 1, 3]


async def test_usage_that_comes_at_the_end_alone_is_spread_over_the_chunks() -> None:
    pieces = [event("a"), event("b"), event(""), event("c"), event(None, (4, 7)), DONE]
    with answering(Endpoint(200, pieces)) as endpoint:
        record = await call(endpoint)
    assert (record.delta_tokens, record.num_prompt_tokens) == ([3, 2, 2], 4)
    with answering(Endpoint(200, [event("a"), event("b"), event(None, (4, 1)), DONE])) as endpoint:
        record = await call(endpoint)
    assert (record.delta_tokens, len(record.delta_s)) == ([1], 1)


async def test_without_usage_a_chunk_with_text_is_a_token() -> None:
    with answering(Endpoint(200, [event("a"), event(""), event("b"), DONE])) as endpoint:
        assert (await call(endpoint)).delta_tokens == [1, 1]


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (429, b'{"error": {"type": "rate_limit", "message": "no"}}', ("HTTP 429", "rate_limit")),
        (400, b'{"object": "error", "type": "BadRequest"}', ("HTTP 400", "BadRequest")),
        (502, b"<html>", ("HTTP 502", "")),
        (200, event("a") + b'data: {"error": {"type": "Oops"}}\n\n', ("STREAM_ERROR", "Oops")),
        (200, event("a"), ("BAD_RESPONSE", "NO_DONE")),
        (200, b"data: {nonsense\n\n", ("BAD_RESPONSE", "JSONDecodeError")),
        (200, b'data: {"choices": 3}\n\n', ("BAD_RESPONSE", "TypeError")),
    ],
)
async def test_errors_have_a_status_and_a_reason(
    status: int, body: bytes, error: tuple[str, str]
) -> None:
    with answering(Endpoint(status, [body])) as endpoint, pytest.raises(CallFailed) as caught:
        await call(endpoint)
    assert (caught.value.code, caught.value.reason) == error


async def test_server_that_is_not_there_is_an_error_too() -> None:
    with answering(Endpoint(200, [])) as endpoint:
        pass
    with pytest.raises(CallFailed) as caught:
        await call(endpoint)
    assert caught.value.code == "CONNECTION"


def test_command_loads_an_openai_server(tmp_path: Path) -> None:
    file = tmp_path / "seen.json"
    with answering(Endpoint(200, TOLD_EACH)) as endpoint:
        status = cli.main(
            [
                *("bench", "--openai", endpoint.url, "--model", "m", "--vocab-size", "50"),
                *("--concurrency", "2", "--requests", "6", "--processes", "2"),
                *("--input", "3", "--output", "5", "--json", str(file)),
            ]
        )
    assert status == 0
    report = json.loads(file.read_text())
    (point,) = report["points"]
    assert (report["api"], report["model"]) == ("openai", "m")
    assert (point["num_done"], point["num_output_tokens"], point["num_short"]) == (6, 30, 0)
    prompts = {tuple(body["prompt"]) for body in endpoint.bodies}
    assert len(prompts) == 6
    assert all(len(prompt) == 3 and max(prompt) < 50 for prompt in prompts)


def test_only_failures_is_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = b'{"error": {"type": "rate_limit"}}'
    with answering(Endpoint(429, [body])) as endpoint:
        arguments = ["bench", "--openai", endpoint.url, "--model", "m", "--requests", "3"]
        status = cli.main([*arguments, "--vocab-size", "50", "--processes", "1"])
    assert status == 1
    assert "3 × HTTP 429 rate_limit" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
