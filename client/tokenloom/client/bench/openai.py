"""Calls of an OpenAI-compatible server: `/completions` with a stream of server-sent events.

Only what such a stream needs of HTTP/1.1, on asyncio's own sockets, so that hosts where nothing
can be installed can run a comparison and a token costs the client little. Each request has a
connection of its own, which is part of its time to the first token.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from tokenloom.client.bench.load import OpenAI
from tokenloom.client.bench.record import CallFailed, Clock, Record, Send
from tokenloom.client.bench.workload import Request

_LINE_LIMIT_BYTES = 1 << 20
_EVENT = b"data:"
_DONE = b"[DONE]"


class OpenAICaller:
    """Makes a connection for each request."""

    def __init__(
        self, endpoint: OpenAI, *, ignore_eos: bool, temperature: float, timeout_s: float | None
    ) -> None:
        parts = urlsplit(endpoint.url)
        self._is_tls = parts.scheme == "https"
        self._host = parts.hostname or "localhost"
        self._port = parts.port or (443 if self._is_tls else 80)
        self._path = parts.path.rstrip("/") + "/completions"
        self._host_header = parts.netloc.rpartition("@")[2]
        self._timeout_s = timeout_s
        self._fields: dict[str, Any] = {
            "model": endpoint.model,
            "temperature": temperature,
            "stream": True,
            # With the second, servers that know it tell in each chunk how many tokens there are.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if ignore_eos:
            self._fields["ignore_eos"] = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves nothing open: each call closes its connection."""

    def prepare(self, request: Request) -> Send:
        """Writes the whole HTTP request."""
        is_text = isinstance(request.prompt, str)
        fields = self._fields | {"prompt": request.prompt if is_text else list(request.prompt)}
        if request.max_tokens is not None:
            fields["max_tokens"] = request.max_tokens
        body = json.dumps(fields).encode()
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: {self._host_header}\r\n"
            "Content-Type: application/json\r\nAccept: text/event-stream\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        data = head.encode() + body

        async def send(record: Record, clock: Clock) -> None:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._exchange(data, record, clock)
            except TimeoutError as error:
                raise CallFailed("TIMEOUT", "") from error
            except (OSError, EOFError) as error:
                raise CallFailed("CONNECTION", type(error).__name__) from error
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                # Not HTTP, not JSON, or not of this API's form.
                raise CallFailed("BAD_RESPONSE", type(error).__name__) from error

        return send

    async def _exchange(self, data: bytes, record: Record, clock: Clock) -> None:
        reader, writer = await asyncio.open_connection(
            self._host, self._port, ssl=self._is_tls or None, limit=_LINE_LIMIT_BYTES
        )
        try:
            writer.write(data)
            status = int((await reader.readline()).split()[1])
            headers = await _headers(reader)
            lines = _lines(reader, headers)
            if status != 200:
                raise CallFailed(
                    f"HTTP {status}", _reason(b"".join([line async for line in lines]))
                )
            await _read_events(lines, record, clock)
        finally:
            writer.close()


async def _read_events(lines: AsyncIterator[bytes], record: Record, clock: Clock) -> None:
    """Notes each chunk that has tokens.

    How many it has is told by the usage that comes with it. Where no usage comes along, a chunk
    with text counts as one, and the usage at the end, if there is one, is spread evenly.
    """
    num_tokens = 0
    told_each = False
    usage: Mapping[str, Any] | None = None
    async for line in lines:
        if not line.startswith(_EVENT):
            continue
        data = line[len(_EVENT) :].strip()
        if data == _DONE:
            break
        chunk = json.loads(data)
        if "error" in chunk:
            raise CallFailed("STREAM_ERROR", _reason(data))
        usage = chunk.get("usage") or usage
        choices = chunk["choices"]
        if not choices:
            continue  # the usage at the end
        if chunk.get("usage"):
            told_each = True
            num_new = chunk["usage"]["completion_tokens"] - num_tokens
        else:
            num_new = 1 if choices[0]["text"] else 0
        if num_new > 0:
            record.delta_s.append(clock.now_s())
            record.delta_tokens.append(num_new)
            num_tokens += num_new
    else:
        raise CallFailed("BAD_RESPONSE", "NO_DONE")
    if usage is not None:
        record.num_prompt_tokens = usage["prompt_tokens"]
        if not told_each and record.delta_s:
            _spread(usage["completion_tokens"], record)


def _spread(num_tokens: int, record: Record) -> None:
    """Gives the deltas as many tokens in all, evenly; one that is left without is none."""
    num_deltas = len(record.delta_s)
    starts = [-(-num_tokens * index // num_deltas) for index in range(num_deltas + 1)]
    shares = [after - before for before, after in itertools.pairwise(starts)]
    record.delta_s = [moment_s for moment_s, n in zip(record.delta_s, shares, strict=True) if n]
    record.delta_tokens = [n for n in shares if n]


def _reason(body: bytes) -> str:
    """Returns the type of an error, in the forms that servers give it; empty if there is none."""
    try:
        error = json.loads(body)
    except ValueError:
        return ""
    if isinstance(error, dict) and isinstance(error.get("error"), dict):
        error = error["error"]
    if not isinstance(error, dict):
        return ""
    return str(error.get("type") or error.get("code") or "")


async def _headers(reader: asyncio.StreamReader) -> dict[str, str]:
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip().lower()
    return headers


async def _lines(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """Yields the lines of a body, whatever the chunks of its transfer."""
    if "chunked" not in headers.get("transfer-encoding", ""):
        while line := await reader.readline():
            yield line
        return
    rest = b""
    while size := int((await reader.readline()).partition(b";")[0], 16):
        *lines, rest = (rest + (await reader.readexactly(size + 2))[:-2]).split(b"\n")
        for line in lines:
            yield line
    yield rest
