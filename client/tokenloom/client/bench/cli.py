"""The command line of `tokenloom bench`."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tokenloom.client.bench.figures import Target, figures
from tokenloom.client.bench.load import (
    AtOnce,
    Concurrency,
    Endpoint,
    Grpc,
    Load,
    OpenAI,
    Rate,
    Run,
    poisson_arrivals,
)
from tokenloom.client.bench.measure import BenchError, measure
from tokenloom.client.bench.plot import check_installed, plot
from tokenloom.client.bench.report import Point, Report, point_lines, summary_lines
from tokenloom.client.bench.workload import (
    CASES,
    Endless,
    Lengths,
    Request,
    Source,
    WorkloadError,
    random_requests,
    read_requests,
)
from tokenloom.client.client import Client
from tokenloom.client.errors import TokenloomError
from tokenloom.client.flags import access_of, add_access_options
from tokenloom.client.grpc_transport import GrpcTransport

_DEFAULT_TARGET = "localhost:50051"
_DEFAULT_LENGTHS = Lengths(128, 128)
_DEFAULT_SEED = 0
_MAX_DEFAULT_PROCESSES = 4

_DESCRIPTION = """\
Loads a server and reports what its clients see: tokens a second, time to the first token,
inter-token and end-to-end latency, stalls, errors.

  tokenloom bench --case mixed256
  tokenloom bench --concurrency 1 8 32 128 --seconds 30 --input 512 --output 256 --plot c.png
  tokenloom bench --rate 1 2 4 8 --seconds 60 --input 100:1024 --output 100:1024 --ttft-ms 500
  tokenloom bench --openai http://host:8000/v1 --model NAME --case b32

