"""The operators' link to the core: what they ask, what it tells."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import zmq
import zmq.asyncio

from tokenloom.scheduler.front.errors import Absence, Unavailable
from tokenloom.scheduler.messages import (
    Aborted,
    AbortNamed,
    Attach,
    Drain,
    Drained,
    Draining,
    FromFront,
    Load,
    ModelLost,
    ModelReady,
    Profile,
    ToFront,
    TraceData,
    decode_to_front,
    encode,
)

_log = logging.getLogger(__name__)

NOT_READY = Absence(reason="NOT_READY", message="the model is loading")
_LOST = Absence(reason="MODEL_LOST", message="the model's worker is gone")


class AdminLink:
    """A DEALER socket to the core, read by `follow`."""

    def __init__(self, endpoint: str) -> None:
        self.model: ModelReady | Absence = NOT_READY
        """What the core serves, or why it serves nothing."""
        self.load: Load | None = None
        """The last that the core told of how busy it is."""
        self.is_draining = False
        """Whether an operator wants no new requests any more."""
        self._drained = asyncio.Event()
        self._num_ended = 0
        self._answers: defaultdict[str, list[asyncio.Future[bool]]] = defaultdict(list)
        """Of those who wait for an Aborted, by the request's name."""
        self._pieces: asyncio.Queue[TraceData | Absence] | None = None
        self._recording = 0
        """The number of the last that was asked for."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)

    async def follow(self) -> None:
        """Says who this is and takes what the core tells, until it is cancelled."""
        await self._send(Attach(pid=os.getpid()))
        while True:
            frame = await self._socket.recv()
            try:
                message = decode_to_front(frame)
            except msgspec.DecodeError as error:
                _log.warning("the core sent something unreadable: %s", error)
                continue
            self._take(message)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()
        self._context.term()

    async def drain(self, grace_s: float) -> int:
        """Lets requests finish for so long, then ends them; returns how many that were."""
        self._drained.clear()
        await self._send(Drain(ends=False))
        try:
            async with asyncio.timeout(grace_s):
                await self._drained.wait()
        except TimeoutError:
            await self._send(Drain(ends=True))
            await self._drained.wait()
        return self._num_ended

    async def abort(self, request_id: str) -> bool:
        """Ends a request; returns whether there was one of that name."""
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._answers[request_id].append(answer)
        await self._send(AbortNamed(request_id=request_id))
        return await answer

    @property
    def is_profiling(self) -> bool:
        """Whether somebody waits for recorded steps."""
        return self._pieces is not None

    @asynccontextmanager
    async def profile(self, num_steps: int) -> AsyncIterator[asyncio.Queue[TraceData | Absence]]:
        """Has the next steps recorded; yields where the pieces come, or word of the model's loss.

        One at a time. Whoever leaves before the end has the recording forgotten. Raises
        Unavailable.
        """
        if isinstance(self.model, Absence):
            raise Unavailable(self.model)
        pieces = self._pieces = asyncio.Queue()
        try:
            self._recording += 1
            await self._send(Profile(number=self._recording, num_steps=num_steps))
            yield pieces
        finally:
            self._pieces = None
            await self._send(Profile(number=self._recording, num_steps=0))

    async def _send(self, message: FromFront) -> None:
        await self._socket.send(encode(message))

    def _take(self, message: ToFront) -> None:
        match message:
            case ModelReady():
                self.model = message
            case ModelLost():
                self.model = _LOST
                if self._pieces is not None:
                    self._pieces.put_nowait(_LOST)
            case Load():
                self.load = message
            case Draining():
                self.is_draining = True
            case Drained():
                self._num_ended = message.num_ended
                self._drained.set()
            case Aborted():
                for answer in self._answers.pop(message.request_id, ()):
                    if not answer.done():
                        answer.set_result(message.was_found)
            case TraceData(number=number):  # else of one that nobody waits for
                if self._pieces is not None and number == self._recording:
                    self._pieces.put_nowait(message)
            case _:
                pass  # for fronts
