"""Streams through gRPC with a fake worker: what everything around the GPU can carry.

    python bench/streams.py [--streams 1 64 256 1000] [--fronts 1] [--step-ms 5] [--seconds 10]
                            [--tls CERT KEY CA] [--metrics]

Starts fronts on the pocket model's tokenizer, a core and a fake worker that
steps every --step-ms, and loads them with `tokenloom bench`.
Prints for each number of streams a line of JSON: tokens and deltas per second
beside the tokens wanted (what the worker's pace allows), CPU seconds of each
process per 100,000 tokens (of all fronts together), the core's delay (timed_core.py) and
answer time (fake_worker.py), and the share of time that the worker waited for work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.ports import shared_port

T = TypeVar("T")

BENCH = Path(__file__).parent
MODEL = BENCH.parent / "models" / "pocket"
NUM_PROMPT_TOKENS = 16
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0


def main() -> None:
    """Measures each number of streams and prints a line of JSON for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256, 1000])
    parser.add_argument("--fronts", type=int, nargs="+", default=[1])
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=1, help="of clients")
    parser.add_argument("--tokens", default="256:768", help="that a stream asks for: N or A:B")
    parser.add_argument("--spin-us", type=int, help="of core and worker (default: by the host)")
    parser.add_argument("--tls", nargs=3, metavar=("CERT", "KEY", "CA"), help="files; over TLS")
    parser.add_argument("--metrics", action="store_true", help="core and fronts write theirs")
    options = parser.parse_args()
    for num_streams in options.streams:
        for num_fronts in options.fronts:
            with tempfile.TemporaryDirectory(prefix="loom-bench-") as run_dir:
                result = measure(num_streams, num_fronts, options, Path(run_dir))
            print(json.dumps(result), flush=True)


def measure(
    num_streams: int, num_fronts: int, options: argparse.Namespace, run_dir: Path
) -> dict[str, Any]:
    """Returns the figures for one number of streams, with processes of their own."""
    vocab_size = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    cert, key, ca = options.tls or ("", "", "")
    with ExitStack() as stack:
        config = SchedulerConfig(
            model=str(MODEL),
            run_dir=str(run_dir),
            listen=stack.enter_context(
                shared_port("127.0.0.1:0") if num_fronts > 1 else nullcontext("127.0.0.1:0")
            ),
            num_fronts=num_fronts,
            max_num_requests=max(256, num_streams),
            spin_us=options.spin_us,
            tls_cert=cert,
            tls_key=key,
            metrics_listen="127.0.0.1:0" if options.metrics else "",
        )
        Path(config.metrics_dir).mkdir()
        front = ("-m", "tokenloom.scheduler.front", config.to_json())
        commands: dict[str, tuple[object, ...]] = {
            "core": (BENCH / "timed_core.py", run_dir / "core.json", config.to_json()),
            "worker": (
                *(BENCH / "fake_worker.py", config.worker_endpoint, options.step_ms),
                *(vocab_size, run_dir / "worker.json"),
                *(() if options.spin_us is None else (options.spin_us,)),
            ),
            **{f"front {number}": front for number in range(num_fronts)},
        }
        processes = {
            name: stack.enter_context(started(command)) for name, command in commands.items()
        }
        wait_until_listening(processes)
        address = (run_dir / "address").read_text()
        load = stack.enter_context(
            started(
                (
                    *("-m", "tokenloom.client", "bench", address, "--json", "-"),
                    *("--concurrency", num_streams, "--processes", options.processes),
                    *("--input", NUM_PROMPT_TOKENS, "--output", options.tokens),
                    *("--temperature", 1, "--seconds", options.seconds),
                    *("--warmup-s", options.seconds / 2),
                    *(("--tls-ca", ca) if ca else ()),
                ),
                stdout=subprocess.PIPE,
            )
        )
        # The middle of the measured time, clear of start and end.
        time.sleep(options.seconds * 0.75 + 1.0)
        before = cpu_s(processes)
        begin_s = time.monotonic()
        time.sleep(options.seconds * 0.6)
        end_s, after = time.monotonic(), cpu_s(processes)
        figures = load_figures(json.loads(load.communicate()[0]))
        for name in ("front", "core"):  # the core tells the worker
            for process in of_kind(processes, name):
                process.terminate()
            for process in of_kind(processes, name):
                process.wait(STOP_TIMEOUT_S)
        processes["worker"].wait(STOP_TIMEOUT_S)
    num_tokens = figures["tokens_per_s"] * (end_s - begin_s)
    used = {
        kind: sum(of_kind(after, kind)) - sum(of_kind(before, kind))
        for kind in ("front", "core", "worker")
    }
    delays = window(run_dir / "core.json", begin_s, end_s)
    steps = window(run_dir / "worker.json", begin_s, end_s)
    return (
        {"wanted_tokens_per_s": round(num_streams / (options.step_ms / 1000))}
        | {"fronts": num_fronts}
        | figures
        | {
            f"{name}_cpu_s_per_100k_tokens": round(1e5 * s / num_tokens, 2)
            for name, s in used.items()
        }
        | {f"{name}_busy": round(s / (end_s - begin_s), 3) for name, s in used.items()}
        | {
            "each_front_busy": [
                round((end - begin) / (end_s - begin_s), 2)
                for begin, end in zip(
                    of_kind(before, "front"), of_kind(after, "front"), strict=True
                )
            ]
        }
        | {"core_delay_ms": percentiles_ms(delays[:, 1]), "answer_ms": percentiles_ms(steps[:, 1])}
        | {"worker_waited_share": round(float(steps[:, 2].sum() / (end_s - begin_s)), 4)}
    )