Several rates or concurrencies run one after the other. A delta of n tokens that comes g after
the one before counts as n inter-token latencies of g / n.
"""


@dataclass(frozen=True, kw_only=True)
class _Server:
    """What is loaded, and what it tells of itself."""

    endpoint: Endpoint
    api: str
    target: str
    model: str
    version: str | None
    vocab_size: int | None


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    try:
        if args.plot is not None:
            check_installed()
        server = _server(args)
        report = _measure_all(args, server)
    except (ValueError, ModuleNotFoundError) as error:  # of workloads and of access
        parser.error(str(error))
    except (BenchError, TokenloomError, OSError) as error:
        print(f"tokenloom bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    try:
        _write(args, report)
    except (OSError, ValueError) as error:  # no such folder, no such format of pictures
        print(f"tokenloom bench: {error}", file=sys.stderr)
        return 1
    if report.points[-1].interrupted or len(report.points) < len(_loads(args)):
        return 128 + signal.SIGINT
    return 0 if any(point.figures.num_done for point in report.points) else 1


def _measure_all(args: argparse.Namespace, server: _Server) -> Report:
    """Runs each load in turn, until one is interrupted; tells of each when it is over."""
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    out = sys.stderr if args.json == "-" else sys.stdout
    points: list[Point] = []
    loads = _loads(args)
    num_processes = 0
    for number, load in enumerate(loads):
        try:
            run = _run(args, server, load, number)
            point = _point(run, args)
        except KeyboardInterrupt:  # the second, or between two loads: keep what is whole
            if not points:
                raise
            break
        num_processes = max(num_processes, run.num_processes)
        points.append(point)
        print("\n".join(point_lines(point)), end="\n\n", file=out, flush=True)
        if point.interrupted:
            break
    if len(points) > 1:
        print("\n".join(summary_lines(points)), file=out, flush=True)
    return Report(
        started_at=started_at,
        api=server.api,
        target=server.target,
        model=server.model,
        server_version=server.version,
        workload=_workload_words(args),
        ignore_eos=args.ignore_eos,
        temperature=args.temperature,
        num_processes=num_processes,
        points=tuple(points),
    )


def _point(run: Run, args: argparse.Namespace) -> Point:
    measurement = measure(run)
    interrupted = not math.isinf(measurement.stopped_s)
    end_s = None if run.end_s is None else min(run.end_s, measurement.stopped_s)
    has_target = args.ttft_ms is not None or args.itl_ms is not None
    return Point(
        load=run.load,
        interrupted=interrupted,
        figures=figures(
            measurement.records,
            begin_s=run.warmup_s,
            end_s=end_s,
            target=Target(ttft_ms=args.ttft_ms, itl_ms=args.itl_ms) if has_target else None,
            exact_lengths=run.ignore_eos,
            client_cpu_s=measurement.client_cpu_s,
        ),
    )


def _run(args: argparse.Namespace, server: _Server, load: Load, number: int) -> Run:
    """Returns the run of a load, the `number`-th of the command."""
    end_s = None if args.seconds is None else args.warmup_s + args.seconds
    # Another seed for each load: prompts that come again would be found in a prefix cache.
    seed = (_DEFAULT_SEED if args.seed is None else args.seed) + number
    source, num_requests = _source(args, server, seed)
    arrivals_s = None
    match load:
        case AtOnce():
            max_processes = num_requests or 1
        case Concurrency(num_streams):
            max_processes = num_streams
        case Rate(requests_per_s):
            arrivals_s = poisson_arrivals(
                requests_per_s, num_requests=num_requests, end_s=end_s, seed=seed
            )
            num_requests = len(arrivals_s)
            max_processes = max(1, num_requests)
    return Run(
        endpoint=server.endpoint,
        source=source,
        load=load,
        num_requests=num_requests,
        warmup_s=args.warmup_s,
        end_s=end_s,
        num_processes=min(args.processes, max_processes),
        ignore_eos=args.ignore_eos,
        temperature=args.temperature,
        timeout_s=args.timeout_s,
        arrivals_s=arrivals_s,
    )


def _source(args: argparse.Namespace, server: _Server, seed: int) -> tuple[Source, int | None]:
    """Returns the requests, and how many; None: as many as there is time for."""
    if args.prompts is not None:
        listed = read_requests(args.prompts, max_tokens=args.output and args.output.low)
        return listed, None if args.seconds else args.requests or len(listed.requests)
    if args.case is not None:
        case = CASES[args.case]
        listed = case.requests(args.vocab_size)
        _check_vocabulary(args.case, listed.requests, server)
        return listed, None if args.seconds else case.num_requests
    vocab_size = args.vocab_size or server.vocab_size
    if vocab_size is None:
        raise WorkloadError("this server does not tell its vocabulary; say --vocab-size")
    prompt_tokens = args.input or _DEFAULT_LENGTHS
    output_tokens = args.output or _DEFAULT_LENGTHS
    if args.requests is None:
        return Endless(
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            vocab_size=vocab_size,
            seed=seed,
        ), None
    listed = random_requests(
        args.requests,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        vocab_size=vocab_size,
        seed=seed,
    )
    return listed, args.requests


def _check_vocabulary(name: str, requests: Sequence[Request], server: _Server) -> None:
    largest = max(
        max(request.prompt) for request in requests if not isinstance(request.prompt, str)
    )
    if server.vocab_size is not None and largest >= server.vocab_size:
        raise WorkloadError(
            f"case {name} has token id {largest}; {server.model} has {server.vocab_size} ids"
            " (--vocab-size draws smaller ones, which are another workload)"
        )


def _server(args: argparse.Namespace) -> _Server:
    """Waits for the server and returns what it is. Raises TokenloomError."""
    if args.openai is not None:
        return _Server(
            endpoint=OpenAI(url=args.openai, model=args.model),
            api="openai",
            target=args.openai,
            model=args.model,
            version=None,
            vocab_size=None,
        )
    target = args.target or _DEFAULT_TARGET
    access = access_of(args)
    with Client(GrpcTransport(target, access=access)) as client:
        client.wait_ready(timeout_s=args.ready_timeout_s)
        model = client.model(timeout_s=args.ready_timeout_s)
    return _Server(
        endpoint=Grpc(target=target, access=access),
        api="grpc",
        target=target,
        model=model.name,
        version=model.server_version,
        vocab_size=model.vocab_size,
    )


def _loads(args: argparse.Namespace) -> Sequence[Load]:
    if args.rate is not None:
        return [Rate(requests_per_s) for requests_per_s in args.rate]
    if args.concurrency is not None:
        return [Concurrency(num_streams) for num_streams in args.concurrency]
    return [AtOnce()]


def _write(args: argparse.Namespace, report: Report) -> None:
    if args.json is not None:
        text = json.dumps(report.to_json(), indent=None if args.json == "-" else 2) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            Path(args.json).write_text(text, encoding="utf-8")
    if args.plot is not None:
        plot(report, args.plot)


def _workload_words(args: argparse.Namespace) -> str:
    if args.case is not None:
        return str(args.case)
    if args.prompts is not None:
        return f"prompts of {args.prompts.name}"
    lengths = [
        f"{each.low}" if each.low == each.high else f"{each.low}–{each.high}"
        for each in (args.input or _DEFAULT_LENGTHS, args.output or _DEFAULT_LENGTHS)
    ]
    return f"random ids, {lengths[0]} in, {lengths[1]} out"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenloom bench",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target", nargs="?", metavar="TARGET", help=f"address (default: {_DEFAULT_TARGET})"
    )
    parser.add_argument(
        "--openai", metavar="URL", help="load an OpenAI-compatible server: http://host:port/v1"
    )
    parser.add_argument("--model", metavar="NAME", help="its model, with --openai")
    parser.add_argument(
        "--ready-timeout-s",
        type=_positive,
        default=60.0,
        metavar="S",
        help="how long to wait for a server that starts (default: 60)",
    )
    add_access_options(parser)
    _add_load_options(parser)
    _add_workload_options(parser)
    group = parser.add_argument_group("report")
    group.add_argument(
        "--ttft-ms", type=_positive, metavar="MS", help="goodput: first token within"
    )
    group.add_argument(
        "--itl-ms", type=_positive, metavar="MS", help="goodput: a request's mean ITL within"
    )
    group.add_argument("--json", metavar="FILE", help="write the figures; - is standard output")
    group.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw latency and throughput against load"
    )
    return parser


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load (default: all requests at once)")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--concurrency",
        type=_count,
        nargs="+",
        metavar="N",
        help="keep so many requests under way; several: one after the other",
    )
    kind.add_argument(
        "--rate",
        type=_positive,
        nargs="+",
        metavar="R",
        help="Poisson arrivals, requests a second; several: a ramp",
    )
    length = group.add_mutually_exclusive_group()
    length.add_argument("--requests", type=_count, metavar="N", help="send so many")
    length.add_argument(
        "--seconds",
        type=_positive,
        metavar="S",
        help="measure so long; what was sent until then is read to its end",
    )
    group.add_argument(
        "--warmup-s",
        type=_not_negative,
        default=0.0,
        metavar="S",
        help="load before the measured time, left out of the figures (default: 0)",
    )
    group.add_argument(
        "--processes",
        type=_count,
        default=min(_MAX_DEFAULT_PROCESSES, os.cpu_count() or 1),
        metavar="N",
        help="that make the load (default: %(default)s here)",
    )
    group.add_argument(
        "--timeout-s", type=_positive, metavar="S", help="deadline of a request (default: none)"
    )


def _add_workload_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests (default: random token ids)")
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument(
        "--case",
        choices=CASES,
        help="a named workload, the same ids for every system compared",
    )
    prompts.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help="lines of a string, of a list of ids, or of "
        '{"text" or "token_ids": …, "max_tokens": N}',
    )
    group.add_argument(
        "--input", type=_lengths, metavar="N|A:B", help="random prompts' tokens (default: 128)"
    )
    group.add_argument(
        "--output",
        type=_lengths,
        metavar="N|A:B",
        help="tokens to complete (default: 128; with --prompts: what the server allows)",
    )
    group.add_argument(
        "--vocab-size",
        type=_count,
        metavar="N",
        help="random ids are below it (default: what the server tells)",
    )
    group.add_argument("--seed", type=int, metavar="N", help="of all draws (default: 0)")
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="complete as many tokens as asked for, ends or not (default: yes)",
    )
    group.add_argument(
        "--temperature", type=_not_negative, default=0.0, metavar="X", help="(default: 0, greedy)"
    )


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses options that do not go together."""
    is_random = args.case is None and args.prompts is None
    is_at_once = args.concurrency is None and args.rate is None
    if args.openai is not None and args.target is not None:
        parser.error(f"load one server: {args.target} or --openai {args.openai}")
    if (args.openai is None) != (args.model is None):
        parser.error("--openai and --model go together")
    if args.openai is not None and not args.openai.startswith(("http://", "https://")):
        parser.error(f"--openai is {args.openai}; it starts with http:// or https://")
    if is_at_once and args.seconds is not None:
        parser.error(
            "--seconds needs --concurrency or --rate; all at once takes as long as it does"
        )
    if is_at_once and args.warmup_s:
        parser.error("--warmup-s needs --concurrency or --rate")
    if is_random and args.requests is None and args.seconds is None:
        parser.error("say --requests" + ("" if is_at_once else " or --seconds"))
    if args.case is not None:
        own = ("requests", "input", "output", "seed")
        given = [name for name in own if getattr(args, name) is not None]
        if given:
            parser.error(f"--case {args.case} has its own --{given[0]}")
    if args.prompts is not None and args.input is not None:
        parser.error("--input is for random prompts")
    if args.prompts is not None and args.output is not None and args.output.low != args.output.high:
        parser.error("--output of a file's prompts is one number")


def _lengths(text: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except WorkloadError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value
