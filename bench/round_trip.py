"""Core and worker alone: does the next step come before a short one has ended?

    python -m bench.round_trip [--step-ms 0.5 1 5] [--streams 1 64 256] [--spin-us 0 1000]

Starts a core and a fake worker (fake_worker.py), is the front itself, and keeps --streams
requests running without gRPC. Prints a table: steps per second beside those that the worker's
pace allows, the share of time that the worker waited for work, the answer time, the core's
delay (timed_core.py), and how busy the two are.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import zmq

from bench.fake_worker import MAX_MODEL_TOKENS
from bench.streams import BENCH, STOP_TIMEOUT_S, cpu_s, percentiles_ms, window
from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.messages import (
    Attach,
    Commands,
    Load,
    ModelReady,
    Outputs,
    Submit,
    decode_to_front,
    encode,
)
from tokenloom.wire.messages import SamplingParams

VOCAB_SIZE = 32000
NUM_PROMPT_TOKENS = 16
WARMUP_S = 0.3
START_TIMEOUT_MS = 30_000
COLUMNS = (
    *("step ms", "streams", "spin µs", "steps/s", "wanted", "waited %"),
    *("answer p50", "p99 µs", "delay p50", "p99 µs", "core busy", "worker busy"),
)


def main() -> None:
    """Measures each combination and prints a line for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step-ms", type=float, nargs="+", default=[0.5, 1.0, 5.0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--spin-us", type=int, nargs="+", default=[0, 1000])
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    print(" ".join(f"{name:>11}" for name in COLUMNS), flush=True)
    for step_ms in options.step_ms:
        for num_streams in options.streams:
            for spin_us in options.spin_us:
                with tempfile.TemporaryDirectory(prefix="loom-bench-") as run_dir:
                    row = measure(Path(run_dir), step_ms, num_streams, spin_us, options.seconds)
                print(" ".join(f"{value:>11}" for value in row), flush=True)


def measure(
    run_dir: Path, step_ms: float, num_streams: int, spin_us: int, seconds: float
) -> list[object]:
    """Returns a row of the table."""
    config = SchedulerConfig(
        model="fake",
        run_dir=str(run_dir),
        max_num_requests=num_streams,
        spin_us=spin_us,
    )
    core = ("timed_core.py", run_dir / "core.json", config.to_json())
    worker = ("fake_worker.py", config.worker_endpoint, step_ms, VOCAB_SIZE)
    with (
        started(core) as core_process,
        started((*worker, run_dir / "worker.json", spin_us)) as worker_process,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as front,
    ):
        front.connect(config.core_endpoint)
        front.send(encode(Attach(pid=os.getpid())))
        wait_for_model(front)
        front.send(encode(Commands(commands=tuple(map(request, range(num_streams))))))
        read_for(front, WARMUP_S)
        processes = {"core": core_process, "worker": worker_process}
        before, begin_s = cpu_s(processes), time.monotonic()
        read_for(front, seconds)
        after, end_s = cpu_s(processes), time.monotonic()
        core_process.terminate()  # it tells the worker
        for process in processes.values():
            process.wait(STOP_TIMEOUT_S)
    steps = window(run_dir / "worker.json", begin_s, end_s)
    delays = window(run_dir / "core.json", begin_s, end_s)
    measured_s = end_s - begin_s
    answer, delay = percentiles_ms(steps[:, 1]), percentiles_ms(delays[:, 1])
    return [
        *(step_ms, num_streams, spin_us),
        *(round(len(steps) / measured_s), round(1000 / step_ms)),
        round(100 * float(steps[:, 2].sum()) / measured_s, 2),
        *(round(1000 * answer[name]) for name in ("p50", "p99")),
        *(round(1000 * delay[name]) for name in ("p50", "p99")),
        *(round((after[name] - before[name]) / measured_s, 2) for name in processes),
    ]


@contextmanager
def started(command: Sequence[object]) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a script of this folder until the end of `with`; its log is not shown."""
    script, *arguments = map(str, command)
    process = subprocess.Popen(
        [sys.executable, BENCH / script, *arguments], stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_model(front: zmq.Socket[bytes]) -> None:
    """Reads until the worker serves. Raises TimeoutError."""
    while front.poll(START_TIMEOUT_MS):
        if isinstance(decode_to_front(front.recv()), ModelReady):
            return
    raise TimeoutError("the worker is not ready")


def request(stream: int) -> Submit:
    """Returns a request that runs to the end of the measurement."""
    tokens = np.random.default_rng(stream).integers(0, VOCAB_SIZE, NUM_PROMPT_TOKENS)
    sampling = SamplingParams(
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        seed=stream,
        min_tokens=0,
        stop_token_ids=(),
        logit_bias=(),
        num_top_logprobs=None,
    )
    return Submit(
        stream=stream,
        tokens=tokens.astype(np.int32).tobytes(),
        max_tokens=MAX_MODEL_TOKENS // 2,
        sampling=sampling,
        salt="",
    )


def read_for(front: zmq.Socket[bytes], seconds: float) -> None:
    """Reads what comes for some time. Raises RuntimeError if a request ends or is refused."""
    end_s = time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        if front.poll(int(1000 * left_s) + 1):
            message = decode_to_front(front.recv())
            if isinstance(message, Load):
                continue
            if not isinstance(message, Outputs) or message.finished or message.refused:
                raise RuntimeError(f"the core says {message}")


if __name__ == "__main__":
    main()
