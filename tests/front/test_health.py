from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from tests.front.harness import NOT_SERVING, SERVING, Front
from tokenloom.scheduler.front.health import LIVENESS, Health
from tokenloom.scheduler.messages import Pulse, encode


class Core:
    """Answers pings, or not."""

    def __init__(self, health: Health) -> None:
        self.health = health
        self.pulse: Pulse | None = Pulse(stalled_s=0.0)
        self.num_pings = 0

    def ping(self) -> None:
        self.num_pings += 1
        if self.pulse is not None:
            self.health.feel(self.pulse)

    async def until(self, status: int, service: str = LIVENESS) -> None:
        request = health_pb2.HealthCheckRequest(service=service)
        check: Any = self.health.servicer.Check  # its context is for services that nobody knows
        async with asyncio.timeout(30):
            while (await check(request, None)).status != status:
                await asyncio.sleep(0.01)

    async def until_pinged(self, count: int) -> None:
        last = self.num_pings + count
        async with asyncio.timeout(30):
            while self.num_pings < last:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def followed() -> AsyncIterator[Core]:
    core = Core(Health(("service",), timeout_s=0.3))
    await core.health.tell()
    task = asyncio.create_task(core.health.follow(core.ping))
    yield core
    task.cancel()


async def test_a_core_that_has_yet_to_start_is_no_reason_to_end_the_server() -> None:
    async with followed() as core:
        core.pulse = None
        await core.until_pinged(5)
        await core.until(SERVING)
        await core.until(NOT_SERVING, "service")


async def test_a_core_that_falls_silent_is_not_alive_until_it_answers_again() -> None:
    async with followed() as core:
        pulse = core.pulse
        await core.until_pinged(1)
        core.pulse = None
        await core.until(NOT_SERVING)
        core.pulse = pulse
        await core.until(SERVING)


async def test_a_core_that_never_answers_is_not_alive_once_it_has_a_model() -> None:
    async with followed() as core:
        core.pulse = None
        core.health.set_model(is_there=True)
        await core.until(SERVING)
        await core.until(NOT_SERVING)
        await core.until(SERVING, "service")


async def test_a_core_that_answers_and_plans_no_step_is_not_alive() -> None:
    async with followed() as core:
        core.pulse = Pulse(stalled_s=0.2)
        await core.until_pinged(2)
        await core.until(SERVING)
        core.pulse = Pulse(stalled_s=0.4)
        await core.until(NOT_SERVING)


async def test_a_server_that_drains_is_alive_and_not_ready() -> None:
    async with followed() as core:
        core.health.set_model(is_there=True)
        await core.until(SERVING, "service")
        core.health.drain()
        for service in ("", "service"):
            await core.until(NOT_SERVING, service)
        await core.until(SERVING)


@pytest.mark.parametrize("stalled_s", [0.0, 60.0])
async def test_the_pulse_of_the_core_decides_on_liveness_alone(
    front: Front, stalled_s: float
) -> None:
    front.core.pulse = Pulse(stalled_s=stalled_s)
    await front.core.send_raw(encode(front.core.pulse))
    while await front.is_serving(LIVENESS) != (stalled_s == 0):
        await asyncio.sleep(0.01)
    assert await front.is_serving()
    await front.core.lose_model()
    while await front.is_serving():
        await asyncio.sleep(0.01)
    assert await front.is_serving(LIVENESS) == (stalled_s == 0)
