"""The front as a process, and as what health checks and orchestrators see of it."""

from __future__ import annotations

import asyncio
import json
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.front.fake_core import READY, FakeCore
from tests.front.harness import NOT_SERVING, SERVING, Front, HealthWatch, refusal_of, until
from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.v1 import inference_pb2 as pb
from tokenloom.v1.inference_pb2_grpc import InferenceStub


class FrontProcess:
    """A front in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, run_dir: Path) -> None:
        self.process = process
        self.address_file = run_dir / "address"

    async def channel(self) -> grpc.aio.Channel:
        await until(self.address_file.exists)
        channel = grpc.aio.insecure_channel(self.address_file.read_text())
        watch = HealthWatch(channel)
        await watch.next(SERVING)
        watch.cancel()
        return channel

    async def ended(self) -> tuple[int, str]:
        _, log = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, log.decode()


@asynccontextmanager
async def front_process(
    run_dir: Path, checkpoint: Path, listen: str = "127.0.0.1:0", grace_s: float = 30.0
) -> AsyncIterator[FrontProcess]:
    config = SchedulerConfig(
        model=str(checkpoint), run_dir=str(run_dir), listen=listen, grace_s=grace_s
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tokenloom.scheduler.front", config.to_json()),
        stderr=subprocess.PIPE,
    )
    try:
        yield FrontProcess(process, run_dir)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def test_the_real_address_is_told_in_a_file_while_the_server_listens(
    core: FakeCore, run_dir: Path, checkpoint: Path
) -> None:
    async with front_process(run_dir, checkpoint) as front:
        async with await front.channel() as channel:
            model = await InferenceStub(channel).GetModel(pb.GetModelRequest())
        assert model.name == "tiny"
        address = front.address_file.read_text()
        front.process.send_signal(signal.SIGTERM)
        code, log = await front.ended()
    assert code == 0
    assert f"listening on {address}" in log
    assert f"serving tiny on {address}" in log
    assert not front.address_file.exists()
    assert core.num_running == 0


async def test_a_unix_socket_is_for_its_user_alone(
    core: FakeCore, run_dir: Path, checkpoint: Path
) -> None:
    path = run_dir / "grpc.sock"
    async with front_process(run_dir, checkpoint, listen=f"unix:{path}") as front:
        async with await front.channel() as channel:
            await InferenceStub(channel).GetModel(pb.GetModelRequest())
        assert front.address_file.read_text() == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert core.num_messages >= 1


async def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(
    core: FakeCore, run_dir: Path, checkpoint: Path
) -> None:
    core.pause_after = 3
    async with (
        front_process(run_dir, checkpoint) as front,
        await front.channel() as channel,
    ):
        stub = InferenceStub(channel)
        watch = HealthWatch(channel)
        await watch.next(SERVING)
        running = stub.Generate(pb.GenerateRequest(text="The", stopping=pb.Stopping(max_tokens=50)))
        await until(lambda: core.num_running == 1)
        front.process.send_signal(signal.SIGTERM)
        await watch.next(NOT_SERVING)
        found = await refusal_of(stub.Generate(pb.GenerateRequest(text="The")))
        assert (found.code, found.info.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        core.pause_after = None
        events = [response.WhichOneof("event") async for response in running]
        assert events[-1] == "finish"
        code, _ = await front.ended()
    assert code == 0
    assert core.aborts == []


@pytest.mark.parametrize("hurry", [None, signal.SIGINT, signal.SIGTERM])
async def test_requests_beyond_the_grace_period_end_unavailable(
    core: FakeCore, run_dir: Path, checkpoint: Path, hurry: signal.Signals | None
) -> None:
    core.pause_after = 3
    grace_s = 0.2 if hurry is None else 1000.0
    async with (
        front_process(run_dir, checkpoint, grace_s=grace_s) as front,
        await front.channel() as channel,
    ):
        watch = HealthWatch(channel)
        await watch.next(SERVING)
        running = InferenceStub(channel).Generate(pb.GenerateRequest(text="The"))
        await until(lambda: core.num_running == 1)
        front.process.send_signal(signal.SIGTERM)
        await watch.next(NOT_SERVING)
        if hurry is not None:
            front.process.send_signal(hurry)
        found = await refusal_of(running)
        assert (found.code, found.info.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        code, _ = await front.ended()
    assert code == 0
    await until(lambda: core.num_running == 0)


async def test_a_unix_socket_that_is_taken_is_left_to_its_server(
    run_dir: Path, checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "grpc.sock"

    async def nobody(*_: object) -> None:
        pass

    async with await asyncio.start_unix_server(nobody, path):
        async with front_process(run_dir, checkpoint, listen=f"unix:{path}") as front:
            code, log = await front.ended()
        assert code == 2
        assert f"cannot listen on unix:{path}: another server listens there" in log
        _, writer = await asyncio.open_unix_connection(path)
        writer.close()


async def test_a_port_beyond_the_last_is_refused(run_dir: Path, checkpoint: Path) -> None:
    async with front_process(run_dir, checkpoint, listen="127.0.0.1:99999") as front:
        code, log = await front.ended()
    assert code == 2
    assert "cannot listen on 127.0.0.1:99999: ports end at 65535" in log


async def test_a_host_is_refused_if_one_of_its_addresses_is_taken(
    run_dir: Path, checkpoint: Path
) -> None:
    async def nobody(*_: object) -> None:
        pass

    async with await asyncio.start_server(nobody, "127.0.0.1", 0) as taken:
        port = taken.sockets[0].getsockname()[1]
        async with front_process(run_dir, checkpoint, listen=f"localhost:{port}") as front:
            code, log = await front.ended()
    assert code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in log


async def test_a_port_that_is_taken_is_named(run_dir: Path, checkpoint: Path) -> None:
    async def nobody(*_: object) -> None:
        pass

    async with await asyncio.start_server(nobody, "127.0.0.1", 0) as taken:
        port = taken.sockets[0].getsockname()[1]
        async with front_process(run_dir, checkpoint, listen=f"127.0.0.1:{port}") as front:
            code, log = await front.ended()
    assert code == 2
    assert f"front cannot start: cannot listen on 127.0.0.1:{port}" in log


async def test_a_checkpoint_without_tokenizer_is_named(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    async with front_process(run_dir, tmp_path) as front:
        code, log = await front.ended()
    assert code == 2
    assert "has no tokenizer.json" in log


@pytest.mark.parametrize("service", ["", "tokenloom.v1.Inference"])
async def test_health_follows_the_model(front: Front, service: str) -> None:
    watch = HealthWatch(front.channel, service)
    await watch.next(SERVING)
    await front.core.lose_model()
    await watch.next(NOT_SERVING)
    assert not await front.is_serving(service)
    await front.core.load_model(READY)
    await watch.next(SERVING)
    assert await front.is_serving(service)
    await front.core.close_socket()
    await watch.next(NOT_SERVING)
    watch.cancel()


async def test_health_of_an_unknown_service_is_not_found(front: Front) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.health.Check(health_pb2.HealthCheckRequest(service="nothing"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services_and_their_messages(front: Front) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub
    request: Any = reflection_pb2.ServerReflectionRequest
    requests = [
        request(list_services=""),
        request(file_containing_symbol="tokenloom.v1.Inference"),
    ]
    listed, described = [
        response async for response in stub(front.channel).ServerReflectionInfo(iter(requests))
    ]
    names = {service.name for service in listed.list_services_response.service}
    assert {"tokenloom.v1.Inference", "grpc.health.v1.Health"} <= names
    assert described.file_descriptor_response.file_descriptor_proto
