from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from tests.front.checkpoints import byte_level_tokenizer, write_checkpoint
from tests.front.fake_core import FakeCore
from tests.front.harness import Front
from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.front.server import FrontServer
from tokenloom.scheduler.front.text import load_text_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", byte_level_tokenizer())


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture
async def core(run_dir: Path) -> AsyncIterator[FakeCore]:
    async with FakeCore(f"ipc://{run_dir}/core.sock") as core:
        yield core


@pytest.fixture
async def front(core: FakeCore, run_dir: Path, checkpoint: Path) -> AsyncIterator[Front]:
    config = SchedulerConfig(
        model=str(checkpoint),
        run_dir=str(run_dir),
        listen="127.0.0.1:0",
        max_stream_buffer_tokens=1000,
    )
    text = load_text_model(config.model)
    server = FrontServer(config, text)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        front = Front(server=server, core=core, text=text, channel=channel)
        await front.wait_ready()
        yield front
    await server.stop()
