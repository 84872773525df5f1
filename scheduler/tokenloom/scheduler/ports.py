"""TCP ports and Unix sockets to listen on: whether they are free, and one port for several fronts.

The kernel gives each new connection to one of the processes that listen on a shared port
(SO_REUSEPORT), by a hash of its addresses, and a connection stays where it is.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tokenloom.scheduler.config import ConfigError

_MAX_PORT = 65535


def check_free(listen: str) -> None:
    """Refuses what gRPC would take in silence. Raises ConfigError.

    It binds a port beyond 65535 modulo 65536, is content with one of a host's addresses when
    others are taken, and takes a Unix socket away from the server that listens on it.
    """
    if listen.startswith("unix:"):
        _check_socket_free(listen)
        return
    for family, kind, protocol, address in _addresses(listen):
        if address[1] == 0:
            continue
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(probe, address)


@contextmanager
def shared_port(listen: str) -> Iterator[str]:
    """Holds a TCP port for processes that listen on it together; yields its real address.

    Port 0 becomes a free one. The port stays taken while none of them listens: a bound socket
    that does not listen gets no connection. Raises ConfigError if somebody has the port.
    """
    check_free(listen)
    port: int | None = None
    with ExitStack() as held:
        for family, kind, protocol, address in _addresses(listen):
            holder = held.enter_context(socket.socket(family, kind, protocol))
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            _bind(holder, address if port is None else (address[0], port, *address[2:]))
            port = holder.getsockname()[1]
        yield f"{listen.rpartition(':')[0]}:{port}"


def _check_socket_free(listen: str) -> None:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(listen.removeprefix("unix:").removeprefix("//"))
        except OSError:  # nobody listens there; binding tells what else may be wrong
            return
    raise ConfigError(f"cannot listen on {listen}: another server listens there")


def _addresses(listen: str) -> list[tuple[int, int, int, tuple[Any, ...]]]:
    """Returns family, kind, protocol and address of all that HOST:PORT says."""
    host, _, port = listen.rpartition(":")
    if not port.isdecimal():
        raise ConfigError(f"cannot listen on {listen}: it must be HOST:PORT or unix:PATH")
    if int(port) > _MAX_PORT:
        raise ConfigError(f"cannot listen on {listen}: ports end at {_MAX_PORT}")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"cannot listen on {listen}: {error}") from error
    return [(family, kind, protocol, address) for family, kind, protocol, _, address in found]


def _bind(bound: socket.socket, address: tuple[Any, ...]) -> None:
    try:
        bound.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address[0]}:{address[1]}: {error}") from error
