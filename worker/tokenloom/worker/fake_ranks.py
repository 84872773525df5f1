"""The ranks of a fake group: as in a real one, no step ends before all of them have done it.

    rank 1 ─ a byte ─▶ ┌────────┐ ─ a byte ─▶ rank 1
    rank 2 ─ a byte ─▶ │ rank 0 │ ─ a byte ─▶ rank 2
                       └────────┘

So a rank that hangs makes the others hang, and one that is gone makes them fail.
"""

from __future__ import annotations

import socket

HOST = "127.0.0.1"


class FakeRanks:
    """One rank's connections to the others."""

    def __init__(self) -> None:
        self._listener = socket.create_server((HOST, 0))
        self._peers: list[socket.socket] = []

    @property
    def address(self) -> str:
        """Where this process listens, as `HOST:PORT`."""
        return f"{HOST}:{self._listener.getsockname()[1]}"

    def meet(self, *, rank: int, world_size: int, rendezvous: str) -> None:
        """Waits until all ranks of an epoch are connected. Raises OSError."""
        for peer in self._peers:
            peer.close()
        if rank == 0:
            self._peers = [self._listener.accept()[0] for _ in range(world_size - 1)]
        else:
            host, _, port = rendezvous.rpartition(":")
            self._peers = [socket.create_connection((host, int(port)))]
        self._is_first = rank == 0

    def wait_for_each_other(self) -> None:
        """Returns once all ranks have called it. Raises ConnectionError if one is gone."""
        if not self._is_first:
            self._tell()
        for peer in self._peers:
            if not peer.recv(1):
                raise ConnectionError("a rank is gone")
        if self._is_first:
            self._tell()

    def _tell(self) -> None:
        for peer in self._peers:
            peer.sendall(b"\0")
