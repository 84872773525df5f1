"""The commands for those who operate a server: `tokenloom drain`, `abort` and `profile`.

They speak to the server's Admin service, which has an address of its own (`--admin-listen`).
Exit statuses are those of the other commands.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import grpc

from tokenloom.client.chat import describe
from tokenloom.client.errors import TokenloomError
from tokenloom.client.status import error_from_status
from tokenloom.v1 import admin_pb2 as pb
from tokenloom.v1.admin_pb2_grpc import AdminStub

_OPTIONS = [
    # A drain may be silent for long; a server that is gone is noticed all the same.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
]


def drain(argv: Sequence[str]) -> int:
    """`tokenloom drain TARGET`: no new requests, and back when none is left."""
    parser = _parser(
        "drain",
        "Lets a server finish what it has and take nothing new; returns when no request is left. "
        "The server goes on refusing until it is started again.",
    )
    parser.add_argument(
        "--grace-s",
        type=float,
        help="seconds that running requests may take (default: the server's --grace-s)",
    )
    args = parser.parse_args(argv)

    def call(stub: AdminStub) -> None:
        request = pb.DrainRequest()
        if args.grace_s is not None:
            request.grace_s = args.grace_s
        num_ended = stub.Drain(request, timeout=args.timeout_s).num_ended
        sys.stdout.write(f"drained; {num_ended} requests were ended\n")

    return _run(args, call)


def abort(argv: Sequence[str]) -> int:
    """`tokenloom abort TARGET REQUEST_ID`: ends one request."""
    parser = _parser("abort", "Ends a request; its stream ends as cancelled.")
    parser.add_argument("request_id", metavar="REQUEST_ID", help="as its admission and the log say")
    args = parser.parse_args(argv)

    def call(stub: AdminStub) -> None:
        stub.Abort(pb.AbortRequest(request_id=args.request_id), timeout=args.timeout_s)

    return _run(args, call)


def profile(argv: Sequence[str]) -> int:
    """`tokenloom profile TARGET`: what each worker does in the next steps."""
    parser = _parser(
        "profile",
        "Has each worker record its next steps, and writes a trace of each rank, for "
        "chrome://tracing or Perfetto. Steps are slower meanwhile.",
    )
    parser.add_argument("--num-steps", type=int, default=32, metavar="N", help="up to 1000")
    parser.add_argument(
        "--output", type=Path, default=Path(), metavar="DIR", help="where RANK.json.gz go"
    )
    args = parser.parse_args(argv)

    def call(stub: AdminStub) -> None:
        responses = stub.Profile(
            pb.ProfileRequest(num_steps=args.num_steps), timeout=args.timeout_s
        )
        args.output.mkdir(parents=True, exist_ok=True)
        files: dict[int, BinaryIO] = {}
        try:
            for response in responses:
                if response.rank not in files:
                    path = args.output / f"rank-{response.rank}.json.gz"
                    files[response.rank] = path.open("wb")
                files[response.rank].write(response.data)
        finally:
            for file in files.values():
                file.close()
        for file in files.values():
            sys.stdout.write(f"{file.name}\n")

    return _run(args, call)


NOT_HERE = "callers are served there, and operators where the server's --admin-listen says"
"""What UNIMPLEMENTED means to an operator."""

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "drain": drain,
    "abort": abort,
    "profile": profile,
}


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"tokenloom {name}", description=description)
    parser.add_argument("target", metavar="TARGET", help="the server's --admin-listen")
    parser.add_argument(
        "--timeout-s", type=float, help="seconds that this may take (default: no limit)"
    )
    return parser


def _run(args: argparse.Namespace, call: Callable[[AdminStub], None]) -> int:
    """Makes a call and returns the exit status."""
    try:
        with grpc.insecure_channel(args.target, options=_OPTIONS) as channel, _translated():
            call(AdminStub(channel))
    except TokenloomError as error:
        sys.stderr.write(f"tokenloom: {describe(error, args.target)}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"tokenloom: {error}\n")
        return 1
    return 0


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as rpc_error:
        call = cast("grpc.Call", rpc_error)
        trailers = call.trailing_metadata() or ()
        is_here = call.code() is not grpc.StatusCode.UNIMPLEMENTED
        message = (call.details() or "") if is_here else NOT_HERE
        raise error_from_status(call.code(), message, trailers) from rpc_error
