"""A checkpoint's files: where they are, its config.json, its tensors.

Weights are safetensors, in one file or in several with an index. Every tensor
must be expected and every expected one be there, in its shape: told from the
files' headers, before anything is copied.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tokenloom.worker.errors import CheckpointError
from tokenloom.worker.stored import StoredTensor, stored_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tokenloom.worker.config import Json

_HUB_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")


def locate(model: str) -> Path:
    """Returns the folder of a checkpoint; a Hub id is downloaded into the Hub's cache.

    Raises:
        CheckpointError: There is no such folder, and no such repository can be had.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    # Its import takes a quarter of a second, which a folder need not wait for.
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{model} is no folder here and cannot be had from the Hub: {error}"
        ) from error


def read_config(folder: Path) -> Json:
    """Returns the content of config.json. Raises CheckpointError."""
    config = _read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} holds no JSON object")
    return config


def stored_tensors_of(folder: Path) -> dict[str, StoredTensor]:
    """Returns all tensors of a checkpoint by name. Reads headers only. Raises CheckpointError."""
    return {
        name: stored
        for path in _weight_files(folder)
        for name, stored in stored_tensors(path).items()
    }


def match(folder: Path, destinations: Mapping[str, Tensor]) -> list[tuple[StoredTensor, Tensor]]:
    """Returns what to copy where, in the order of the files. Reads headers only.

    Raises:
        CheckpointError: A file is missing or broken; a tensor is missing,
            unexpected, misshapen or of a type that weights do not have.
    """
    matched = []
    left = dict(destinations)
    for path in _weight_files(folder):
        for name, stored in sorted(stored_tensors(path).items(), key=_offset):
            if _is_superfluous(name, destinations):
                continue
            place = left.pop(name, None)
            if place is None:
                raise CheckpointError(f"tensor {name} of {path} is not expected")
            if stored.dtype not in _WEIGHT_TYPES:
                raise CheckpointError(
                    f"tensor {name} is of type {stored.dtype}; weights are of one of"
                    f" {', '.join(_WEIGHT_TYPES)}"
                )
            if stored.shape != tuple(place.shape):
                raise CheckpointError(
                    f"tensor {name} has shape {stored.shape}; {tuple(place.shape)} is expected"
                )
            matched.append((stored, place))
    if left:
        names = ", ".join(sorted(left)[:3])
        raise CheckpointError(f"{len(left)} tensors are missing in {folder}: {names} …")
    return matched


def _offset(named: tuple[str, StoredTensor]) -> int:
    return named[1].offset


def _is_superfluous(name: str, destinations: Mapping[str, Tensor]) -> bool:
    """Returns whether a tensor is one that checkpoints carry without need."""
    if name == "lm_head.weight":
        return name not in destinations  # tied: the embedding is the head
    return name.endswith(".rotary_emb.inv_freq")  # a table that old exports stored


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX_FILE
    if index.exists():
        content = _read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
    else:
        names = [_SINGLE_FILE]
    for name in names:
        # An index comes with the checkpoint; it must not lead out of its folder.
        if Path(name).name != name or not (folder / name).exists():
            raise CheckpointError(f"{folder / name} is missing")
    return [folder / name for name in names]


def _read_json(path: Path) -> object:
    try:
        content: object = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    return content
