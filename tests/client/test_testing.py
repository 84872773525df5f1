import asyncio
import math
import threading

import pytest

from tokenloom.client import (
    Admission,
    AsyncClient,
    Cancelled,
    Client,
    Cost,
    DeadlineExceeded,
    Delta,
    FinishReason,
    InvalidRequest,
    Message,
    Model,
    Overloaded,
    Pause,
    PauseReason,
    ProtocolError,
    ServerError,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from tokenloom.client.testing import Answer, FakeServer, Wait
from tokenloom.v1 import inference_pb2 as pb

HELLO = Answer(["Hel", "lo"])


def test_texts_become_deltas_whose_tokens_are_their_bytes() -> None:
    with Client(FakeServer(lambda _: HELLO)) as client:
        stream = client.generate("Hi", seed=5)
        assert list(stream) == [
            Delta(first_index=0, token_ids=(72, 101, 108), text="Hel"),
            Delta(first_index=3, token_ids=(108, 111), text="lo"),
        ]
        result = stream.result()
        assert (result.text, result.seed, result.request_id) == ("Hello", 5, "fake-1")
        assert result.finish_reason is FinishReason.STOP_TOKEN
        assert result.usage == Usage(
            num_prompt_tokens=2, num_cached_tokens=0, num_completion_tokens=5
        )
        assert client.detokenize(result.token_ids) == "Hello"


async def test_async_client_sees_the_same() -> None:
    server = FakeServer(lambda _: HELLO)
    async with AsyncClient(server) as client:
        streams = [client.chat([Message("user", "Hi")]) for _ in range(3)]
        assert await asyncio.gather(*(each.text() for each in streams)) == ["Hello"] * 3
        assert await client.tokenize_chat([Message("user", "Hi")]) == [72, 105]
        assert await client.detokenize([72, 105]) == "Hi"
        assert (await client.model()).name == "fake"
        await client.wait_ready(timeout_s=1)
    assert [call.ended for call in server.calls] == [True] * 3


def test_answer_depends_on_the_request() -> None:
    def respond(request: pb.GenerateRequest) -> Answer:
        return Answer([request.text.upper()], finish_reason=FinishReason.LENGTH)

    server = FakeServer(respond)
    with Client(server) as client:
        result = client.generate("abc", max_tokens=0).result()
    assert (result.text, result.finish_reason) == ("ABC", FinishReason.LENGTH)
    assert server.calls[0].request.stopping.HasField("max_tokens")


def test_everything_that_a_server_tells_can_be_said() -> None:
    logprobs = (TokenLogprob(logprob=-0.5, top=(TopLogprob(token_id=4, logprob=-0.25),)),)
    usage = Usage(
        num_prompt_tokens=9, num_cached_tokens=8, num_completion_tokens=1, queue_s=0.0, decode_s=2.0
    )
    cost = Cost(gpu_s=0.5, kv_block_s=7.0, num_recomputed_tokens=3, num_preemptions=1, price=0.25)
    answer = Answer(
        [
            Admission(request_id="mine", seed=3, num_prompt_tokens=9, num_cached_tokens=8),
            Delta(first_index=0, token_ids=(4,), text="x", logprobs=logprobs),
        ],
        finish_reason=FinishReason.STOP_STRING,
        stop_string="end",
        usage=usage,
        cost=cost,
    )
    model = Model(
        name="m",
        architecture="a",
        vocab_size=8,
        max_model_tokens=16,
        eos_token_ids=(1, 2),
        has_chat_template=False,
        server_version="2",
    )
    with Client(FakeServer(lambda _: answer, model=model)) as client:
        result = client.generate([1], num_top_logprobs=1).result()
        assert (result.request_id, result.seed, result.stop_string) == ("mine", 3, "end")
        assert (result.usage, result.logprobs, result.cost) == (usage, logprobs, cost)
        assert client.model() == model


RECOVERS = Answer(["Hel", Pause(reason=PauseReason.RECOVERING), "lo"])
HEL = Delta(first_index=0, token_ids=(72, 101, 108), text="Hel")
LO = Delta(first_index=3, token_ids=(108, 111), text="lo")


def test_pauses_come_to_whoever_asks_for_events_and_to_nobody_else() -> None:
    with Client(FakeServer(lambda _: RECOVERS)) as client:
        stream = client.generate("Hi")
        assert list(stream.events()) == [HEL, Pause(reason=PauseReason.RECOVERING), LO]
        assert stream.text() == "Hello"
        assert list(client.generate("Hi")) == [HEL, LO]
        half = client.generate("Hi")
        assert next(half) == HEL
        assert list(half.events()) == [Pause(reason=PauseReason.RECOVERING), LO]


async def test_pauses_come_to_async_callers_likewise() -> None:
    async with AsyncClient(FakeServer(lambda _: RECOVERS)) as client:
        events = [event async for event in client.generate("Hi").events()]
        assert events == [HEL, Pause(reason=PauseReason.RECOVERING), LO]
        assert [delta async for delta in client.generate("Hi")] == [HEL, LO]


def test_pause_for_an_unknown_reason_is_one_all_the_same() -> None:
    answer = Answer([Pause(reason=PauseReason.OTHER)])
    with Client(FakeServer(lambda _: answer)) as client:
        assert list(client.generate("Hi").events()) == [Pause(reason=PauseReason.OTHER)]


def test_error_that_comes_first_is_a_refusal() -> None:
    full = Overloaded("2048 requests wait", reason="QUEUE_FULL", retry_after_s=1.5)
    with Client(FakeServer(lambda _: Answer([full]))) as client:
        with pytest.raises(Overloaded) as caught:
            client.generate("a").admission()
        assert caught.value.retry_after_s == 1.5


def test_error_at_a_delta_leaves_what_came_before() -> None:
    with Client(FakeServer(lambda _: Answer(["so far", ServerError("broken")]))) as client:
        stream = client.generate("a")
        assert next(stream).text == "so far"
        with pytest.raises(ServerError, match="broken"):
            stream.result()
        assert stream.partial_text == "so far"


def test_deadline_passes_in_virtual_time() -> None:
    server = FakeServer(lambda _: Answer(["a", Wait(3600), "b", Wait(3600), "c"]))
    with Client(server) as client:
        assert client.generate("x").text() == "abc"
        stream = client.generate("x", timeout_s=5000)
        with pytest.raises(DeadlineExceeded, match="5000"):
            stream.text()
    assert stream.partial_text == "ab"
    assert server.calls[1].num_sent_deltas == 2


def test_cancelled_call_is_seen_by_the_server() -> None:
    server = FakeServer(lambda _: Answer(["a", "b", "c"]))
    with Client(server) as client:
        with client.generate("x") as stream:
            assert next(stream).text == "a"
        with pytest.raises(Cancelled):
            next(stream)
    assert server.calls[0].cancelled
    assert server.calls[0].num_sent_deltas == 1


def test_call_that_ended_was_not_cancelled() -> None:
    server = FakeServer(lambda _: HELLO)
    with Client(server) as client, client.generate("x") as stream:
        stream.result()
    assert not server.calls[0].cancelled


def test_endless_wait_ends_with_a_cancellation_or_the_deadline() -> None:
    server = FakeServer(lambda _: Answer(["a", Wait(math.inf), "b"]))
    with Client(server) as client:
        stream = client.generate("x")
        assert next(stream).text == "a"
        threading.Timer(0.05, stream.cancel).start()
        with pytest.raises(Cancelled):
            next(stream)
        with pytest.raises(DeadlineExceeded):
            client.generate("x", timeout_s=60).result()
    assert [call.cancelled for call in server.calls] == [True, False]


async def test_cancelled_task_leaves_its_call() -> None:
    server = FakeServer(lambda _: Answer(["a", Wait(math.inf)]))
    async with AsyncClient(server) as client:
        task = asyncio.create_task(client.generate("x").text())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream = client.generate("x")
        asyncio.get_running_loop().call_soon(stream.cancel)
        with pytest.raises(Cancelled):
            await stream.text()
    assert [call.cancelled for call in server.calls] == [True, True]


def test_stream_without_an_end_and_a_gap_are_protocol_errors() -> None:
    gap = Delta(first_index=7, token_ids=(1,), text="")
    answers = iter([Answer(["a"], finish_reason=None), Answer(["a", gap])])
    with Client(FakeServer(lambda _: next(answers))) as client:
        with pytest.raises(ProtocolError, match="after 1 tokens"):
            client.generate("x").result()
        with pytest.raises(ProtocolError, match="begins at token 7; expected 1"):
            client.generate("x").result()


def test_unknown_token_id_is_refused() -> None:
    with Client(FakeServer(lambda _: HELLO)) as client:
        assert client.tokenize("hé") == list("hé".encode())
        with pytest.raises(InvalidRequest, match="300; this server has 256") as caught:
            client.detokenize([1, 300])
        assert caught.value.violations[0].field == "token_ids[1]"


def test_client_for_one_world_refuses_a_server_of_none() -> None:
    with pytest.raises(TypeError, match="takes no NoneType"):
        AsyncClient(None)  # type: ignore[arg-type] # the point of the test
