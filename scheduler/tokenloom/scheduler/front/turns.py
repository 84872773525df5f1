"""Streams take turns at writing, so that a step for all of them does not crowd out new calls.

grpc.aio tells of all that happened through one queue, which one thread empties
under the interpreter lock: of each write that is done, and of each new call,
one at a time. If a step makes every stream write at once, a new call waits
behind all their completions: with 1,000 busy streams 20 new ones a second got
in on two cores, with 16 turns 300. While streams wait for their turn their
tokens gather, so fewer messages carry them and tokens per second stay the same.
"""

from __future__ import annotations

import asyncio
from collections import deque

NUM_TURNS = 16
"""Writes under way at once; about 1 ms of work."""
TURN_S = 0.01
"""A write that takes longer waits for its client and no longer counts."""


class Turns:
    """Gives out turns in the order of asking."""

    def __init__(self, num_turns: int = NUM_TURNS) -> None:
        self._num_free = num_turns
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._taken: dict[Turn, float] = {}  # with the time when each began, oldest first
        self._timer: asyncio.TimerHandle | None = None

    def turn(self) -> Turn:
        """Returns a turn, to be entered by `async with`."""
        return Turn(self)

    async def take(self, turn: Turn) -> None:
        """Waits until the turn may begin."""
        loop = asyncio.get_running_loop()
        if self._num_free:
            self._num_free -= 1
        else:
            waiter = loop.create_future()
            self._waiting.append(waiter)
            if self._timer is None:
                self._timer = loop.call_later(TURN_S, self._write_off)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():  # its turn came all the same
                    self._pass_on()
                raise
        self._taken[turn] = loop.time()

    def give(self, turn: Turn) -> None:
        """Ends a turn; the next one begins."""
        if self._taken.pop(turn, None) is not None:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():  # else its stream was cancelled
                waiter.set_result(None)
                return
        self._num_free += 1

    def _write_off(self) -> None:
        """Passes on the turns of those that wait for their clients."""
        loop = asyncio.get_running_loop()
        begun_by = loop.time() - TURN_S
        for turn, begun in list(self._taken.items()):
            if begun > begun_by:
                break
            self.give(turn)
        self._timer = loop.call_later(TURN_S, self._write_off) if self._waiting else None


class Turn:
    """One stream's permission to write."""

    __slots__ = ("_turns",)

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    async def __aenter__(self) -> None:
        await self._turns.take(self)

    async def __aexit__(self, *_: object) -> None:
        self._turns.give(self)