def load_figures(report: dict[str, Any]) -> dict[str, Any]:
    """Returns what the clients saw, of the JSON of `tokenloom bench`."""
    point = report["points"][0]
    first_token = point["ttft_ms"] or {}  # none in so short a time
    cpu_s = point["client_cpu_s"]
    return {
        "streams": point["load"]["value"],
        "processes": report["num_processes"],
        "tokens_per_s": round(point["output_tokens_per_s"], 1),
        "deltas_per_s": round(point["deltas_per_s"], 1),
        "tokens_per_delta": round(point["tokens_per_delta"], 2),
        "requests_per_s": round(point["requests_per_s"], 2),
        "first_token_ms": {
            name: round(first_token[name], 2) for name in ("p50", "p99") if name in first_token
        },
        "client_cpu_s": round(cpu_s, 2),
        "client_cpu_s_per_100k_tokens": round(1e5 * cpu_s / point["num_output_tokens"], 2),
        "errors": {f"{each['code']} {each['reason']}": each["count"] for each in point["errors"]},
    }


def started(command: Sequence[object], stdout: int | None = None) -> subprocess.Popen[bytes]:
    """Starts Python with a command line; what it logs is not shown."""
    argv = [sys.executable, *map(str, command)]
    return subprocess.Popen(argv, stdout=stdout, stderr=subprocess.DEVNULL)


def of_kind(by_name: dict[str, T], kind: str) -> list[T]:
    """Returns what belongs to the processes of a kind: "front" is "front 0" and all others."""
    return [value for name, value in by_name.items() if name.split()[0] == kind]


def wait_until_listening(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Waits for all fronts. Raises RuntimeError if a process ends or the time does."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    waiting = of_kind(processes, "front")
    while waiting := [process for process in waiting if not listens(process.pid)]:
        ended = [name for name, process in processes.items() if process.poll() is not None]
        if ended or time.monotonic() > deadline_s:
            for process in processes.values():
                process.kill()
            raise RuntimeError(f"{len(waiting)} fronts do not listen; ended by then: {ended}")
        time.sleep(0.05)


def listens(pid: int) -> bool:
    """Returns whether a process accepts TCP connections."""
    connections = psutil.Process(pid).net_connections("tcp")
    return any(each.status == psutil.CONN_LISTEN for each in connections)


def window(path: Path, begin_s: float, end_s: float) -> np.ndarray:
    """Returns the rows of a report whose first column lies in the measured time."""
    rows = np.array(json.loads(path.read_text()))
    return rows[(rows[:, 0] >= begin_s) & (rows[:, 0] < end_s)]


def percentiles_ms(seconds: np.ndarray) -> dict[str, float]:
    """Returns the median and the 99th percentile in milliseconds."""
    p50, p99 = np.percentile(1000 * seconds, (50, 99)).tolist()
    return {"p50": round(p50, 3), "p99": round(p99, 3)}


def cpu_s(processes: dict[str, subprocess.Popen[bytes]]) -> dict[str, float]:
    """Returns the CPU seconds that each process has used."""
    times = {name: psutil.Process(each.pid).cpu_times() for name, each in processes.items()}
    return {name: float(each.user + each.system) for name, each in times.items()}


if __name__ == "__main__":
    main()
