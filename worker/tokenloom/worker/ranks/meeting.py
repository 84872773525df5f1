"""How the ranks of an epoch find each other.

    rank 0   listens since its start ── store ◀── all ranks: who is where ── group
    rank 1   listens since its start, for the day on which it is rank 0

Every process tells its port with its Hello; the core makes one of them rank 0 and tells all
where it is. Each epoch is a group of its own, and has its own names in the store.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from torch import distributed
from torch._C._distributed_c10d import PrefixStore, TCPStore

from tokenloom.worker.errors import LoadError, MeetingError
from tokenloom.worker.ranks.group import Group

if TYPE_CHECKING:
    import torch

_TIMEOUT = timedelta(minutes=30)
"""Longer than the core waits for anything: it ends ranks that wait for a lost one."""


class Meeting:
    """A port of this process, and the group that it is in."""

    def __init__(self, host: str) -> None:
        """Listens on a port of `host`, which is this machine. Raises LoadError."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, 0, type=socket.SOCK_STREAM
            )[0]
            self._socket = socket.socket(family, kind, protocol)
            self._socket.bind(address)
            # Who connects early waits here; one that was refused would try again in a second.
            self._socket.listen()
        except OSError as error:
            raise LoadError(f"no port of {host} can be had for other ranks: {error}") from error
        self._host, self._port = self._socket.getsockname()[:2]
        self._store: TCPStore | None = None
        """This process's own, from when it is first rank 0."""
        self._epoch: int | None = None
        """The last one that it joined."""

    @property
    def address(self) -> str:
        """`HOST:PORT`, an IPv6 host in brackets."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self._port}"

    def join(
        self, *, epoch: int, rank: int, num_ranks: int, rendezvous: str, device: torch.device
    ) -> Group:
        """Returns the group of an epoch once all of its ranks are there.

        `rendezvous` is rank 0's address. A group that this process is in ends.

        Raises:
            MeetingError: There is no such place, not all ranks came, or the epoch is not later
                than the last one: the core is another one, and names in the store mean nothing.
        """
        if self._epoch is not None and epoch <= self._epoch:
            raise MeetingError(f"epoch {epoch} comes after {self._epoch}; a new process can join")
        self._epoch = epoch
        self.leave()
        try:
            store = self._open() if rank == 0 else _connected(rendezvous)
            distributed.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore(str(epoch), store),
                rank=rank,
                world_size=num_ranks,
                timeout=_TIMEOUT,
                device_id=device if device.type == "cuda" else None,
            )
        except (RuntimeError, ValueError) as error:
            raise MeetingError(
                f"rank {rank} of {num_ranks} cannot meet the others at {rendezvous!r}: {error}"
            ) from error
        return Group(rank=rank, num_ranks=num_ranks, device=device)

    def leave(self) -> None:
        """Ends the group that this process is in, if it is in one."""
        if distributed.is_initialized():
            # Of ranks that are gone already the library complains.
            with suppress(RuntimeError):
                distributed.destroy_process_group()

    def _open(self) -> TCPStore:
        """Returns this process's own store, which listens from its first time on."""
        if self._store is None:
            self._store = TCPStore(
                self._host,
                self._port,
                is_master=True,
                wait_for_workers=False,
                timeout=_TIMEOUT,
                master_listen_fd=self._socket.detach(),
            )
        return self._store


def _connected(rendezvous: str) -> TCPStore:
    """Returns rank 0's store. Raises ValueError for what is no address."""
    host, _, port = rendezvous.rpartition(":")
    return TCPStore(
        host.strip("[]"), int(port), is_master=False, wait_for_workers=False, timeout=_TIMEOUT
    )
