"""The files in which the processes of a server tell what they measured."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec

from tokenloom.scheduler.samples import Sample, Samples, added, is_gauge

INTERVAL_S = 0.5
"""Between two writings of a process."""
_SUFFIX = ".samples"

_log = logging.getLogger(__name__)


class SampleFile:
    """Where one process writes, in a folder of all processes of a server.

    The file is written by a thread, so that a slow disk holds up nobody: meanwhile nothing new is
    written. What cannot be written is logged, once in a row.
    """

    def __init__(self, folder: Path, role: str) -> None:
        """Processes of the same `role` take each other's place."""
        self._folder = folder
        self._role = role
        self._path = folder / f"{role}-{os.getpid()}{_SUFFIX}"
        self._before: list[Sample] = []
        """What the process told whose place this one took."""
        self._due_s = 0.0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="samples")
        self._writing: Future[None] | None = None
        self._fails = False

    def take_over(self) -> None:
        """Goes on with the file of a process of the same role that died, if there is one."""
        for path in sorted(self._folder.glob(f"{self._role}-*{_SUFFIX}")):
            if _is_alive(int(path.stem.rpartition("-")[-1])):
                continue
            with suppress(FileNotFoundError):  # another one was faster
                path.rename(self._path)
                if (found := _read(self._path)) is not None:
                    self._before = [each for each in found.samples if not is_gauge(each)]
                return

    def is_due(self, now: float) -> bool:
        """Returns whether it is time to write."""
        return now >= self._due_s

    def write(self, samples: Iterable[Sample], now: float) -> None:
        """Replaces the file soon, whole or not at all."""
        self._due_s = now + INTERVAL_S
        if self._writing is not None and not self._writing.done():
            return
        told = added([*self._before, *samples]) if self._before else samples
        data = msgspec.msgpack.encode(Samples(now, tuple(told)))
        self._writing = self._writer.submit(self._replace, data)

    def close(self, samples: Iterable[Sample], now: float) -> None:
        """Waits until the last word of the process is written."""
        if self._writing is not None:
            self._writing.result()
        self.write(samples, now)
        self._writer.shutdown()

    def _replace(self, data: bytes) -> None:
        draft = self._path.with_suffix(".draft")
        try:
            draft.write_bytes(data)
            draft.replace(self._path)
        except OSError as error:
            if not self._fails:
                _log.error("metrics cannot be written: %s", error)
            self._fails = True
        else:
            self._fails = False


def read_all(folder: Path) -> Iterator[Samples]:
    """Yields what each process wrote last, also those that are gone."""
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        if (found := _read(path)) is not None:
            yield found


def _read(path: Path) -> Samples | None:
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=Samples)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
