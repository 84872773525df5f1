import asyncio
from collections.abc import Iterator

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from tests.client.scripted import (
    abort,
    admission,
    delta,
    error_info,
    finish,
    one_token_and_then_silence,
    serving,
)
from tokenloom.client import (
    AsyncClient,
    Cancelled,
    DeadlineExceeded,
    FinishReason,
    InvalidRequest,
    Message,
    Overloaded,
    ProtocolError,
    Unavailable,
)
from tokenloom.v1 import inference_pb2 as pb

Responses = Iterator[pb.GenerateResponse]


async def test_stream_yields_each_delta_once_and_then_the_result() -> None:
    with serving() as server:
        async with AsyncClient(server.address) as client:
            stream = client.generate("Say hello", temperature=0)
            assert (await stream.admission()).request_id == "r1"
            assert [each.text async for each in stream] == ["Hel", "lo"]
            result = await stream.result()
            assert (result.text, result.token_ids) == ("Hello", (10, 11, 12))
            assert result.finish_reason is FinishReason.STOP_TOKEN
            assert [each async for each in stream] == []
    assert server.requests == [
        pb.GenerateRequest(text="Say hello", sampling=pb.Sampling(temperature=0))
    ]


async def test_many_streams_run_at_once() -> None:
    with serving() as server:
        async with AsyncClient(server.address) as client:
            streams = [client.generate("a") for _ in range(32)]
            assert await asyncio.gather(*(each.text() for each in streams)) == ["Hello"] * 32


async def test_chat_tokens_text_and_model_make_the_round_trip() -> None:
    with serving() as server:
        async with AsyncClient(server.address) as client:
            assert await client.chat([Message("user", "Hi")]).text() == "Hello"
            assert await client.tokenize("ab") == [97, 98]
            assert await client.tokenize_chat([Message("user", "Hi")]) == [1, 4]
            assert await client.detokenize([3], skip_special_tokens=True) == "[3] True"
            assert (await client.model()).max_model_tokens == 2048
            with pytest.raises(InvalidRequest):
                await client.tokenize("")


async def test_gap_is_a_protocol_error() -> None:
    messages = [admission(), delta(0, 1), delta(2, 3), finish()]
    with serving(lambda _context: iter(messages)) as server:
        async with AsyncClient(server.address) as client:
            stream = client.generate("a")
            with pytest.raises(ProtocolError, match="begins at token 2; expected 1"):
                await stream.result()
            with pytest.raises(ProtocolError):
                await stream.text()


async def test_refusal_bears_its_reason() -> None:
    def respond(context: grpc.ServicerContext) -> Responses:
        abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "full", [error_info("QUEUE_FULL")])

    with serving(respond) as server:
        async with AsyncClient(server.address) as client:
            with pytest.raises(Overloaded, match="full") as caught:
                await client.generate("a").result()
            assert caught.value.reason == "QUEUE_FULL"


async def test_cancelled_stream_tells_the_server_and_raises() -> None:
    with serving(one_token_and_then_silence) as server:
        async with AsyncClient(server.address) as client:
            stream = client.generate("a")
            assert (await anext(stream)).text == "x"
            asyncio.get_running_loop().call_later(0.05, stream.cancel)
            with pytest.raises(Cancelled):
                await stream.result()
            with pytest.raises(Cancelled):
                await anext(stream)
            assert await asyncio.to_thread(server.left.wait, 30)


async def test_cancelled_task_cancels_its_call_and_stays_cancelled() -> None:
    with serving(one_token_and_then_silence) as server:
        async with AsyncClient(server.address) as client:
            stream = client.generate("a")
            await stream.admission()
            task = asyncio.create_task(stream.text())
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.left.wait, 30)


async def test_asyncio_timeout_around_a_stream_works() -> None:
    with serving(one_token_and_then_silence) as server:
        async with AsyncClient(server.address) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await client.generate("a").text()
            assert await asyncio.to_thread(server.left.wait, 30)


async def test_leaving_the_block_of_an_unfinished_stream_cancels_it() -> None:
    with serving(one_token_and_then_silence) as server:
        async with AsyncClient(server.address) as client:
            async with client.generate("a") as stream:
                assert (await anext(stream)).text == "x"
            assert await asyncio.to_thread(server.left.wait, 30)


async def test_timeout_is_a_deadline() -> None:
    with serving(one_token_and_then_silence) as server:
        async with AsyncClient(server.address) as client:
            with pytest.raises(DeadlineExceeded):
                await client.generate("a", timeout_s=0.2).result()


async def test_closing_the_client_cancels_its_streams() -> None:
    with serving(one_token_and_then_silence) as server:
        client = AsyncClient(server.address)
        stream = client.generate("a")
        await stream.admission()
        await client.close()
        with pytest.raises(Cancelled):
            await stream.result()


async def test_ready_comes_when_a_loading_server_serves() -> None:
    with serving() as server:
        server.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        async with AsyncClient(server.address) as client:
            with pytest.raises(DeadlineExceeded, match=r"not ready within 0\.2 s"):
                await client.wait_ready(timeout_s=0.2)
            serve = asyncio.to_thread(server.health.set, "", health_pb2.HealthCheckResponse.SERVING)
            await asyncio.gather(client.wait_ready(timeout_s=60), serve)


async def test_no_server_is_unavailable() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(Unavailable):
            await client.generate("a").result()
        with pytest.raises(Unavailable):
            await client.model()


async def test_given_channel_stays_open() -> None:
    with serving() as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            for _ in range(2):
                async with AsyncClient(channel) as client:
                    assert await client.generate("a").text() == "Hello"


async def test_credentials_secure_the_connection() -> None:
    server_credentials = grpc.local_server_credentials(grpc.LocalConnectionType.LOCAL_TCP)
    credentials = grpc.local_channel_credentials(grpc.LocalConnectionType.LOCAL_TCP)
    with serving(credentials=server_credentials) as server:
        async with AsyncClient(server.address, credentials=credentials) as client:
            assert await client.generate("a").text() == "Hello"


def test_client_made_outside_of_a_loop_works_in_one() -> None:
    async def use(client: AsyncClient) -> str:
        async with client:
            return await client.generate("a").text()

    with serving() as server:
        assert asyncio.run(use(AsyncClient(server.address))) == "Hello"
