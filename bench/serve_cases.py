"""Serves a checkpoint on this machine and measures cases through gRPC, beside a peer's figures.

    python bench/serve_cases.py MODEL [--cases mixed256 b1 b32 64x256/512] [--repeat 2]
        [--serve-args="--max-step-tokens 8192"] [--open 256x100:1024/100:1024]
        [--beside vllm.log] [--json figures.json] [--log serve.log]

Starts `tokenloom serve` without a prefix cache, waits until it serves, and sends each case all at
once from several client processes, --repeat times. A case is a name that `tokenloom bench` knows,
or COUNTxINPUT/OUTPUT in tokens, with A:B for lengths drawn from a range. A rate is all tokens over
all of the time, prompts included. --open finds the rate of requests that saturates the server, with
COUNT streams in a closed load, and then sends 70 % of it as Poisson arrivals. --target measures a
server that runs already.

--beside reads lines `RESULT {"case": …, "s": …}` of a peer that answered the same requests on the
same machine; the ratio is the peer's time over ours, the best of each. Where the peer also ran
NAME.first (NAME with one token to complete), a single request is compared in decode alone, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from tokenloom.client import Client, DeadlineExceeded, Model, TokenloomError
from tokenloom.client.bench.figures import Figures, Spread, figures
from tokenloom.client.bench.load import (
    AtOnce,
    Concurrency,
    Grpc,
    Load,
    Rate,
    Run,
    poisson_arrivals,
)
from tokenloom.client.bench.measure import BenchError, measure
from tokenloom.client.bench.workload import CASES, Case, Endless, Lengths, Source

SCHEMA = "tokenloom-serve-cases-1"
CASE_VOCAB_SIZE = 100_000
"""The ids of a peer's requests lie below it."""
WARM_UP = Case(4, Lengths(64, 64), Lengths(8, 8))
OPEN_SHARE = 0.7
"""The open load, as a part of the rate that saturates the server."""
READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
NUM_LOG_LINES = 20
"""That are shown of a server which does not come to serve."""
SHAPE = re.compile(r"(\d+)x([\d:]+)/([\d:]+)")
GPU_RAN = re.compile(rb"GPU ran (\d+(?:\.\d+)?) % of (\d+(?:\.\d+)?) s")
"""What a worker logs now and then: the part of the time since the last such line."""
COLUMNS = (
    *("case", "best s", "out tok/s", "median", "in tok/s", "TTFT p50", "p99 ms"),
    *("ITL p50", "p99 ms", "stall", "GPU ran", "peer s", "ratio"),
)


@dataclass(frozen=True, kw_only=True)
class Server:
    """One that serves."""

    address: str
    serving_s: float | None = None
    """From the start of its process until its health said SERVING; None: it ran before."""
    log: Path | None = None

    def log_bytes(self) -> int:
        """Returns how long the log is by now."""
        return 0 if self.log is None else self.log.stat().st_size

    def gpu_share(self, since_bytes: int) -> float | None:
        """Returns the share of the time that the worker has logged since the log was so long."""
        if self.log is None:
            return None
        lines = GPU_RAN.findall(self.log.read_bytes()[since_bytes:])
        told = [(float(percent), float(seconds)) for percent, seconds in lines]
        whole_s = sum(seconds for _, seconds in told)
        return sum(percent * seconds for percent, seconds in told) / whole_s / 100 if told else None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a case, or an open load, showed."""

    name: str
    runs_s: tuple[float, ...]
    """How long each run took."""
    best: Figures
    """Of the run that took least."""
    gpu_share: float | None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """A single request's pace after its first token; None of several requests."""
        if self.best.num_requests > 1 or self.best.itl_ms is None:
            return None
        return 1000 / self.best.itl_ms.mean


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What another system took for the same cases."""

    seconds: Mapping[str, float]
    start_s: float | None

    @classmethod
    def read(cls, path: Path) -> Peer:
        """Reads the RESULT lines of a log. Raises OSError, ValueError."""
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        results = [json.loads(line.partition("RESULT ")[2]) for line in lines if "RESULT {" in line]
        return cls(
            seconds={each["case"]: each["s"] for each in results if "case" in each},
            start_s=next((each["init_s"] for each in results if "init_s" in each), None),
        )

    def decode_tokens_per_s(self, result: Result) -> float | None:
        """Returns a single request's pace after its first token, if NAME.first was measured."""
        whole_s, first_s = self.seconds.get(result.name), self.seconds.get(f"{result.name}.first")
        if whole_s is None or first_s is None:
            return None
        return (result.best.num_output_tokens - 1) / (whole_s - first_s)


