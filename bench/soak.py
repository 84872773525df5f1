"""Serves the pocket model to bad clients for a long time and watches what grows: `make soak`.

    load      good requests · cancels · deadlines · bad requests · slow readers
              half-open connections · a stopped client · kill -9 of the worker
    watched   memory, descriptors, asyncio tasks of each process · blocks · metric series

What is there at rest, after a warm-up and at the end, is compared: a process that has grown,
a block that is missing, or a good request that did not end well, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import psutil
import zmq

from tokenloom.client import Client, TokenloomError
from tokenloom.scheduler import cli
from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.front import __main__ as front
from tokenloom.scheduler.messages import (
    Attach,
    Commands,
    Inspect,
    Inspection,
    decode_to_front,
    encode,
)
from tokenloom.scheduler.supervise import Child
from tokenloom.v1 import inference_pb2 as pb
from tokenloom.v1.inference_pb2_grpc import InferenceStub

POCKET = Path(__file__).parent.parent / "models/pocket"
NUM_FRONTS = 2
REST_S = 45.0
"""Until a client that stands still is noticed, and its stream with it."""
WARM_UP_PART = 0.2
SAMPLE_S = 15.0
KILL_S = 90.0
MAX_GROWTH = 0.1
"""Of a process' memory at rest."""
MAX_GROWTH_BYTES = 24 * 1024 * 1024
"""What is always allowed: allocators keep some."""
MAX_MORE = 4
"""Descriptors and tasks at rest that may be more: a connection that is just closing."""

MAX_MORE_SERIES = 20
"""Metric series that may be more: of a reason that comes seldom."""

BAD = (
    pb.GenerateRequest(),
    pb.GenerateRequest(text=""),
    pb.GenerateRequest(tokens=pb.TokenIds(ids=[2**32 - 1])),
    pb.GenerateRequest(text="x" * 2**20),
    pb.GenerateRequest(text="a", sampling=pb.Sampling(temperature=-1)),
    pb.GenerateRequest(text="a", sampling=pb.Sampling(logit_bias={2**31: 1.0})),
    pb.GenerateRequest(text="a", stopping=pb.Stopping(stop_strings=["x"] * 100)),
    pb.GenerateRequest(text="a", stopping=pb.Stopping(max_tokens=10**9)),
    pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * 2000)),
)


# The server: as users start it, but that fronts tell how many tasks they have -----------------


def serve(argv: list[str]) -> int:
    """Runs `tokenloom serve` with fronts of this module."""
    real_stages = cli.stages

    def stages(
        config: SchedulerConfig, workers: list[tuple[str, ...]], *, stand_by: bool
    ) -> list[list[Child]]:
        made = real_stages(config, workers, stand_by=stand_by)
        told = (sys.executable, "-m", "bench.soak", "front", config.to_json())
        fronts = [
            Child(**(vars(child) | {"argv": told})) if child.name.startswith("front") else child
            for child in made[0]
        ]
        return [fronts, *made[1:]]

    vars(cli)["stages"] = stages
    return cli.serve(argv)


def run_front(config: str) -> int:
    """Runs a front that writes the number of its tasks to a file of the run_dir."""
    real_run = vars(front)["run"]
    run_dir = Path(SchedulerConfig.from_json(config).run_dir)

    async def tell() -> None:
        path = run_dir / f"tasks-{os.getpid()}"
        while True:
            path.write_text(str(len(asyncio.all_tasks())), encoding="utf-8")
            await asyncio.sleep(1)

    async def run(*args: object) -> None:
        telling = asyncio.create_task(tell())
        try:
            await real_run(*args)
        finally:
            telling.cancel()

    vars(front)["run"] = run
    return front.main([config])


