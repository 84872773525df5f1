from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Awaitable
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.front.fake_core import READY
from tests.front.harness import Front, refusal, refusal_of, until
from tokenloom.scheduler.front.streams import Stream
from tokenloom.scheduler.messages import FinishReason, RefusalReason, Refused, Submit
from tokenloom.v1 import inference_pb2 as pb
from tokenloom.v1.inference_pb2_grpc import InferenceStub


def refusing(reason: RefusalReason, detail: str = "", retry_after_s: float | None = None) -> object:
    def answer(submit: Submit) -> Refused:
        return Refused(
            stream=submit.stream, reason=reason, detail=detail, retry_after_s=retry_after_s
        )

    return answer


async def test_a_bad_request_is_refused_with_all_its_fields(front: Front) -> None:
    found = await front.refused([5, 600], temperature=-1.0, top_p=7.0)
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (found.info.reason, found.info.domain) == ("INVALID_REQUEST", "tokenloom")
    assert set(found.fields) == {"tokens.ids", "sampling.temperature", "sampling.top_p"}
    assert "600" in found.bad_request.field_violations[0].description
    assert front.core.submits == []


async def test_a_prompt_that_is_too_long_in_tokens_is_refused(front: Front) -> None:
    found = await front.refused("The " * 400)
    num_tokens = len(await front.text.encode("The " * 400))
    assert found.fields == ["text"]
    assert found.info.reason == "PROMPT_TOO_LONG"
    assert found.message == f"text: prompt has {num_tokens} tokens; this server accepts 256"


async def test_a_status_stays_small_however_much_is_wrong(front: Front) -> None:
    found = await front.refused(
        "x", logit_bias=dict.fromkeys(range(1000), 1e9), stop_strings=[""] * 16
    )
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert len(found.bad_request.field_violations) == 16


async def test_tokenize_and_detokenize_have_the_same_validator(front: Front) -> None:
    calls: tuple[Awaitable[object], ...] = (
        front.stub.Tokenize(pb.TokenizeRequest()),
        front.stub.Detokenize(pb.DetokenizeRequest(token_ids=[512])),
    )
    for call, field in zip(calls, ("prompt", "token_ids"), strict=True):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        found = refusal(caught.value)
        assert found.code is grpc.StatusCode.INVALID_ARGUMENT
        assert found.fields == [field]


async def test_a_template_that_refuses_names_the_messages(front: Front) -> None:
    front.text._template._template = front.text._template._template.environment.from_string(  # type: ignore[union-attr]
        "{{ raise_exception('roles must alternate') }}"
    )
    request = pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="x")]))
    found = await refusal_of(front.stub.Generate(request))
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert found.fields == ["chat.messages"]
    assert "roles must alternate" in found.message


async def test_a_full_queue_is_told_with_a_pushback(front: Front) -> None:
    front.core.answer = refusing(RefusalReason.QUEUE_FULL, "2048 requests wait", 1.5)  # type: ignore[assignment]
    found = await front.refused()
    assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (found.info.reason, found.message) == ("QUEUE_FULL", "2048 requests wait")
    assert found.retry.retry_delay.ToMilliseconds() == 1500
    assert found.trailers["grpc-retry-pushback-ms"] == "1500"
    assert front.core.aborts == []  # there is nothing to abort


