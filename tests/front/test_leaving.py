"""Clients that leave, in every way that they have."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import grpc
import grpc.aio
import pytest

from tests.front.fake_core import echo
from tests.front.harness import Front, refusal_of, until
from tokenloom.v1.inference_pb2_grpc import InferenceStub


@pytest.fixture
def endless(front: Front) -> Front:
    front.core.pause_after = 3
    return front


async def test_a_cancelled_request_is_aborted(endless: Front) -> None:
    call = endless.stub.Generate(endless.request())
    await until(lambda: endless.core.num_running == 1)
    call.cancel()
    await until(lambda: endless.core.num_running == 0)
    assert endless.core.aborts == [endless.core.submits[0].stream]


async def test_a_request_cancelled_in_the_queue_is_aborted(endless: Front) -> None:
    endless.core.is_admitting = False
    call = endless.stub.Generate(endless.request())
    await until(lambda: len(endless.core.submits) == 1)
    call.cancel()
    await until(lambda: len(endless.core.aborts) == 1)


async def test_a_request_past_its_deadline_is_aborted(endless: Front) -> None:
    found = await refusal_of(endless.stub.Generate(endless.request(), timeout=0.2))
    assert found.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: len(endless.core.aborts) == 1)
    assert endless.core.num_running == 0


async def test_the_deadline_of_a_call_travels_with_its_request(front: Front) -> None:
    for timeout_s in (100.0, None, 1e9):
        async for _ in front.stub.Generate(front.request(max_tokens=1), timeout=timeout_s):
            pass
    told, *others = [submit.timeout_s for submit in front.core.submits]
    assert told is not None
    assert 50 < told < 150  # gRPC rounds it on its way
    assert others == [None, None]  # a deadline that nobody lives to see is none


async def test_requests_of_a_closed_channel_are_aborted(endless: Front) -> None:
    channel = grpc.aio.insecure_channel(endless.server.address)
    calls = [InferenceStub(channel).Generate(endless.request()) for _ in range(8)]
    readers = [asyncio.create_task(call.read()) for call in calls]
    await until(lambda: endless.core.num_running == 8)
    await channel.close()
    await until(lambda: endless.core.num_running == 0)
    await asyncio.gather(*readers, return_exceptions=True)


CLIENT = """
import sys, grpc
from tokenloom.v1 import inference_pb2 as pb
from tokenloom.v1.inference_pb2_grpc import InferenceStub
stub = InferenceStub(grpc.insecure_channel(sys.argv[1]))
for response in stub.Generate(pb.GenerateRequest(text="The quick")):
    print(response.WhichOneof("event"), flush=True)
"""


async def test_requests_of_a_killed_client_are_aborted(endless: Front) -> None:
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, endless.server.address, stdout=subprocess.PIPE
    )
    assert client.stdout is not None
    assert await client.stdout.readline() == b"admission\n"
    os.kill(client.pid, signal.SIGKILL)
    await client.wait()
    await until(lambda: endless.core.num_running == 0)
    assert len(endless.core.aborts) == 1


async def test_a_finished_request_is_not_aborted(front: Front) -> None:
    await front.generate(max_tokens=3)
    await front.generate("The quick brown", stop_strings=["quick"])
    call = front.stub.Generate(front.request(max_tokens=3))
    async for _ in call:
        pass
    call.cancel()
    assert (await front.generate(max_tokens=1)).finish is not None
    assert front.core.aborts == []


async def test_a_client_that_does_not_read_is_ended_and_the_others_go_on(front: Front) -> None:
    front.core.step_s = 0.0
    # Wide deltas fill what gRPC takes before it blocks a write.
    front.core.script = lambda submit: (
        echo(submit) if submit.sampling.num_top_logprobs is None else [300] * 1_000_000
    )
    async with grpc.aio.insecure_channel(front.server.address) as channel:
        lazy = InferenceStub(channel).Generate(front.request(num_top_logprobs=20))
        await until(lambda: front.core.num_running == 1)
        async with asyncio.timeout(60):
            while front.core.num_running:
                good = await front.generate([5], max_tokens=1)
                assert good.finish is not None
        assert len(front.core.aborts) == 1
        found = await refusal_of(lazy)
        assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert found.info.reason == "CLIENT_TOO_SLOW"
