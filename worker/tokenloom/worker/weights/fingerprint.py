"""A name for the weights: equal for copies of a checkpoint, different for another training of it.

To read all weights again would cost as much as loading them. So what is hashed is the config, what
the headers say of each tensor, and a sample from its middle: whatever training goes on changes
some number in some of them.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import TYPE_CHECKING

from tokenloom.worker.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tokenloom.worker.config import Json
    from tokenloom.worker.weights.stored import StoredTensor

SAMPLE_BYTES = 256
"""Of each tensor."""
_DIGEST_BYTES = 16


def fingerprint(
    config: Json, tensors: Mapping[str, StoredTensor], computed_in: Iterable[object]
) -> str:
    """Returns the name, in hexadecimal, of weights that are computed with as `computed_in` says.

    Raises CheckpointError if a file cannot be read.
    """
    digest = blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=_DIGEST_BYTES)
    digest.update(repr(tuple(computed_in)).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
        digest.update(_sample(tensor))
    return digest.hexdigest()


def _sample(tensor: StoredTensor) -> bytes:
    num_bytes = min(tensor.num_bytes, SAMPLE_BYTES)
    try:
        with tensor.path.open("rb", buffering=0) as file:
            file.seek(tensor.offset + (tensor.num_bytes - num_bytes) // 2)
            return file.read(num_bytes)
    except OSError as error:
        raise CheckpointError(f"{tensor.path} cannot be read: {error}") from error
