"""`tokenloom health`: one health check, for probes that run a command.

Orchestrators that speak gRPC themselves ask without it; they cannot where a server wants TLS.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import cast

import grpc

from tokenloom.client.flags import access_of, add_access_options
from tokenloom.client.renewing import open_channel

_CHECK = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"  # HealthCheckResponse with status (field 1) = SERVING (1)


def health(argv: Sequence[str]) -> int:
    """Asks a server for its health. Returns 0 if it serves, 1 if not, 2 for a wrong option."""
    parser = argparse.ArgumentParser(
        prog="tokenloom health",
        description="Asks a server whether it serves: exit status 0 if it does, 1 if not.",
    )
    parser.add_argument("target", metavar="TARGET", help="address of the server, host:port")
    parser.add_argument(
        "--service", default="", help="what is asked about: liveness, or (default) readiness"
    )
    parser.add_argument("--timeout-s", type=float, default=5.0, help="(default: 5)")
    add_access_options(parser)
    args = parser.parse_args(argv)
    try:
        with closing(open_channel(args.target, (), access_of(args))) as channel:
            check = channel.unary_unary(
                _CHECK, request_serializer=bytes, response_deserializer=bytes
            )
            answer = check(_request(args.service), timeout=args.timeout_s)
    except ValueError as error:
        parser.error(str(error))
    except grpc.RpcError as error:
        status = cast("grpc.Call", error)  # what gRPC raises for a call is one
        told = f"{status.code().name}: {status.details()}"
        sys.stderr.write(f"tokenloom: {args.target}: {told}\n")
        return 1
    sys.stdout.write("serving\n" if answer == _SERVING else "not serving\n")
    return int(answer != _SERVING)


def _request(service: str) -> bytes:
    """Returns a HealthCheckRequest; the SDK installs without the package that has its class."""
    name = service.encode()
    return bytes((0x0A, len(name))) + name if name else b""  # field 1, a string
