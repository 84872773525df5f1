"""`tokenloom keys`: makes the files with which scheduler and workers know each other over TCP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from zmq.auth import create_certificates

from tokenloom.scheduler.config import ConfigError
from tokenloom.wire.keys import PUBLIC_SUFFIX, SECRET_SUFFIX


def make_keys(folder: Path, names: Sequence[str]) -> list[Path]:
    """Makes a pair of key files for each name; returns their paths.

    Secrets have mode 600. Raises ConfigError, before anything is made, if a file is there already
    or a name is none.
    """
    paths = [folder / f"{name}{end}" for name in names for end in (PUBLIC_SUFFIX, SECRET_SUFFIX)]
    for name in names:
        if Path(name).name != name:
            raise ConfigError(f"{name!r} is no name of a file")
    for path in paths:
        if path.exists():
            raise ConfigError(
                f"{path} is there already; whoever has these keys would be locked out"
            )
    old_umask = os.umask(0o077)  # the library leaves the mode of its files to it
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            create_certificates(folder, name)
    except OSError as error:
        raise ConfigError(f"keys cannot be made in {folder}: {error}") from error
    finally:
        os.umask(old_umask)
    return paths
