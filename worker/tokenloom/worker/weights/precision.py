"""Which matrix is in which format: by the checkpoint, and by what is asked for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tokenloom.worker.errors import CheckpointError, LoadError
from tokenloom.worker.weights.formats import Format, fits, format_named
from tokenloom.worker.weights.matrices import HEAD, Matrix
from tokenloom.worker.weights.quantized import stored_format

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tokenloom.worker.weights.quantized import Stored

_log = logging.getLogger(__name__)


def choose_formats(
    matrices: Iterable[Matrix],
    stored: Mapping[str, Stored],
    *,
    own: str | None,
    quantize: str,
    quantize_lm_head: bool,
    int8_threshold: float = 0.0,
) -> dict[str, Format]:
    """Returns the formats of matrices, by name; absent ones are dense.

    What is stored quantized stays so. Of what is stored dense, `quantize` means all matrices but
    the head, in a checkpoint that has none quantized itself; `quantize_lm_head` adds the head.

    Args:
        matrices: Those that may be quantized.
        stored: What the checkpoint has, by a tensor's name.
        own: What its config.json says that it is quantized to; None: dense.
        quantize: As `--quantize`.
        quantize_lm_head: As `--quantize-lm-head`.
        int8_threshold: As `--int8-threshold`.

    Raises:
        LoadError: What is asked for contradicts the checkpoint, or itself.
        CheckpointError: Its tensors contradict its config.json.
    """
    wanted = format_named(quantize)
    if own is not None and wanted is not None and wanted.name != own:
        raise LoadError(
            f"the checkpoint is quantized to {own} already; it cannot be served with quantize ="
            f" {quantize}"
        )
    if int8_threshold > 0 and "int8" not in {own, quantize}:
        raise LoadError(
            f"int8_threshold is {int8_threshold:g}, but no matrix is in 8 bits: quantize is"
            f" {quantize}, the checkpoint is {own or 'dense'}"
        )
    of_head = (wanted or format_named(own or "none")) if quantize_lm_head else None
    if quantize_lm_head and of_head is None:
        raise LoadError(
            "quantize_lm_head is set, but neither quantize nor the checkpoint says to what"
        )
    chosen = {}
    uneven = []
    for matrix in matrices:
        tensor = stored.get(f"{matrix.name}.weight")
        if tensor is None:
            continue  # told later, with all that are missing
        found = stored_format(tensor)
        if found is not None and found.name != own:
            raise CheckpointError(
                f"tensor {matrix.name}.weight is {found.name}; config.json says {own}"
            )
        rounded_to = of_head if matrix.name == HEAD else wanted if own is None else None
        even = fits(found or rounded_to, matrix.num_inputs)
        if not even:
            uneven.append(matrix.name)
        if found is not None:
            chosen[matrix.name] = found
        elif rounded_to is not None and even:
            chosen[matrix.name] = rounded_to
    if uneven:
        _log.warning(
            "%d matrices are kept dense, as %s: their inputs are no multiple of a block of 4 bits",
            len(uneven),
            uneven[0],
        )
    return chosen