class Bench:
    """Sends loads to one server from several processes."""

    def __init__(self, server: Server, *, vocab_size: int, num_processes: int) -> None:
        self._server = server
        self._vocab_size = vocab_size
        self._num_processes = num_processes

    def warm_up(self) -> None:
        """Sends a few requests, for which the server compiles what it compiles late."""
        self.at_once("warm-up", WARM_UP, num_runs=1)

    def at_once(self, name: str, case: Case, num_runs: int) -> Sequence[Result]:
        """Measures a case. Raises BenchError if any answer is missing or has another length."""
        log_bytes = self._server.log_bytes()
        requests = case.requests(self._vocab_size)
        runs = [
            self._figures(AtOnce(), requests, num_requests=case.num_requests)
            for _ in range(num_runs)
        ]
        for run in runs:
            if run.num_short or run.num_done < run.num_requests:
                errors = ", ".join(
                    f"{each.count} × {each.code} {each.reason}" for each in run.errors
                )
                raise BenchError(
                    f"{name}: {run.num_done} of {run.num_requests} done, {run.num_short} of them"
                    f" with another length than asked for; {errors or 'no errors'}"
                )
        result = Result(
            name=name,
            runs_s=tuple(run.measured_s for run in runs),
            best=min(runs, key=lambda run: run.measured_s),
            gpu_share=self._server.gpu_share(log_bytes),
        )
        return (result,)

    def open_load(self, shape: Case, seconds: float) -> Iterator[Result]:
        """Yields saturation, by as many streams as the shape says, and then the load below it."""
        streams = Concurrency(shape.num_requests)
        saturated = self._steady("saturated", streams, shape, seconds, seed=1)
        yield saturated
        # By tokens: of requests too few end in so short a time.
        mean_tokens = (shape.output_tokens.low + shape.output_tokens.high) / 2
        requests_per_s = OPEN_SHARE * saturated.best.output_tokens_per_s / mean_tokens
        name = f"open {requests_per_s:.1f}/s"
        yield self._steady(name, Rate(requests_per_s), shape, seconds, seed=2)

    def _steady(self, name: str, load: Load, shape: Case, seconds: float, *, seed: int) -> Result:
        """Loads for a third of the time to get going, and then measures all of it."""
        log_bytes = self._server.log_bytes()
        source = Endless(
            prompt_tokens=shape.prompt_tokens,
            output_tokens=shape.output_tokens,
            vocab_size=self._vocab_size,
            seed=seed,
        )
        seen = self._figures(load, source, warmup_s=seconds / 3, end_s=seconds * 4 / 3, seed=seed)
        if not seen.num_done:
            raise BenchError(f"{name}: no answer to {seen.num_requests} requests in {seconds} s")
        return Result(
            name=name,
            runs_s=(seen.measured_s,),
            best=seen,
            gpu_share=self._server.gpu_share(log_bytes),
        )

    def _figures(
        self,
        load: Load,
        source: Source,
        *,
        num_requests: int | None = None,
        warmup_s: float = 0.0,
        end_s: float | None = None,
        seed: int = 0,
    ) -> Figures:
        arrivals_s = None
        if isinstance(load, Rate):
            arrivals_s = poisson_arrivals(
                load.requests_per_s, num_requests=None, end_s=end_s, seed=seed
            )
            num_requests = len(arrivals_s)
        measured = measure(
            Run(
                endpoint=Grpc(target=self._server.address),
                source=source,
                load=load,
                num_requests=num_requests,
                warmup_s=warmup_s,
                end_s=end_s,
                num_processes=min(self._num_processes, num_requests or self._num_processes),
                ignore_eos=True,
                temperature=0.0,
                timeout_s=None,
                arrivals_s=arrivals_s,
            )
        )
        if measured.stopped_s < math.inf:
            raise KeyboardInterrupt
        return figures(
            measured.records,
            begin_s=warmup_s,
            end_s=end_s,
            target=None,
            exact_lengths=True,
            client_cpu_s=measured.client_cpu_s,
        )


