"""A checkpoint's files: where they are, its config.json, its tensors.

Weights are safetensors, in one file or in several with an index. Each tensor is
mapped from its file and copied to where it belongs, one after the other, so the
host holds no second copy. Every tensor must be expected and every expected one
be there, in its shape.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from tokenloom.worker.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from tokenloom.worker.config import Json

_HUB_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"


def locate(model: str) -> Path:
    """Returns the folder of a checkpoint; a Hub id is downloaded into the Hub's cache.

    Raises:
        CheckpointError: There is no such folder, and no such repository can be had.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
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


def fill(folder: Path, destinations: Mapping[str, Tensor], report: Callable[[float], None]) -> None:
    """Copies each tensor of the checkpoint to its destination.

    `report` is told the fraction that is done, in steps of at least a hundredth.

    Raises:
        CheckpointError: A file is missing or broken; a tensor is missing,
            unexpected or misshapen.
    """
    left = dict(destinations)
    total = sum(place.numel() for place in left.values())
    done = reported = 0
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    if _is_superfluous(name, destinations):
                        continue
                    place = left.pop(name, None)
                    if place is None:
                        raise CheckpointError(f"tensor {name} of {path} is not expected")
                    shape = file.get_slice(name).get_shape()
                    _copy(name, shape, file.get_tensor, place)
                    done += place.numel()
                    if done - reported >= total / 100:
                        reported = done
                        report(done / total)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    if left:
        names = ", ".join(sorted(left)[:3])
        raise CheckpointError(f"{len(left)} tensors are missing in {folder}: {names} …")
    report(1.0)


def _copy(name: str, shape: list[int], get_tensor: Callable[[str], Tensor], place: Tensor) -> None:
    if tuple(shape) != tuple(place.shape):
        raise CheckpointError(
            f"tensor {name} has shape {tuple(shape)}; {tuple(place.shape)} is expected"
        )
    tensor = get_tensor(name)
    if not tensor.is_floating_point():
        raise CheckpointError(f"tensor {name} is of {tensor.dtype}; a float type is expected")
    place.copy_(tensor)


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
