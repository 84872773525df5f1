"""Where what was compiled is kept, so that only a machine's first start compiles it.

    DIR/triton     Triton's kernels
    DIR/flash      flash-attn-4's
    DIR/cuda       what NVRTC compiled
    DIR/bytecode   Python's own, where the installation has none

Set before torch, Triton and flash-attn-4 are imported, which read their variables then. Code
is loaded from there: the folder belongs to this user, and nobody else may write to it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from tokenloom.worker.bytecode import keep_bytecode
from tokenloom.worker.errors import LoadError

_log = logging.getLogger(__name__)

_FLASH_ENABLED = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
_FLASH_FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
_TRITON_FOLDER = "TRITON_CACHE_DIR"
_CUDA_FOLDER = "TOKENLOOM_CUDA_CACHE_DIR"


def keep_kernels(folder: Path | None) -> None:
    """Has what is compiled kept in a folder; None: one in the user's cache folder.

    Variables that are set already are left as they are. Without a home that can be
    written to, kernels are compiled at each start.

    Raises:
        LoadError: The folder that was asked for cannot be used.
    """
    try:
        chosen = (_default_folder() if folder is None else folder).absolute()
        chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(chosen)
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        if folder is not None:
            raise LoadError(f"compiled kernels cannot be kept in {folder}: {error}") from error
        _log.warning("compiled kernels are not kept: %s", error)
        return
    os.environ.setdefault(_TRITON_FOLDER, str(chosen / "triton"))
    os.environ.setdefault(_FLASH_FOLDER, str(chosen / "flash"))
    os.environ.setdefault(_FLASH_ENABLED, "1")
    os.environ.setdefault(_CUDA_FOLDER, str(chosen / "cuda"))
    keep_bytecode(chosen / "bytecode")


def cubin_folder() -> Path | None:
    """Returns where NVRTC's work is kept; None: it is not kept."""
    folder = os.environ.get(_CUDA_FOLDER)
    return Path(folder) if folder else None


def _default_folder() -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return caches / "tokenloom" / "kernels"


def _check_private(folder: Path) -> None:
    """Raises PermissionError if others may write to the folder or it is not writable here."""
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(
            f"{folder} has mode {status.st_mode & 0o777:o} and belongs to user {status.st_uid};"
            f" it must be 700 and belong to user {os.getuid()}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to")
