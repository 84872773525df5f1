"""The options of commands that say how to come to a server, and as whom."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tokenloom.client.access import TLS, Access

TOKEN_VARIABLE = "TOKENLOOM_TOKEN"
"""Holds the bearer token, unless a file does. A command line would show it to everybody on the
host."""


def add_access_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `access_of` reads."""
    group = parser.add_argument_group("access (default: plaintext, and no token)")
    group.add_argument("--tls", action="store_true", help="speak TLS; the options below imply it")
    group.add_argument(
        "--tls-ca",
        metavar="FILE",
        help="CAs of the server's certificate (default: well-known ones)",
    )
    group.add_argument("--tls-cert", metavar="FILE", help="certificate to show to the server")
    group.add_argument("--tls-key", metavar="FILE", help="its key")
    group.add_argument(
        "--tls-server-name",
        metavar="NAME",
        help="in the server's certificate (default: the target's host)",
    )
    group.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"file of the bearer token (default: what {TOKEN_VARIABLE} holds, if it is set)",
    )
    group.add_argument(
        "--insecure",
        action="store_true",
        help="send the token in plaintext to other hosts, where the network encrypts by itself",
    )


def access_of(args: argparse.Namespace) -> Access:
    """Returns what the options say. Raises ValueError."""
    tls = TLS(
        ca=args.tls_ca, cert=args.tls_cert, key=args.tls_key, server_name=args.tls_server_name
    )
    return Access(
        credentials=tls if args.tls or tls != TLS() else None,
        token=args.token_file or os.environ.get(TOKEN_VARIABLE) or None,
        insecure=args.insecure,
    )
