from __future__ import annotations

import asyncio
import random

from tokenloom.scheduler.front.turns import Turns


async def test_no_more_turns_are_under_way_than_there_are() -> None:
    turns = Turns(3)
    under_way = most = 0

    async def one() -> None:
        nonlocal under_way, most
        async with turns.turn():
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0)
            under_way -= 1

    await asyncio.gather(*(one() for _ in range(20)))
    assert most == 3


async def test_turns_come_in_the_order_of_asking() -> None:
    turns = Turns(1)
    came: list[int] = []

    async def one(place: int) -> None:
        async with turns.turn():
            await asyncio.sleep(0)
            came.append(place)

    await asyncio.gather(*(one(place) for place in range(20)))
    assert came == list(range(20))


async def test_a_turn_that_does_not_end_is_passed_on() -> None:
    turns = Turns(2)
    never = asyncio.Event()

    async def blocked() -> None:
        async with turns.turn():
            await never.wait()

    stuck = [asyncio.create_task(blocked()) for _ in range(2)]
    await asyncio.sleep(0)
    for _ in range(5):
        async with turns.turn():
            pass
    never.set()
    await asyncio.gather(*stuck)
    assert turns._num_free == 2  # what was passed on is not given twice


async def test_cancelled_streams_lose_no_turn() -> None:
    turns = Turns(2)
    rng = random.Random(0)

    async def one() -> None:
        async with turns.turn():
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)

    for _ in range(200):
        tasks = [asyncio.create_task(one()) for _ in range(rng.randrange(1, 8))]
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        for task in tasks:
            if rng.random() < 0.5:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert turns._num_free == 2
        assert not turns._taken
