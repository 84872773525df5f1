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
from tokenloom.worker.weights.matrices import EMBEDDING, HEAD
from tokenloom.worker.weights.quantized import Stored, gathered
from tokenloom.worker.weights.stored import StoredTensor, stored_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tokenloom.worker.config import Json, ModelConfig

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_HUB_FILES = (CONFIG_FILE, "model*.safetensors", INDEX_FILE)


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
    if config.tied_embeddings and f"{EMBEDDING}.weight" in stored:
        stored[f"{HEAD}.weight"] = stored[f"{EMBEDDING}.weight"]
    return stored


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
