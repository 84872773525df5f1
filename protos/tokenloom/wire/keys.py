"""Files with the keys of CURVE, ZeroMQ's encryption: who may speak to whom over TCP.

A file is a certificate as `zmq.auth` writes it; `tokenloom keys` makes pairs of them:

    NAME.key          the public key, for others
    NAME.key_secret   both keys, for their owner alone
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

PUBLIC_SUFFIX = ".key"
SECRET_SUFFIX = ".key_secret"

_KEY = r"[0-9A-Za-z.:+=^!/*?&<>()\[\]{}@%$#-]{40}"
"""32 bytes in Z85, as ZeroMQ writes them."""


class KeyFileError(ValueError):
    """A file of keys is absent, open to others, or has no such key."""


@dataclass(frozen=True, kw_only=True)
class KeyPair:
    """What one end of a connection proves itself with; both keys in Z85."""

    public: bytes
    secret: bytes = field(repr=False)


def read_public_key(path: Path) -> bytes:
    """Returns the public key that a file tells. Raises KeyFileError."""
    return _key(path, _read(path), "public")


def read_key_pair(path: Path) -> KeyPair:
    """Returns both keys out of a file that `is_private`. Raises KeyFileError."""
    text = _read(path, is_secret=True)
    return KeyPair(public=_key(path, text, "public"), secret=_key(path, text, "secret"))


def is_private(status: os.stat_result) -> bool:
    """Returns whether a file can hold a secret: nobody but its owner has any right to it.

    A file of root's may be readable by its group, too. That is how a container that does not run
    as root gets a secret from Kubernetes (`fsGroup`, mode 440 or 640).
    """
    allowed = 0o740 if status.st_uid == 0 else 0o700
    return not stat.S_IMODE(status.st_mode) & ~allowed


def mode_told(status: os.stat_result) -> str:
    """Returns what is wrong with a file that is not private, as the end of a sentence."""
    mode = stat.S_IMODE(status.st_mode)
    return f"has mode {mode:o}; it must be 600, or 640 if it is root's"


def _read(path: Path, *, is_secret: bool = False) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            if is_secret and not is_private(status):
                raise KeyFileError(f"{path} is a secret and {mode_told(status)}")
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"the keys in {path} cannot be read: {error}") from error


def _key(path: Path, text: str, kind: str) -> bytes:
    found = re.search(rf'^\s*{kind}-key\s*=\s*"({_KEY})"\s*$', text, re.MULTILINE)
    if found is None:
        raise KeyFileError(f"{path} has no {kind} key; `tokenloom keys` makes files that have")
    return found[1].encode()
