"""A checkpoint's files: where they are, its config.json, its tensors.

Weights are safetensors, in one file or in several with an index. Every tensor
must be expected and every expected one be there, in its shape: told from the
files' headers, before anything is copied.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from tokenloom.worker.errors import CheckpointError
from tokenloom.worker.filling import Filling
from tokenloom.worker.quantized import Stored, gathered
from tokenloom.worker.stored import StoredTensor, stored_tensors
from tokenloom.worker.weights import EMBEDDING, HEAD

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from tokenloom.worker.config import Json, ModelConfig
    from tokenloom.worker.filling import Place
    from tokenloom.worker.formats import Format

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_HUB_FILES = (CONFIG_FILE, "model*.safetensors", INDEX_FILE)
_WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")


def locate(model: str, also: Iterable[str] = ()) -> Path:
    """Returns the folder of a checkpoint; a Hub id is downloaded into the Hub's cache.

    `also` are patterns of files that are wanted beside config and weights.

    Raises:
        CheckpointError: There is no such folder, and no such repository can be had.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    # Its import takes a quarter of a second, which a folder need not wait for.
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    try:
        return Path(snapshot_download(model, allow_patterns=[*_HUB_FILES, *also]))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{model} is no folder here and cannot be had from the Hub: {error}"
        ) from error


def read_config(folder: Path) -> Json:
    """Returns the content of config.json. Raises CheckpointError."""
    config = _read_json(folder / CONFIG_FILE)
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG_FILE} holds no JSON object")
    return config


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Returns what the weight files hold, by name, in their order. Reads headers only.

    Raises:
        CheckpointError: A file is missing or broken.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _weight_files(folder):
        found = stored_tensors(path)
        tensors.update(sorted(found.items(), key=lambda named: named[1].offset))
    return tensors


def interpret(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, Stored]:
    """Returns the tensors as the decoder has them, by name.

    Those of a matrix that bitsandbytes quantized are one, and a tied head is what the embedding is.

    Raises:
        CheckpointError: What belongs together does not fit.
        UnsupportedModelError: A layout that is not built.
    """
    stored: dict[str, Stored] = {**tensors} if config.quantized_to is None else gathered(tensors)
    if config.tied_embeddings and EMBEDDING in stored:
        stored[HEAD] = stored[EMBEDDING]
    return stored


def match(
    stored: Mapping[str, Stored],
    places: Mapping[str, Place],
    *,
    formats: Mapping[str, Format],
    dtype: torch.dtype,
) -> list[Filling]:
    """Returns what fills which place, in the order of what is stored.

    Args:
        stored: All that the checkpoint holds, by name.
        places: What is expected, by name.
        formats: By name, the formats that matrices have or are rounded to.
        dtype: Of the activations.

    Raises:
        CheckpointError: A tensor is missing, unexpected, misshapen or of a type that weights
            do not have.
    """
    fillings = []
    for name, tensor in stored.items():
        if name not in places:
            if _is_superfluous(name):
                continue
            raise CheckpointError(f"tensor {name} is not expected")
        place = places[name]
        _check(name, tensor, place)
        rounded_to = formats.get(name) if isinstance(tensor, StoredTensor) else None
        fillings.append(Filling(stored=tensor, place=place, dtype=dtype, rounded_to=rounded_to))
    missing = sorted(places.keys() - stored.keys())
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing: {', '.join(missing[:3])} …")
    return fillings


def _check(name: str, stored: Stored, place: Place) -> None:
    if tuple(stored.shape) != tuple(place.shape):
        raise CheckpointError(
            f"tensor {name} has shape {stored.shape}; {tuple(place.shape)} is expected"
        )
    if isinstance(stored, StoredTensor):
        if stored.dtype not in _WEIGHT_TYPES:
            raise CheckpointError(
                f"tensor {name} is of type {stored.dtype}; weights are of one of"
                f" {', '.join(_WEIGHT_TYPES)}"
            )
    elif isinstance(place, Tensor):
        raise CheckpointError(f"tensor {name} is quantized; only matrices of layers and head are")


def _is_superfluous(name: str) -> bool:
    """Returns whether a tensor that nothing expects is one that checkpoints carry without need."""
    # The head is not expected where the embedding is it; the other is a table of old exports.
    return name == HEAD or name.endswith(".rotary_emb.inv_freq")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.exists():
        content = _read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
    else:
        names = [SINGLE_FILE]
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
