"""Whether files have changed, whatever way they are changed in."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

Versions: TypeAlias = tuple[tuple[int, int, int] | None, ...]


def versions_of(*paths: Path) -> Versions:
    """Returns what differs when a file is written, replaced, linked elsewhere, made or removed."""
    return tuple(_version(path) for path in paths)


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
