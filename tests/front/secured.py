"""Fronts with TLS and tenants, and how clients come to them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio

from tests.certificates import CA, Issued
from tests.front.fake_core import FakeCore
from tests.front.harness import Completion, Front, Refusal, refusal_of
from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.front.server import FrontServer
from tokenloom.scheduler.front.text import load_text_model
from tokenloom.v1 import inference_pb2 as pb
from tokenloom.v1.inference_pb2_grpc import InferenceStub

Metadata: TypeAlias = Sequence[tuple[str, str]]


@asynccontextmanager
async def secured(
    core: FakeCore,
    run_dir: Path,
    checkpoint: Path,
    config: Mapping[str, Any],
    *,
    credentials: grpc.ChannelCredentials | None = None,
) -> AsyncIterator[Front]:
    """Yields a front that is configured so, with a channel that has the credentials."""
    made = SchedulerConfig(
        model=str(checkpoint), run_dir=str(run_dir), listen="127.0.0.1:0", **config
    )
    text = load_text_model(made.model)
    server = FrontServer(made, text)
    try:
        await server.start()
        async with channel_to(server.address, credentials) as channel:
            front = Front(server=server, core=core, text=text, channel=channel)
            await front.wait_ready()
            yield front
    finally:
        await server.stop()


def channel_to(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """Returns a channel with a connection of its own."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def trusting(*cas: CA, client: Issued | None = None) -> grpc.ChannelCredentials:
    """Returns what a client has that trusts these CAs and may have a certificate."""
    roots = b"".join(ca.pem for ca in cas)
    if client is None:
        return grpc.ssl_channel_credentials(roots)
    return grpc.ssl_channel_credentials(roots, client.key, client.cert)


async def generate(
    address: str,
    credentials: grpc.ChannelCredentials | None,
    *,
    max_tokens: int = 5,
    metadata: Metadata = (),
) -> Completion:
    """Reads a stream over a connection of its own."""
    completion = Completion()
    async with channel_to(address, credentials) as channel:
        call = InferenceStub(channel).Generate(_request(max_tokens), metadata=tuple(metadata))
        async for response in call:
            completion.take(response)
    return completion


async def refused(
    address: str, credentials: grpc.ChannelCredentials | None, *, metadata: Metadata = ()
) -> Refusal:
    """Returns how a stream over a connection of its own is refused."""
    async with channel_to(address, credentials) as channel:
        call = InferenceStub(channel).Generate(_request(5), metadata=tuple(metadata))
        return await refusal_of(call)


def _request(max_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        tokens=pb.TokenIds(ids=[50, 51]), stopping=pb.Stopping(max_tokens=max_tokens)
    )