class Server:
    """The server's processes and a look into its core, until the end of `with`."""

    def __init__(self) -> None:
        self.run_dir = Path(tempfile.mkdtemp(prefix="loom-soak-"))
        command = [sys.executable, "-m", "bench.soak", "serve", str(POCKET), "--device=cpu"]
        options = [
            f"--run-dir={self.run_dir}",
            "--listen=127.0.0.1:0",
            f"--num-fronts={NUM_FRONTS}",
            "--admin-listen=127.0.0.1:0",
            "--max-num-requests=16",
            "--max-waiting-requests=32",
            "--max-stream-buffer-tokens=256",
            "--max-crashes=1000000",
            "--kv-cache-bytes=64MiB",
            "--cpu-threads=1",
        ]
        self.metrics_url = ""
        if "metrics_listen" in SchedulerConfig.__dataclass_fields__:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            options.append(f"--metrics-listen=127.0.0.1:{port}")
            self.metrics_url = f"http://127.0.0.1:{port}/metrics"
        self.process = subprocess.Popen([*command, *options])
        self._context = zmq.Context()
        self._core = self._context.socket(zmq.DEALER)
        self._core.setsockopt(zmq.LINGER, 0)

    def __enter__(self) -> Self:
        while not (self.run_dir / "address").exists():
            if self.process.poll() is not None:
                raise RuntimeError(f"the server exited with {self.process.returncode}")
            time.sleep(0.1)
        self.address = (self.run_dir / "address").read_text(encoding="utf-8")
        with Client(self.address) as client:
            client.wait_ready(timeout_s=120)
        self._core.connect(f"ipc://{self.run_dir}/core.sock")
        self._core.send(encode(Attach(pid=os.getpid())))
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._context.destroy(linger=0)
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def inspect(self) -> Inspection:
        """Returns the core's own account of itself."""
        self._core.send(encode(Commands(commands=(Inspect(),))))
        while True:
            if not self._core.poll(60_000):
                raise TimeoutError("the core does not answer")
            message = decode_to_front(self._core.recv())
            if isinstance(message, Inspection):
                return message

    def children(self) -> dict[str, psutil.Process]:
        """Returns the server's processes by name."""
        found: dict[str, psutil.Process] = {"supervisor": psutil.Process(self.process.pid)}
        num_fronts = 0
        for child in sorted(found["supervisor"].children(), key=lambda child: child.pid):
            with suppress(psutil.NoSuchProcess):
                words = child.cmdline()
                if "front" in words:
                    num_fronts += 1
                    found[f"front {num_fronts}"] = child
                else:
                    module = next((word for word in words if word.startswith("tokenloom.")), "?")
                    found[module.rpartition(".")[2]] = child
        return found

    def num_series(self) -> int:
        """Returns how many lines the metrics have; 0: there are none."""
        if not self.metrics_url:
            return 0
        with urllib.request.urlopen(self.metrics_url, timeout=30) as response:  # noqa: S310 - ours
            lines = response.read().decode().splitlines()
        return sum(not line.startswith("#") for line in lines)


# What clients do ------------------------------------------------------------------------------


