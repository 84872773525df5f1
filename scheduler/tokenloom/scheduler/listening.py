"""Where a gRPC server of ours listens, and how others learn of it."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
import grpc.aio

from tokenloom.scheduler.config import ConfigError


def bind(
    server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials | None = None
) -> str:
    """Binds the server, with TLS if there are credentials. Raises ConfigError.

    Returns the address with the real port.
    """
    # The umask counts only for a Unix socket: other users could otherwise connect.
    umask = os.umask(0o177)
    try:
        if credentials is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {listen}: {error}") from error
    finally:
        os.umask(umask)
    if listen.startswith("unix:"):
        return listen
    return f"{listen.rpartition(':')[0]}:{port}"


def write_address(path: Path, address: str) -> None:
    """Tells in a file where a server listens, whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(address, encoding="utf-8")
    draft.replace(path)
