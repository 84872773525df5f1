"""The core's end of a worker's socket, for tests that speak to a real process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self, TypeVar

import zmq

from tokenloom.wire.codec import decode_to_core, encode
from tokenloom.wire.messages import Configure, Ready, Step, StepDone, ToCore, ToWorker

Message = TypeVar("Message", bound=ToCore)
PATIENCE_S = 60.0


class CoreSocket:
    """A ROUTER that waits for one worker."""

    def __init__(self, endpoint: str) -> None:
        self.worker: bytes = b""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(endpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close(0)
        self._context.term()

    def send_raw(self, *frames: bytes) -> None:
        self._socket.send_multipart([self.worker, *frames])

    def send(self, message: ToWorker) -> None:
        self.send_raw(encode(message))

    def receive(self, timeout_s: float = PATIENCE_S) -> ToCore | None:
        """Returns the next message, None if none comes."""
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        self.worker, frame = self._socket.recv_multipart()
        return decode_to_core(frame)

    def expect(self, kind: type[Message]) -> Message:
        """Returns the next message of a kind; others before it are passed over."""
        while True:
            message = self.receive()
            assert message is not None, f"no {kind.__name__} came"
            if isinstance(message, kind):
                return message

    def configure(self, configure: Configure) -> Ready:
        self.send(configure)
        return self.expect(Ready)

    def step(self, step: Step) -> StepDone:
        self.send(step)
        return self.expect(StepDone)


@contextmanager
def worker_process(
    endpoint: str, *options: str, module: str = "tokenloom.worker.fake"
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", module, "--connect", endpoint, *options]
    process = subprocess.Popen(command, env=environment())
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def environment() -> dict[str, str]:
    """Returns a child's environment; tests/conftest.py put the parts on its path."""
    return dict(os.environ) | {"OMP_NUM_THREADS": "1"}
