"""A core as a process, fake workers as processes, and a front's end of the link."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import zmq

from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.messages import (
    Abort,
    Attach,
    Commands,
    Finished,
    Inspect,
    Inspection,
    ModelLost,
    ModelReady,
    Outputs,
    Ping,
    Pulse,
    Refused,
    Stop,
    Submit,
    ToFront,
    decode_to_front,
    encode,
)
from tokenloom.wire.messages import SamplingParams

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(
        str(ROOT / part) for part in ("protos", "scheduler", "worker", "client")
    )
}


def sampling(seed: int = 0, **changes: object) -> SamplingParams:
    """Returns plain parameters, some changed."""
    fields: dict[str, object] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": seed,
        "min_tokens": 0,
        "stop_token_ids": (),
        "logit_bias": (),
        "num_top_logprobs": None,
    }
    return SamplingParams(**(fields | changes))  # type: ignore[arg-type]


def submit(
    stream: int, prompt: list[int], max_tokens: int, seed: int = 0, **changes: object
) -> Submit:
    """Returns a request of token ids."""
    return Submit(
        stream=stream,
        tokens=np.array(prompt, np.int32).tobytes(),
        max_tokens=max_tokens,
        sampling=sampling(seed, **changes),
        salt="",
    )


class FrontSocket:
    """A front as the core sees it; collects what each stream gets."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)
        self.socket.send(encode(Attach(pid=os.getpid())))
        self.ready: ModelReady | None = None
        self.num_lost = 0
        self.admitted: list[int] = []
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, Finished] = {}
        self.refused: dict[int, Refused] = {}
        self.inspections: list[Inspection] = []
        self.pulses: list[Pulse] = []

    def send(self, *commands: Submit | Abort | Stop | Inspect | Ping) -> None:
        self.socket.send(encode(Commands(commands=commands)))

    def until(self, condition: Callable[[], bool]) -> None:
        """Reads messages until `condition` holds."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while not condition():
            left_s = deadline_s - time.monotonic()
            if left_s < 0 or not self.socket.poll(int(1000 * left_s)):
                raise TimeoutError(f"the core did not answer; so far {vars(self)}")
            self.take(decode_to_front(self.socket.recv()))

    def take(self, message: ToFront) -> None:
        match message:
            case ModelReady():
                self.ready = message
            case ModelLost():
                self.num_lost += 1
                self.ready = None
            case Pulse():
                self.pulses.append(message)
            case Inspection():
                self.inspections.append(message)
            case Outputs():
                for refused in message.refused:
                    self.refused[refused.stream] = refused
                self.admitted += [admitted.stream for admitted in message.admitted]
                streams = np.frombuffer(message.streams, np.int64).tolist()
                tokens = np.frombuffer(message.tokens, np.int32).tolist()
                for stream, token in zip(streams, tokens, strict=True):
                    assert stream not in self.finished
                    self.tokens.setdefault(stream, []).append(token)
                for finished in message.finished:
                    assert finished.stream not in self.finished
                    self.finished[finished.stream] = finished

    def until_dropped(self, num_frames: int) -> Inspection:
        """Waits until the core has dropped that many frames; others write them when they can."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while (inspection := self.inspect()).num_dropped_frames < num_frames:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{inspection.num_dropped_frames} of {num_frames} are dropped")
            time.sleep(0.01)
        return inspection

    def inspect(self) -> Inspection:
        """Returns the core's own account of itself."""
        count = len(self.inspections)
        self.send(Inspect())
        self.until(lambda: len(self.inspections) > count)
        return self.inspections[-1]


class CoreProcess:
    """A core in a run_dir of its own; ends, with its workers, at the end of `with`."""

    def __init__(self, **options: object) -> None:
        self.run_dir = Path(tempfile.mkdtemp(prefix="loom-"))
        self.config = SchedulerConfig(model="fake", run_dir=str(self.run_dir), **options)  # type: ignore[arg-type]
        self.context = zmq.Context()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tokenloom.scheduler.core", self.config.to_json()],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.workers: list[subprocess.Popen[bytes]] = []

    def start_worker(self, *args: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tokenloom.worker.fake"]
        worker = subprocess.Popen(
            [*command, "--connect", self.config.worker_endpoint, *args], env=ENVIRONMENT
        )
        self.workers.append(worker)
        return worker

    def until_told(self, word: str) -> set[int]:
        """Waits for a line of the core's standard output; returns the processes that it names."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            first, *pids = line.split()
            if first == word:
                return {int(pid) for pid in pids}
        raise RuntimeError(f"the core ended without a word of {word}")

    def front(self) -> FrontSocket:
        return FrontSocket(self.context, self.config.core_endpoint)

    def ready_front(self) -> FrontSocket:
        front = self.front()
        front.until(lambda: front.ready is not None)
        return front

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self.workers:
            process.kill()
            process.wait()
        self.process.kill()
        self.process.communicate()
        self.context.destroy(linger=0)
        shutil.rmtree(self.run_dir)
