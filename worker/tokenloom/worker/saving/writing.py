"""Writes a quantized copy of a checkpoint, as transformers with bitsandbytes would save it.

    OUT/  config.json              with quantization_config
          model*.safetensors       matrices quantized, all else as it was; in files of SHARD_BYTES
          tokenizer and the like   copied

It is written beside OUT and renamed when it is whole.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tokenloom.worker.config import ModelConfig
from tokenloom.worker.errors import LoadError
from tokenloom.worker.loading import DTYPES
from tokenloom.worker.weights.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    interpret,
    locate,
    read_config,
    read_tensors,
)
from tokenloom.worker.weights.copying import TORCH_TYPES
from tokenloom.worker.weights.filling import match
from tokenloom.worker.weights.matrices import matrices
from tokenloom.worker.weights.merged import allocate_weights, destinations
from tokenloom.worker.weights.precision import choose_formats
from tokenloom.worker.weights.rounding import load_bitsandbytes, stored_form

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor

    from tokenloom.worker.weights.stored import StoredTensor

SHARD_BYTES = 5_000_000_000
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")
"""What a checkpoint has beside its weights."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """How a checkpoint is quantized."""

    to: str
    """nf4, fp4 or int8."""
    lm_head: bool = False
    """Whether the head is quantized, too."""
    nested: bool = False
    """Whether the scales of 4 bits are kept in 8 bits."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What was written."""

    num_quantized: int
    """Matrices."""
    num_read_bytes: int
    """Of weights."""
    num_bytes: int
    """Of weights."""


def save_quantized(
    model: str,
    out: Path,
    options: QuantizeOptions,
    device: torch.device,
    report: Callable[[float], None],
) -> Saved:
    """Writes the dense checkpoint `model`, a folder or a Hub id, to the folder `out`.

    `out` must not exist, or be empty. Matrices are quantized on the device, one at a time;
    `report` is told the fraction that is done.

    Raises:
        LoadError: It cannot be read, is not dense, not what its config.json says, or cannot be
            written.
    """
    load_bitsandbytes()
    if options.nested and options.to == "int8":
        raise LoadError("nested is about the scales of 4 bits; int8 has one a row")
    folder = locate(model, _COPIED)
    content = read_config(folder)
    config = ModelConfig.parse(content)
    if config.quantized_to is not None:
        raise LoadError(f"{model} is quantized to {config.quantized_to} already")
    if options.lm_head and config.tied_embeddings:
        raise LoadError(
            f"embedding and head of {model} are one matrix, of which a checkpoint has no quantized"
            " copy; quantize_lm_head makes one when it is served"
        )
    dtype_name = config.dtype or "float32"
    if dtype_name not in DTYPES:
        raise LoadError(f"dtype {dtype_name} is not supported; supported are {', '.join(DTYPES)}")
    tensors = read_tensors(folder)
    formats = choose_formats(
        matrices(config), tensors, own=None, quantize=options.to, quantize_lm_head=options.lm_head
    )
    # What transformers computes in, and so rounds to before it quantizes.
    dtype = DTYPES[dtype_name]
    _check(tensors, config, dtype)
    with _new_folder(out) as fresh:
        shards = _Shards(fresh)
        for index, (name, stored) in enumerate(tensors.items()):
            values = _read(stored)
            wanted = formats.get(name.removesuffix(".weight"))
            if wanted is not None:
                values = values.to(device).to(dtype)
                shards.add(stored_form(name, values, wanted, nested=options.nested))
            else:
                shards.add({name: values})
            report((index + 1) / len(tensors))
        num_bytes = shards.finish()
        _copy_others(folder, fresh)
        dense = (matrix.name for matrix in matrices(config) if matrix.name not in formats)
        own = _quantization_config(options, dtype_name, dense)
        saved = {**content, "quantization_config": own}
        (fresh / CONFIG_FILE).write_text(json.dumps(saved, indent=2) + "\n")
    return Saved(
        num_quantized=len(formats),
        num_read_bytes=sum(stored.num_bytes for stored in tensors.values()),
        num_bytes=num_bytes,
    )


def _check(tensors: Mapping[str, StoredTensor], config: ModelConfig, dtype: torch.dtype) -> None:
    """Raises CheckpointError for what a worker would refuse to load."""
    dense = allocate_weights(
        config, formats={}, int8_threshold=0.0, dtype=dtype, device=torch.device("meta")
    )
    places = destinations(config, dense)
    match(interpret(tensors, config), places, parts={}, formats={}, dtype=dtype)


class _Shards:
    """Weight files, written as they fill."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, Tensor] = {}
        self._num_bytes = 0
        self._num_written_bytes = 0
        self._shards: list[list[str]] = []
        """Names of the tensors of each."""

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Adds tensors, those of a matrix to one file."""
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if self._tensors and self._num_bytes + num_bytes > SHARD_BYTES:
            self._write()
        self._tensors |= {name: tensor.cpu() for name, tensor in tensors.items()}
        self._num_bytes += num_bytes

    def finish(self) -> int:
        """Writes the rest, and an index if there are several files; returns the bytes in all."""
        self._write()
        num_shards = len(self._shards)
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            name = SINGLE_FILE
            if num_shards > 1:
                name = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
            (self._folder / str(index)).rename(self._folder / name)
            weight_map |= dict.fromkeys(names, name)
        if num_shards > 1:
            metadata = {"total_size": self._num_written_bytes}
            index_text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2)
            (self._folder / INDEX_FILE).write_text(index_text + "\n")
        return self._num_written_bytes

    def _write(self) -> None:
        path = self._folder / str(len(self._shards))
        save_file(self._tensors, path, metadata={"format": "pt"})
        self._shards.append(list(self._tensors))
        self._num_written_bytes += self._num_bytes
        self._tensors, self._num_bytes = {}, 0


def _read(stored: StoredTensor) -> Tensor:
    values = torch.frombuffer(bytearray(stored.read()), dtype=TORCH_TYPES[stored.dtype])
    return values.view(stored.shape)


def _copy_others(folder: Path, fresh: Path) -> None:
    for path in sorted({path for pattern in _COPIED for path in folder.glob(pattern)}):
        if path.name not in {CONFIG_FILE, INDEX_FILE} and path.is_file():
            shutil.copyfile(path, fresh / path.name)


def _quantization_config(
    options: QuantizeOptions, dtype_name: str, dense: Iterable[str]
) -> dict[str, object]:
    """Returns what transformers' BitsAndBytesConfig writes."""
    four_bit = options.to != "int8"
    # A module is skipped whose name ends so: `lm_head`, or `mlp.down_proj` in all layers.
    skipped = {name.split(".", 3)[-1] for name in dense}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four_bit,
        "load_in_8bit": not four_bit,
        "bnb_4bit_compute_dtype": dtype_name,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": options.to if four_bit else "fp4",
        "bnb_4bit_use_double_quant": options.nested,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": sorted(skipped),
        "llm_int8_threshold": 6.0,
    }


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder that becomes `out` if all goes well, and else is removed."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise LoadError(f"{out} exists already")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as holder:
            fresh = Path(holder) / "checkpoint"
            fresh.mkdir()
            yield fresh
            fresh.rename(out)
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{out} cannot be written: {error}") from error
