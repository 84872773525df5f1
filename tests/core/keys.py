"""A scheduler's keys and those of workers, some of whom it knows; where it listens for them."""

from __future__ import annotations

import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from tokenloom.scheduler.keys import make_keys


@dataclass(frozen=True, kw_only=True)
class Place:
    """A TCP port, and a folder with the keys of `scheduler`, `worker` and `stranger`."""

    folder: Path
    endpoint: str

    @classmethod
    def make(cls, folder: Path, *, host: str = "127.0.0.1") -> Place:
        """Makes keys; of the workers only `worker` is allowed."""
        make_keys(folder, ["scheduler", "worker", "stranger"])
        allowed = folder / "allowed"
        allowed.mkdir()
        shutil.copy(folder / "worker.key", allowed)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as probe:
            port = probe.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        return cls(folder=folder, endpoint=f"tcp://{shown}:{port}")

    @property
    def config(self) -> dict[str, str]:
        """The scheduler's fields."""
        return {
            "workers_listen": self.endpoint,
            "workers_key": str(self.folder / "scheduler.key_secret"),
            "workers_allowed": str(self.folder / "allowed"),
        }

    @property
    def address(self) -> tuple[str, int]:
        """The endpoint as sockets take it."""
        host, _, port = self.endpoint.removeprefix("tcp://").partition(":")
        return host, int(port)

    def worker(self, *, key: str = "worker", server_key: str = "scheduler") -> tuple[str, ...]:
        """Returns the options of a worker, with the keys of whomever."""
        return (
            f"--connect={self.endpoint}",
            f"--server-key={self.folder / server_key}.key",
            f"--key={self.folder / key}.key_secret",
        )