class Report:
    """Tells a person each result when it is there, and keeps all of them in a file."""

    def __init__(self, args: argparse.Namespace, server: Server, model: Model) -> None:
        self._peer = None if args.beside is None else Peer.read(args.beside)
        self._file: Path | None = args.json
        self._fields = {
            "schema": SCHEMA,
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": model.name,
            "server_version": model.server_version,
            "serve_args": args.serve_args,
            "num_processes": args.processes,
            "serving_s": server.serving_s,
        }
        self._results: list[dict[str, Any]] = []
        print(f"{model.name}, tokenloom {model.server_version}, {self._fields['started_at']}")
        if server.serving_s is not None:
            beside = ""
            if self._peer is not None and self._peer.start_s is not None:
                beside = f" (the peer: {self._peer.start_s:.1f} s)"
            print(f"time to SERVING: {server.serving_s:.1f} s{beside}")
        _print_row(COLUMNS)
        _print_row(["-" * len(name) for name in COLUMNS])

    def add(self, result: Result) -> None:
        """Prints a result and writes the file anew."""
        best, stall = result.best, result.best.longest_stall
        median_s = statistics.median(result.runs_s)
        peer_s = None if self._peer is None else self._peer.seconds.get(result.name)
        _print_row(
            (
                result.name,
                f"{min(result.runs_s):.2f}",
                f"{best.output_tokens_per_s:,.1f}",
                f"{best.num_output_tokens / median_s:,.1f}",
                f"{best.input_tokens_per_s:,.0f}",
                *_cells(best.ttft_ms),
                *_cells(best.itl_ms),
                "–" if stall is None else f"{stall.times_median_itl:.1f} ×",
                "" if result.gpu_share is None else f"{100 * result.gpu_share:.1f} %",
                "" if peer_s is None else f"{peer_s:.2f}",
                "" if peer_s is None else f"{peer_s / min(result.runs_s):.2f} ×",
            )
        )
        decode = result.decode_tokens_per_s
        peer_decode = None if self._peer is None else self._peer.decode_tokens_per_s(result)
        if decode is not None and peer_decode is not None:
            print(
                f"  {result.name} after its first token: {decode:,.1f} tok/s,"
                f" the peer {peer_decode:,.1f}; {decode / peer_decode:.2f} ×",
                flush=True,
            )
        self._results.append(dataclasses.asdict(result) | {"peer_s": peer_s})
        if self._file is not None:
            text = json.dumps(self._fields | {"results": self._results}, indent=2)
            self._file.write_text(text + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what the command line says; returns the exit status."""
    args = _parse(argv)
    try:
        with _server(args) as server:
            return _measure(args, server)
    except (BenchError, TokenloomError, OSError, ValueError) as error:
        print(f"serve_cases: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _measure(args: argparse.Namespace, server: Server) -> int:
    """Measures one thing after the other; returns 1 if any was not answered in full."""
    with Client(server.address) as client:
        model = client.model(timeout_s=READY_TIMEOUT_S)
    vocab_size = min(CASE_VOCAB_SIZE, model.vocab_size)
    if args.beside is not None and vocab_size < CASE_VOCAB_SIZE:
        raise BenchError(
            f"a peer's requests have ids up to {CASE_VOCAB_SIZE}, {model.name} has none"
        )
    report = Report(args, server, model)
    bench = Bench(server, vocab_size=vocab_size, num_processes=args.processes)
    bench.warm_up()
    measurements: list[Callable[[], Iterable[Result]]] = [
        partial(bench.at_once, name, case, num_runs=args.repeat) for name, case in args.cases
    ]
    if args.open is not None:
        measurements.append(partial(bench.open_load, args.open[1], args.open_seconds))
    status = 0
    for measurement in measurements:
        try:
            for result in measurement():
                report.add(result)
        except BenchError as error:  # the others may go well
            print(f"serve_cases: {error}", file=sys.stderr)
            status = 1
    return status


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[Server]:
    """Starts a server, yields it once it serves, and ends it. Raises BenchError."""
    if args.target is not None:
        yield Server(address=args.target)
        return
    with tempfile.TemporaryDirectory(prefix="loom-bench-") as folder:
        run_dir = Path(folder) / "run"
        log = args.log or Path(folder) / "serve.log"
        command = (
            *(sys.executable, "-m", "tokenloom.scheduler", "serve", args.model),
            *("--listen", "127.0.0.1:0", "--run-dir", str(run_dir)),
            *("--no-prefix-cache", "--grace-s", "0"),
            *shlex.split(args.serve_args),
        )
        start_s = time.monotonic()
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C ends the load first
            )
        try:
            address = _wait_ready(process, run_dir / "address", start_s + READY_TIMEOUT_S)
            yield Server(address=address, serving_s=time.monotonic() - start_s, log=log)
        except BenchError:
            print("\n".join(log.read_text(errors="replace").splitlines()[-NUM_LOG_LINES:]))
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()  # its children end with it
                process.wait()


def _wait_ready(process: subprocess.Popen[bytes], address: Path, deadline_s: float) -> str:
    """Returns the address of a server that starts, once it serves. Raises BenchError."""

    def check() -> None:
        if process.poll() is not None:
            raise BenchError(f"the server ended with status {process.returncode}")
        if time.monotonic() > deadline_s:
            raise BenchError(f"the server did not serve within {READY_TIMEOUT_S:g} s")

    while not address.exists():
        check()
        time.sleep(0.02)
    with Client(address.read_text()) as client:
        while True:
            check()
            with suppress(DeadlineExceeded):
                client.wait_ready(timeout_s=1.0)
                return address.read_text()


def _print_row(cells: Sequence[str]) -> None:
    widths = [11, *(max(len(name), 8) for name in COLUMNS[1:])]
    padded = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    print(f"| {' | '.join(padded)} |", flush=True)


def _cells(spread: Spread | None) -> tuple[str, str]:
    return ("–", "–") if spread is None else (f"{spread.p50:,.2f}", f"{spread.p99:,.2f}")


def _case(text: str) -> tuple[str, Case]:
    """Returns a case with its name, for argparse."""
    if text in CASES:
        return text, CASES[text]
    shape = SHAPE.fullmatch(text)
    if shape is None:
        names = ", ".join(CASES)
        raise argparse.ArgumentTypeError(f"{text} is neither {names} nor COUNTxINPUT/OUTPUT")
    try:
        lengths = Lengths.parse(shape[2]), Lengths.parse(shape[3])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text, Case(int(shape[1]), *lengths)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    description, _, notes = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=notes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a checkpoint's folder")
    parser.add_argument("--target", help="address of a server that runs, instead of MODEL")
    parser.add_argument("--cases", type=_case, nargs="*", metavar="CASE", default=())
    parser.add_argument("--repeat", type=int, default=2, metavar="N", help="runs of each case")
    parser.add_argument("--open", type=_case, metavar="CASE", help="streams and lengths")
    parser.add_argument("--open-seconds", type=float, default=30.0, metavar="S")
    parser.add_argument("--processes", type=int, default=4, metavar="N", help="of clients")
    parser.add_argument("--serve-args", default="", metavar="ARGS", help="for `tokenloom serve`")
    parser.add_argument("--beside", type=Path, metavar="FILE", help="RESULT lines of a peer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep the server's log")
    args = parser.parse_args(argv)
    if (args.model is None) == (args.target is None):
        parser.error("say MODEL or --target, one of them")
    if not args.cases and args.open is None:
        args.cases = tuple(CASES.items())
    return args


def _end(number: int, _frame: FrameType | None) -> None:
    """Ends the server, too, when this is told to end."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    sys.exit(main())