class Load:
    """Threads that do what clients do, and worse; `pause` ends all that is under way."""

    def __init__(self, server: Server, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._server = server
        self._seed = seed
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begins, or goes on."""
        self._stopped.clear()
        callers: list[Callable[[random.Random], None]] = [
            *(self._good for _ in range(4)),
            *(self._cancel for _ in range(2)),
            self._deadline,
            self._bad,
            *(self._slow for _ in range(2)),
            self._half_open,
            self._stopped_client,
            self._kill_worker,
        ]
        self._threads = [
            threading.Thread(target=self._repeat, args=(caller, place), daemon=True)
            for place, caller in enumerate(callers)
        ]
        for thread in self._threads:
            thread.start()

    def pause(self) -> None:
        """Lets every client end what it does."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(180)
            if thread.is_alive():
                self.wrong.append(f"{thread} does not end")

    def _repeat(self, caller: Callable[[random.Random], None], place: int) -> None:
        self._seed += 1
        rng = random.Random(f"{self._seed} {place}")
        while not self._stopped.is_set():
            try:
                caller(rng)
            except Exception as error:  # noqa: BLE001 - told at the end
                self.wrong.append(f"{caller.__name__}: {error!r}")
            self.counts[caller.__name__.strip("_")] += 1
            self._stopped.wait(rng.uniform(0.05, 0.3))

    def _good(self, rng: random.Random) -> None:
        num_tokens = rng.randint(5, 80)
        prompt = "Once upon a time " * rng.randint(1, 20)
        with Client(self._server.address) as client:
            while True:  # while the model is loaded again, new requests are refused
                try:
                    result = client.generate(
                        prompt,
                        max_tokens=num_tokens,
                        ignore_eos=True,
                        stop=["never in a text"],
                        timeout_s=150,
                    ).result()
                except TokenloomError as error:
                    if error.reason not in {"MODEL_LOST", "NOT_READY", "QUEUE_FULL"}:
                        raise
                    time.sleep(0.5)
                else:
                    break
        if len(result.token_ids) != num_tokens:
            self.wrong.append(f"{len(result.token_ids)} tokens came of {num_tokens}")

    def _cancel(self, rng: random.Random) -> None:
        with self._stub() as stub:
            call = stub.Generate(_long(rng))
            with suppress(grpc.RpcError):
                for _ in range(rng.randint(0, 20)):
                    next(call)
            call.cancel()

    def _deadline(self, rng: random.Random) -> None:
        with self._stub() as stub, suppress(grpc.RpcError):
            list(stub.Generate(_long(rng), timeout=rng.uniform(0.01, 1.0)))

    def _bad(self, rng: random.Random) -> None:
        with grpc.insecure_channel(self._server.address) as channel:
            call: Any = channel.unary_stream("/tokenloom.v1.Inference/Generate")
            data = rng.choice([*(bad.SerializeToString() for bad in BAD), rng.randbytes(100)])
            try:
                list(call(data, timeout=30))
            except grpc.RpcError as error:
                self.counts[f"bad: {error.code().name}"] += 1

    def _slow(self, rng: random.Random) -> None:
        request = _long(rng)
        request.output.num_top_logprobs = 20
        with self._stub() as stub, suppress(grpc.RpcError):
            call = stub.Generate(request, timeout=60)
            for _ in range(rng.randint(1, 10)):
                next(call)
                self._stopped.wait(rng.uniform(0.1, 2.0))
            call.cancel()

    def _half_open(self, rng: random.Random) -> None:
        host, _, port = self._server.address.rpartition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[: rng.randint(0, 24)])
            connection.sendall(rng.randbytes(rng.choice([0, 9, 200])))
            self._stopped.wait(rng.uniform(0.1, 5.0))

    def _stopped_client(self, rng: random.Random) -> None:
        command = [sys.executable, "-m", "bench.soak", "caller", self._server.address]
        caller = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            assert caller.stdout is not None
            caller.stdout.readline()
            caller.send_signal(signal.SIGSTOP)
            self._stopped.wait(rng.uniform(5, 60))
        finally:
            caller.kill()
            caller.communicate()

    def _kill_worker(self, rng: random.Random) -> None:
        if self._stopped.wait(KILL_S * rng.uniform(0.5, 1.5)):
            return
        worker = self._server.children().get("worker")
        if worker is not None:
            worker.kill()

    @contextmanager
    def _stub(self) -> Iterator[InferenceStub]:
        with grpc.insecure_channel(
            self._server.address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            yield InferenceStub(channel)


def _long(rng: random.Random) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="Once upon a time",
        sampling=pb.Sampling(seed=rng.getrandbits(32)),
        stopping=pb.Stopping(max_tokens=400, ignore_eos=True),
    )


def call_and_wait(address: str) -> int:
    """Opens a long stream, says so, and reads on until it is stopped."""
    with grpc.insecure_channel(address) as channel, suppress(grpc.RpcError):
        for response in InferenceStub(channel).Generate(_long(random.Random())):
            sys.stdout.write(f"{response.WhichOneof('event')}\n")
            sys.stdout.flush()
    return 0


# What is watched ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the server holds at one moment."""

    elapsed_s: float
    memory_bytes: dict[str, int]
    num_files: dict[str, int]
    num_tasks: dict[str, int]
    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_steps: int
    num_series: int


