"""The command line of `tokenloom top`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NoReturn

from tokenloom.client.flags import access_of, add_access_options
from tokenloom.client.renewing import open_channel
from tokenloom.client.top.rows import Row, row_of
from tokenloom.client.top.screen import Screen
from tokenloom.client.top.table import as_json, table
from tokenloom.client.top.watching import Watch

_OPTIONS = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
_ONCE_S = 10.0
"""How long `--once` waits for replicas that say nothing, beside two intervals."""


def main(argv: Sequence[str]) -> int:
    """Shows replicas until `q`; returns the exit status.

    0; with `--once` 1 if one of the replicas is away; 130 interrupted.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        access = access_of(args)
        channels = {each: open_channel(each, _OPTIONS, access) for each in args.targets}
    except ValueError as error:
        parser.error(str(error))
    try:
        with Watch(channels, interval_s=args.interval_s) as watch:
            if args.once:
                return _once(watch, args)
            if args.json or not sys.stdout.isatty():
                _print_on(watch, args)
            with Screen() as screen:
                while not screen.wait_for_leave(args.interval_s):
                    screen.show(_heading(args), table(_rows(watch)))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Who reads the output has seen enough; the interpreter flushes once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenloom top",
        description="Shows what replicas are busy with, live; q leaves. In a pipe it prints a "
        "table an interval.",
    )
    parser.add_argument(
        "targets",
        nargs="+",
        metavar="TARGET",
        help="where a server serves operators (its --admin-listen): host:port, unix:/path",
    )
    parser.add_argument(
        "--interval-s",
        type=_interval,
        default=1.0,
        metavar="S",
        help="seconds between reports, in [0.1, 60] (default: 1)",
    )
    parser.add_argument(
        "--once", action="store_true", help="print one table and leave: 1 if a replica is away"
    )
    parser.add_argument("--json", action="store_true", help="print an object a line, not a table")
    add_access_options(parser)
    return parser


def _interval(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 60:
        raise argparse.ArgumentTypeError(f"{text} is not in [0.1, 60]")
    return value


def _once(watch: Watch, args: argparse.Namespace) -> int:
    watch.wait_for_rates(_ONCE_S + 2 * args.interval_s)
    rows = _rows(watch)
    _print(rows, as_object=args.json)
    return int(any(row.state == "away" for row in rows))


def _print_on(watch: Watch, args: argparse.Namespace) -> NoReturn:
    """Prints again and again."""
    watch.wait_for_rates(_ONCE_S + 2 * args.interval_s)
    while True:
        _print(_rows(watch), as_object=args.json)
        watch.wait(args.interval_s)


def _print(rows: Sequence[Row], *, as_object: bool) -> None:
    if as_object:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        print(as_json(rows, now), flush=True)
    else:
        print(*(line.text for line in table(rows)), "", sep="\n", flush=True)


def _heading(args: argparse.Namespace) -> str:
    return f"tokenloom top  {datetime.now().astimezone():%H:%M:%S}  every {args.interval_s:g} s"


def _rows(watch: Watch) -> list[Row]:
    return [row_of(sight) for sight in watch.sights()]
