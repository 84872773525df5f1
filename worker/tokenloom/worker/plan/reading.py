"""Reads what a plan needs of a checkpoint: config.json and the headers of its safetensors.

Of a Hub id nothing else is fetched: headers by requests for ranges of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenloom.worker.config import Json, ModelConfig
from tokenloom.worker.errors import CheckpointError
from tokenloom.worker.plan.capacity import Checkpoint, Stored
from tokenloom.worker.plan.sizes import Form
from tokenloom.worker.weights.checkpoint import read_config, read_tensors
from tokenloom.worker.weights.formats import BLOCK_SIZES, CODEBOOKS, EightBits, Format, FourBits
from tokenloom.worker.weights.matrices import EMBEDDING, HEAD, Matrix, matrices


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a safetensors file tells of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def read_checkpoint(model: str) -> Checkpoint:
    """Returns what the files of a folder or of a Hub id tell.

    Raises:
        UnsupportedModelError: An architecture, a feature or a quantization that is not built.
        CheckpointError: Files are missing or contradict each other, or the Hub cannot be reached.
    """
    folder = Path(model)
    config, headers = _from_folder(folder) if folder.is_dir() else _from_hub(model)
    parsed = ModelConfig.parse(config)
    own = parsed.quantized_to
    stored = None if own is None else _stored(parsed, own, headers)
    _check_shapes(parsed, {} if stored is None else stored.forms, headers)
    return Checkpoint(name=model, config=parsed, stored=stored)


def _from_folder(folder: Path) -> tuple[Json, dict[str, Header]]:
    headers = {
        name: Header(dtype=tensor.dtype, shape=tensor.shape)
        for name, tensor in read_tensors(folder).items()
    }
    return read_config(folder), headers


def _from_hub(model: str) -> tuple[Json, dict[str, Header]]:
    # Its import takes a quarter of a second, which a folder need not wait for.
    from huggingface_hub import get_safetensors_metadata, hf_hub_download  # noqa: PLC0415

    try:
        # First what is not tried again for half a minute where there is no Hub.
        metadata = get_safetensors_metadata(model)
        path = Path(hf_hub_download(model, "config.json"))
    except Exception as error:  # the Hub's HTTP client brings exceptions of its own
        raise CheckpointError(
            f"{model} is no folder here and cannot be read from the Hub: {error}"
        ) from error
    headers = {
        name: Header(dtype=tensor.dtype, shape=tuple(tensor.shape))
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    return read_config(path.parent), headers


def _stored(config: ModelConfig, own: str, headers: Mapping[str, Header]) -> Stored:
    """Returns the forms in which bitsandbytes left the matrices, all of them `own`."""
    forms: dict[str, Format] = {}
    for matrix in matrices(config):
        if (form := _form(matrix, headers)) is not None:
            forms[matrix.name] = form
    names = {form.name for form in forms.values()}
    if names != {own}:
        found = " and ".join(sorted(names)) or "dense"
        raise CheckpointError(f"config.json says that matrices are {own}; they are {found}")
    return Stored(label=own, forms=forms)


def _form(matrix: Matrix, headers: Mapping[str, Header]) -> Format | None:
    """Returns a matrix's form by what is stored beside it; None: it is dense."""
    if f"{matrix.name}.SCB" in headers:
        return EightBits()
    absmax = headers.get(f"{matrix.name}.weight.absmax")
    if absmax is None:
        return None
    num_blocks = math.prod(absmax.shape)
    for block_size in BLOCK_SIZES:
        if -(-matrix.num_weights // block_size) == num_blocks:
            return FourBits(codebook=_codebook(matrix, headers), block_size=block_size)
    raise CheckpointError(
        f"tensor {matrix.name}.weight.absmax has {num_blocks} scales for {matrix.num_weights}"
        f" weights; blocks are of {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}"
    )


def _codebook(matrix: Matrix, headers: Mapping[str, Header]) -> str:
    for name in CODEBOOKS:
        if f"{matrix.name}.weight.quant_state.bitsandbytes__{name}" in headers:
            return name
    raise CheckpointError(f"tensor {matrix.name}.weight has scales of 4 bits and no quant_state")


def _check_shapes(
    config: ModelConfig, forms: Mapping[str, Form], headers: Mapping[str, Header]
) -> None:
    """Raises CheckpointError if a matrix is not there as config.json describes it."""
    expected = {
        matrix.name: (matrix.num_outputs, matrix.num_inputs)
        for matrix in matrices(config)
        if matrix.name != HEAD or not config.tied_embeddings
    }
    expected[EMBEDDING] = (config.vocab_size, config.hidden_size)
    for name, shape in expected.items():
        header = headers.get(f"{name}.weight")
        if header is None:
            raise CheckpointError(f"tensor {name}.weight is missing")
        if isinstance(forms.get(name), FourBits):
            if math.prod(header.shape) * 2 != math.prod(shape):
                raise CheckpointError(
                    f"tensor {name}.weight has {math.prod(header.shape)} bytes for"
                    f" {math.prod(shape)} weights of 4 bits"
                )
        elif header.shape != shape:
            raise CheckpointError(
                f"tensor {name}.weight has shape {header.shape}; {shape} is expected"
            )