def take_sample(server: Server, began_s: float) -> Sample:
    """Looks at all processes but the worker, which is another one after each kill."""
    memory: dict[str, int] = {}
    files: dict[str, int] = {}
    tasks: dict[str, int] = {}
    for name, process in server.children().items():
        if name == "worker":
            continue
        memory[name] = process.memory_info().rss
        files[name] = process.num_fds()
        told = server.run_dir / f"tasks-{process.pid}"
        if told.exists():
            tasks[name] = int(told.read_text(encoding="utf-8") or 0)
    inspection = server.inspect()
    if inspection.violations:
        raise RuntimeError(f"the core's structures disagree: {inspection.violations}")
    return Sample(
        elapsed_s=time.monotonic() - began_s,
        memory_bytes=memory,
        num_files=files,
        num_tasks=tasks,
        num_running=inspection.num_running,
        num_waiting=inspection.num_waiting,
        num_used_blocks=inspection.num_blocks - inspection.num_free_blocks,
        num_steps=inspection.num_steps,
        num_series=server.num_series(),
    )


def show(sample: Sample) -> None:
    """Prints a sample as a line."""
    processes = "  ".join(
        f"{name} {size / 2**20:.0f} MiB {sample.num_files[name]} files"
        + (f" {sample.num_tasks[name]} tasks" if name in sample.num_tasks else "")
        for name, size in sample.memory_bytes.items()
    )
    print(
        f"{sample.elapsed_s:6.0f} s  {processes}  running {sample.num_running} waiting "
        f"{sample.num_waiting}  blocks {sample.num_used_blocks}  steps {sample.num_steps}  "
        f"series {sample.num_series}",
        flush=True,
    )


def grown(first: Sample, last: Sample) -> list[str]:
    """Returns what is more at the end than after the warm-up, both at rest."""
    found = []
    for name, before in first.memory_bytes.items():
        after = last.memory_bytes[name]
        if after - before > max(MAX_GROWTH * before, MAX_GROWTH_BYTES):
            found.append(f"memory of {name}: {before / 2**20:.0f} → {after / 2**20:.0f} MiB")
    for what, counts, later in (
        ("files", first.num_files, last.num_files),
        ("tasks", first.num_tasks, last.num_tasks),
    ):
        found += [
            f"{what} of {name}: {count} → {later[name]}"
            for name, count in counts.items()
            if later[name] > count + MAX_MORE
        ]
    for name in ("num_running", "num_waiting", "num_used_blocks"):
        if getattr(last, name):
            found.append(f"{name} is {getattr(last, name)} at rest")
    if last.num_series > first.num_series + MAX_MORE_SERIES:
        found.append(f"metric series: {first.num_series} → {last.num_series}")
    return found


def at_rest(server: Server, load: Load, began_s: float) -> Sample:
    """Stops the load and looks once nothing can be under way."""
    load.pause()
    time.sleep(REST_S)
    with Client(server.address) as client:
        client.wait_ready(timeout_s=120)
    print("at rest:")
    sample = take_sample(server, began_s)
    show(sample)
    return sample


def soak(minutes: float, seed: int) -> int:
    """Returns the exit code."""
    began_s = time.monotonic()
    whole_s = 60 * minutes
    with Server() as server:
        load = Load(server, seed)

        def run_until(end_s: float) -> None:
            load.start()
            while (left_s := began_s + end_s - time.monotonic()) > 0:
                time.sleep(min(SAMPLE_S, left_s))
                with suppress(psutil.NoSuchProcess):
                    show(take_sample(server, began_s))

        run_until(WARM_UP_PART * whole_s)
        first = at_rest(server, load, began_s)
        run_until(whole_s)
        last = at_rest(server, load, began_s)
    wrong = [*load.wrong, *grown(first, last)]
    print(json.dumps(load.counts, indent=1))
    for line in wrong:
        print(f"wrong: {line}")
    print("nothing grew" if not wrong else f"{len(wrong)} things are wrong")
    return 1 if wrong else 0


def main(argv: list[str]) -> int:
    """Runs the soak, or one of its processes."""
    match argv:
        case ["serve", *options]:
            return serve(options)
        case ["front", config]:
            return run_front(config)
        case ["caller", address]:
            return call_and_wait(address)
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    return soak(args.minutes, args.seed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
