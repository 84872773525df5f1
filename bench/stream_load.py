"""Tokens and deltas per second through gRPC, from several client processes.

    python bench/stream_load.py localhost:50051 --streams 1 64 256 1000 --tokens 256

Closed loop: each stream asks for the same number of tokens and, when it has them,
at once asks again. Prints a line of JSON for each number of streams. A Python
client costs as much as the server, so the load comes from processes of their own,
over the generated stubs and without the SDK's types.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

import grpc
import grpc.aio

from tokenloom.client import Client
from tokenloom.v1 import inference_pb2 as pb
from tokenloom.v1.inference_pb2_grpc import InferenceStub

START_TIMEOUT_S = 120.0
PAUSE_AFTER_ERROR_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the processes together ask for."""

    target: str
    num_streams: int
    num_processes: int
    num_tokens: int
    num_prompt_tokens: int
    vocab_size: int
    warmup_s: float
    measured_s: float


@dataclass(kw_only=True)
class Counts:
    """What came in the measured time."""

    num_tokens: int = 0
    num_deltas: int = 0
    num_finished: int = 0
    cpu_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    first_token_s: list[float] = field(default_factory=list)
    """From the call to the first delta; all of the run, the warm-up too."""


def main() -> None:
    """Runs the command line."""
    args = _parse()
    with Client(args.target) as client:
        client.wait_ready(timeout_s=START_TIMEOUT_S)
        vocab_size = client.model().vocab_size
    for num_streams in args.streams:
        load = Load(
            target=args.target,
            num_streams=num_streams,
            num_processes=min(args.processes, num_streams),
            num_tokens=args.tokens,
            num_prompt_tokens=args.prompt_tokens,
            vocab_size=vocab_size,
            warmup_s=args.warmup_s,
            measured_s=args.seconds,
        )
        print(json.dumps(measure(load)), flush=True)


def measure(load: Load) -> dict[str, Any]:
    """Runs a load and returns its figures."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(load.num_processes)
    pipes = [context.Pipe(duplex=False) for _ in range(load.num_processes)]
    processes = [
        context.Process(target=_process, args=(load, index, barrier, sender), daemon=True)
        for index, (_, sender) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()  # so that a process that dies is seen as the end of its pipe
    counts = [Counts(**json.loads(receiver.recv_bytes())) for receiver, _ in pipes]
    for process in processes:
        process.join()
    return _figures(load, counts)


def _figures(load: Load, counts: Sequence[Counts]) -> dict[str, Any]:
    num_tokens = sum(each.num_tokens for each in counts)
    num_deltas = sum(each.num_deltas for each in counts)
    cpu_s = sum(each.cpu_s for each in counts)
    errors: Counter[str] = Counter()
    for each in counts:
        errors.update(each.errors)
    first_token_s = sorted(second for each in counts for second in each.first_token_s)
    return {
        "streams": load.num_streams,
        "processes": load.num_processes,
        "tokens_per_s": round(num_tokens / load.measured_s, 1),
        "deltas_per_s": round(num_deltas / load.measured_s, 1),
        "tokens_per_delta": round(num_tokens / max(1, num_deltas), 2),
        "requests_per_s": round(sum(each.num_finished for each in counts) / load.measured_s, 2),
        "first_token_ms": {
            "p50": _milliseconds(first_token_s, 0.5),
            "p99": _milliseconds(first_token_s, 0.99),
        },
        "client_cpu_s": round(cpu_s, 2),
        "client_cpu_s_per_100k_tokens": round(cpu_s / max(1, num_tokens) * 100_000, 2),
        "errors": dict(errors),
    }


def _milliseconds(ordered_s: Sequence[float], share: float) -> float | None:
    """Returns a percentile of what is already in order; None of nothing."""
    if not ordered_s:
        return None
    return round(1000 * ordered_s[min(len(ordered_s) - 1, int(share * len(ordered_s)))], 2)


def _process(load: Load, index: int, barrier: Barrier, sender: Connection) -> None:
    """The work of one client process; sends its counts as JSON."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        counts = runner.run(Share(load, index, barrier).run())
    sender.send_bytes(json.dumps(dataclasses.asdict(counts)).encode())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Returns uvloop's where it is installed; it takes less of the CPU that is measured."""
    try:
        import uvloop  # noqa: PLC0415 - only the client processes need it, and only if it is there
    except ImportError:
        return None
    return uvloop.new_event_loop


class Share:
    """The streams of one process."""

    def __init__(self, load: Load, index: int, barrier: Barrier) -> None:
        self._load = load
        self._index = index
        self._barrier = barrier
        self._counts = Counts()
        self._is_measuring = False

    async def run(self) -> Counts:
        """Opens the streams, keeps them busy, and returns what came in the measured time."""
        load = self._load
        # As many streams for each process as for the others, or one more.
        streams = range(self._index, load.num_streams, load.num_processes)
        async with grpc.aio.insecure_channel(load.target) as channel:
            await asyncio.wait_for(channel.channel_ready(), START_TIMEOUT_S)
            await asyncio.to_thread(self._barrier.wait, START_TIMEOUT_S)
            tasks = [asyncio.create_task(self._keep_asking(channel, number)) for number in streams]
            await asyncio.sleep(load.warmup_s)
            cpu_s = time.process_time()
            self._is_measuring = True
            await asyncio.sleep(load.measured_s)
            self._is_measuring = False
            self._counts.cpu_s = time.process_time() - cpu_s
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return self._counts

    async def _keep_asking(self, channel: grpc.aio.Channel, number: int) -> None:
        load = self._load
        stub = InferenceStub(channel)
        draw = random.Random(number)
        while True:
            ids = [draw.randrange(load.vocab_size) for _ in range(load.num_prompt_tokens)]
            request = pb.GenerateRequest(
                tokens=pb.TokenIds(ids=ids),
                stopping=pb.Stopping(max_tokens=load.num_tokens, ignore_eos=True),
            )
            try:
                await self._read(stub.Generate(request))
            except grpc.aio.AioRpcError as error:
                self._counts.errors[error.code().name] += 1
                await asyncio.sleep(PAUSE_AFTER_ERROR_S)

    async def _read(
        self, call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]
    ) -> None:
        """Counts the deltas of one completion."""
        counts = self._counts
        start_s = time.monotonic()
        is_first = True
        async for message in call:
            num_tokens = len(message.delta.token_ids)
            if num_tokens == 0:
                continue  # the admission and the finish message
            if is_first:
                counts.first_token_s.append(time.monotonic() - start_s)
                is_first = False
            if self._is_measuring:
                counts.num_deltas += 1
                counts.num_tokens += num_tokens
        if self._is_measuring:
            counts.num_finished += 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", help="address of the server")
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[1, 64, 256, 1000], help="default: 1 64 256 1000"
    )
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="default: one for each CPU"
    )
    parser.add_argument("--tokens", type=int, default=256, help="of each answer; default: 256")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="default: 16")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured; default: 10")
    parser.add_argument("--warmup-s", type=float, default=2.0, help="before them; default: 2")
    return parser.parse_args()


if __name__ == "__main__":
    main()
