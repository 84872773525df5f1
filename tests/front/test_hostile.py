"""Prompts and clients made to take memory and time: they get none of what is others'."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec
import pytest

from tests.front.checkpoints import byte_level_tokenizer, write_checkpoint
from tests.front.fake_core import READY, FakeCore
from tests.front.harness import Front, refusal_of, until
from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.front import errors
from tokenloom.scheduler.front.chat import ChatTemplate, PromptTooLong, TemplateError
from tokenloom.scheduler.front.server import FrontServer
from tokenloom.scheduler.front.text import CheckpointError, load_text_model
from tokenloom.v1 import inference_pb2 as pb

MIB = 1024 * 1024
CONTEXT = 1_050_000
HOSTILE = "a" * 16 * MIB
"""One word, which a tokenizer must take as a whole: gigabytes while it does."""


class Counting:
    """A tokenizer that counts what it encodes."""

    def __init__(self, tokenizer: object) -> None:
        self._tokenizer = tokenizer
        self.num_chars = 0

    def encode_batch_fast(self, texts: list[str], **options: object) -> object:
        self.num_chars += sum(map(len, texts))
        return self._tokenizer.encode_batch_fast(texts, **options)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)


@pytest.fixture
async def wide(front: Front) -> tuple[Front, Counting]:
    """A front whose model takes a context of a million tokens."""
    counting = front.text._tokenizer = Counting(front.text._tokenizer)  # type: ignore[assignment]
    await front.core.load_model(msgspec.structs.replace(READY, max_model_tokens=CONTEXT))
    model = pb.GetModelRequest()
    while (await front.stub.GetModel(model)).max_model_tokens != CONTEXT:
        await asyncio.sleep(0.005)
    return front, counting


class Endless:
    """A stream that goes on until it is cancelled."""

    def __init__(self, front: Front) -> None:
        self.num_tokens = 0
        self._call = front.stub.Generate(front.request([5], max_tokens=500_000))
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for response in self._call:
            self.num_tokens += len(response.delta.token_ids)

    def cancel(self) -> None:
        self._call.cancel()
        self._task.cancel()


async def test_streams_and_new_requests_go_on_while_a_hostile_prompt_is_tokenized(
    wide: tuple[Front, Counting],
) -> None:
    front, counting = wide
    stream = Endless(front)
    await until(lambda: stream.num_tokens > 0)
    before = stream.num_tokens
    hostile = asyncio.create_task(front.refused(HOSTILE))
    await until(lambda: counting.num_chars > 0)
    num_answered = 0
    while not hostile.done():  # longer ones than are tokenized in the event loop
        assert (await front.generate("The fox " * 1000, max_tokens=1)).finish is not None
        num_answered += 1
    found = await hostile
    assert found.info.reason == "PROMPT_TOO_LONG"
    assert (
        found.message
        == f"text: prompt has more than {CONTEXT} tokens; this server accepts {CONTEXT}"
    )
    assert stream.num_tokens - before > 100
    assert num_answered > 3
    stream.cancel()


@pytest.mark.parametrize("hostile", [HOSTILE, "🎉" * 4 * MIB, " \n" * 8 * MIB])
async def test_a_hostile_prompt_is_looked_at_as_far_as_it_may_fit(
    wide: tuple[Front, Counting], hostile: str
) -> None:
    front, counting = wide
    found = await front.refused(hostile)
    assert found.info.reason == "PROMPT_TOO_LONG"
    assert counting.num_chars < 0.6 * len(hostile)


async def test_hostile_prompts_whose_clients_left_take_no_more_time(
    wide: tuple[Front, Counting],
) -> None:
    front, counting = wide
    calls = [front.stub.Generate(front.request(HOSTILE)) for _ in range(3)]
    readers = [asyncio.create_task(refusal_of(call)) for call in calls]
    await until(lambda: counting.num_chars > 0)
    for call, reader in zip(calls, readers, strict=True):
        call.cancel()
        reader.cancel()
    await until(lambda: front.server._servicer._num_running == 0)
    counted = counting.num_chars
    long = "The fox " * 40_000  # waits behind the hostile ones
    assert (await front.generate(long, max_tokens=1)).finish is not None
    assert counting.num_chars - counted < len(long) + MIB


async def test_text_that_waits_to_be_tokenized_is_bounded(wide: tuple[Front, Counting]) -> None:
    front, _ = wide
    calls = [front.stub.Generate(front.request(HOSTILE)) for _ in range(6)]
    found = await asyncio.gather(*(refusal_of(call) for call in calls))
    reasons = [each.info.reason for each in found]
    assert sorted(set(reasons)) == ["PROMPT_TOO_LONG", "QUEUE_FULL"]
    (full, *_) = (each for each in found if each.info.reason == "QUEUE_FULL")
    assert full.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert full.trailers["grpc-retry-pushback-ms"] == "1000"
    assert (await front.generate(max_tokens=1)).finish is not None


def test_a_template_that_multiplies_a_chat_is_stopped() -> None:
    square = "{% for m in messages %}{% for n in messages %}{{ n.content }}{% endfor %}{% endfor %}"
    chat = [("user", "x" * 1000)] * 1000
    with pytest.raises(PromptTooLong, match="more than 5000 characters"):
        ChatTemplate(square, {}).render(chat, max_chars=5000)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**10 }}",  # while it is compiled
        "{{ (messages[0].content * 10**9)|length }}",
    ],
)
def test_a_template_that_takes_too_much_ends_in_its_trial(template: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", byte_level_tokenizer())
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match="takes more than"):
        load_text_model(str(folder))


def test_a_template_that_refuses_the_trial_is_served(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", byte_level_tokenizer())
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    text = load_text_model(str(folder))
    with pytest.raises(TemplateError, match="no"):
        text._render([("user", "Hello")], None)


async def test_who_does_not_read_the_end_of_a_stream_is_cut(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "UNREAD_S", 0.3)
    servicer = front.server._servicer
    front.core.step_s = 0.0
    await front.core.load_model(msgspec.structs.replace(READY, max_model_tokens=CONTEXT))
    request = front.request([5], max_tokens=900, num_top_logprobs=20)
    options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    async with grpc.aio.insecure_channel(front.server.address, options=options) as channel:
        generate: Any = channel.unary_stream("/tokenloom.v1.Inference/Generate")
        call = generate(request.SerializeToString())
        await until(lambda: front.core.num_running == 1)
        await until(lambda: front.core.num_running == 0)
        await until(lambda: servicer._num_running == 0)
        call.cancel()


async def test_open_streams_and_connections_are_bounded(
    core: FakeCore, run_dir: Path, checkpoint: Path
) -> None:
    config = SchedulerConfig(
        model=str(checkpoint),
        run_dir=str(run_dir),
        listen="127.0.0.1:0",
        max_num_requests=1,
        max_waiting_requests=1,
    )
    server = FrontServer(config, load_text_model(config.model))
    await server.start()
    core.pause_after = 1
    own = (("grpc.use_local_subchannel_pool", 1),)  # else both share a connection
    channels = [grpc.aio.insecure_channel(server.address, options=own) for _ in range(2)]
    fronts = [Front(server=server, core=core, text=server._text, channel=each) for each in channels]
    await fronts[0].wait_ready()
    calls = [fronts[0].stub.Generate(fronts[0].request([5])) for _ in range(4)]
    await until(lambda: core.num_running == 4)
    found = await fronts[1].refused([5])  # on the first connection it would wait in the client
    assert (found.info.reason, found.message) == (
        "QUEUE_FULL",
        "4 streams are open; at most 4 may be",
    )
    for call in calls:
        call.cancel()
    for channel in channels:
        await channel.close()
    await server.stop()


async def test_metadata_is_bounded(front: Front) -> None:
    call = front.stub.Generate(front.request(), metadata=(("x-large", "y" * 20_000),))
    found = await refusal_of(call)
    assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert front.core.submits == []