@pytest.mark.parametrize(
    ("reason", "code", "told"),
    [
        (RefusalReason.TOO_LONG, grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG"),
        (RefusalReason.NOT_READY, grpc.StatusCode.UNAVAILABLE, "NOT_READY"),
        (RefusalReason.DUPLICATE, grpc.StatusCode.INTERNAL, "INTERNAL"),
        (RefusalReason.INVALID, grpc.StatusCode.INTERNAL, "INTERNAL"),
    ],
)
async def test_other_refusals_of_the_core_have_their_status(
    front: Front, reason: RefusalReason, code: grpc.StatusCode, told: str
) -> None:
    front.core.answer = refusing(reason, "needs 900 tokens; the pool has 512")  # type: ignore[assignment]
    found = await front.refused()
    assert (found.code, found.info.reason) == (code, told)
    assert ("900" in found.message) == (code is not grpc.StatusCode.INTERNAL)


async def test_a_refusal_is_retried_by_grpc_itself_but_an_admitted_request_is_not(
    front: Front,
) -> None:
    policy = {
        "methodConfig": [
            {
                "name": [{"service": "tokenloom.v1.Inference"}],
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.01s",
                    "maxBackoff": "0.01s",
                    "backoffMultiplier": 1,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
    options = (("grpc.service_config", json.dumps(policy)),)
    async with grpc.aio.insecure_channel(front.server.address, options=options) as channel:
        stub = InferenceStub(channel)
        front.core.answer = refusing(RefusalReason.NOT_READY)  # type: ignore[assignment]
        await refusal_of(stub.Generate(front.request(max_tokens=5)))
        assert len(front.core.submits) == 3
        front.core.answer = lambda _: None
        front.core.pause_after = 2
        call = stub.Generate(front.request(max_tokens=5))
        ended = asyncio.create_task(refusal_of(call))
        await until(lambda: front.core.num_running == 1)
        await call.initial_metadata()
        await front.core.close_socket()
        found = await ended
        assert (found.code, found.info.reason) == (grpc.StatusCode.UNAVAILABLE, "CORE_LOST")
        assert len(front.core.submits) == 4


async def test_a_faulty_request_ends_internal_with_an_id_and_no_more(front: Front) -> None:
    front.core.end_early = (3, FinishReason.FAULT)
    found = await front.refused()
    assert (found.code, found.info.reason) == (grpc.StatusCode.INTERNAL, "MODEL_FAULT")
    assert found.info.metadata["fault_id"] in found.message


async def test_a_bug_ends_one_stream_with_an_id_that_the_log_has(
    front: Front, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    push = Stream.push

    def broken(stream: Stream, token: int, logprobs: object) -> None:
        if token == 77:
            raise KeyError("secret of the server")
        push(stream, token, logprobs)  # type: ignore[arg-type]

    monkeypatch.setattr(Stream, "push", broken)
    good = asyncio.create_task(front.generate([50], max_tokens=100))
    with caplog.at_level(logging.ERROR):
        found = await front.refused([77], max_tokens=100)
    assert (found.code, found.info.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in found.message
    assert found.info.metadata["fault_id"] in caplog.text
    assert "secret of the server" in caplog.text  # in the traceback
    assert (await good).token_ids == [50] * 100


async def test_a_bug_in_a_call_ends_that_call_alone(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("secret of the server")

    monkeypatch.setattr(front.text, "encode", broken)
    found = await front.refused("text")
    assert found.code is grpc.StatusCode.INTERNAL
    assert "secret" not in found.message
    assert (await front.generate([50], max_tokens=3)).token_ids == [50] * 3


async def test_bad_requests_do_not_disturb_good_streams(front: Front) -> None:
    front.core.script = lambda submit: [submit.tokens[0]] * submit.max_tokens
    rng = random.Random(0)
    good = [asyncio.create_task(front.generate([place], max_tokens=200)) for place in range(8)]
    bad: list[dict[str, object]] = [
        {"temperature": -1.0},
        {"top_p": float("nan")},
        {"max_tokens": 2**32 - 1},
        {"stop_strings": ["x" * 5000]},
        {"logit_bias": {2**32 - 1: 1.0}},
        {"stop_token_ids": [2**31]},
        {"num_top_logprobs": 10_000},
    ]
    async with grpc.aio.insecure_channel(front.server.address) as channel:
        raw: Any = channel.unary_stream("/tokenloom.v1.Inference/Generate")
        unknown: Any = channel.unary_unary("/tokenloom.v1.Inference/Nothing")
        while not all(task.done() for task in good):
            match rng.randrange(4):
                case 0:
                    found = await refusal_of(raw(rng.randbytes(50)))
                    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
                    assert found.info.reason in {"MALFORMED", "INVALID_REQUEST"}
                case 1:
                    with pytest.raises(grpc.aio.AioRpcError):
                        await unknown(b"")
                case _:
                    found = await front.refused("x", **rng.choice(bad))
                    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    for place, task in enumerate(good):
        assert (await task).token_ids == [place] * 200
    assert len(front.core.submits) == 8


async def test_a_message_above_the_limit_is_refused_before_it_is_parsed(front: Front) -> None:
    found = await refusal_of(front.stub.Generate(pb.GenerateRequest(text="x" * 41 * 1024 * 1024)))
    assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await front.generate(max_tokens=1)).finish is not None


async def test_garbage_from_the_core_is_dropped(front: Front) -> None:
    stream = asyncio.create_task(front.generate(max_tokens=150))
    await until(lambda: front.core.num_running == 1)
    await front.core.send_raw(b"\xc1 garbage")
    await front.core.send_raw(b"")
    assert len((await stream).token_ids) == 150


async def test_without_a_model_new_requests_are_unavailable_and_running_ones_wait(
    front: Front,
) -> None:
    front.core.pause_after = 5
    running = asyncio.create_task(front.generate(max_tokens=10))
    await until(lambda: front.core.num_running == 1)
    await front.core.lose_model()
    while await front.is_serving():
        await asyncio.sleep(0.002)
    found = await front.refused()
    assert (found.code, found.info.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_LOST")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.stub.GetModel(pb.GetModelRequest())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await front.core.load_model(READY)
    front.core.pause_after = None
    assert len((await running).token_ids) == 10
    await front.wait_ready()
    assert (await front.generate(max_tokens=1)).finish is not None


async def test_a_lost_core_ends_the_streams_as_unavailable(front: Front) -> None:
    front.core.pause_after = 2
    calls = [front.stub.Generate(front.request(max_tokens=5)) for _ in range(4)]
    await until(lambda: front.core.num_running == 4)
    await front.core.close_socket()
    for call in calls:
        found = await refusal_of(call)
        assert (found.code, found.info.reason) == (grpc.StatusCode.UNAVAILABLE, "CORE_LOST")
    assert not await front.is_serving()
    assert (await front.refused()).info.reason == "CORE_LOST"
