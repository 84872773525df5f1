"""What a safetensors file holds and where: its header, read without the tensors.

    | length, u64 | header: JSON of that many bytes | tensors                            |
    |             | {"a": {"dtype": "BF16",         | a a a a a a a a a a a a b b b b …  |
    |             |  "shape": [2, 3],               | 0                       12         |
    |             |  "data_offsets": [0, 12]}, …}   |                                    |

Source: the format's own page, https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from tokenloom.worker.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ITEM_BYTES = (
    dict.fromkeys(("F64", "I64", "U64"), 8)
    | dict.fromkeys(("F32", "I32", "U32"), 4)
    | dict.fromkeys(("F16", "BF16", "I16", "U16"), 2)
    | dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1)
)
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""The format's own bound."""
_METADATA = "__metadata__"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    path: Path
    dtype: str
    """One of ITEM_BYTES."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""
    stride_bytes: int | None = None
    """From a row to the next; None: rows adjoin."""

    @property
    def num_bytes(self) -> int:
        """What it takes in the file, and in memory."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def rows(self, first: int, last: int) -> StoredTensor:
        """Returns where a range of its rows lies."""
        stride_bytes = self.stride_bytes or self._row_bytes
        return replace(
            self,
            shape=(last - first, *self.shape[1:]),
            offset=self.offset + first * stride_bytes,
        )

    def columns(self, first: int, last: int) -> StoredTensor:
        """Returns where a range of a matrix's columns lies."""
        num_rows, num_columns = self.shape
        if last - first == num_columns:
            return self
        return replace(
            self,
            shape=(num_rows, last - first),
            offset=self.offset + first * ITEM_BYTES[self.dtype],
            stride_bytes=self.stride_bytes or self._row_bytes,
        )

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """What is to be read: itself."""
        return (self,)

    def viewed(self, dtype: str, *shape: int) -> StoredTensor:
        """Returns the same bytes as another type and shape."""
        assert math.prod(shape) * ITEM_BYTES[dtype] == self.num_bytes
        assert self.stride_bytes is None
        return replace(self, dtype=dtype, shape=shape)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yields offset and number of the bytes that adjoin, in order."""
        if self.stride_bytes is None:
            yield self.offset, self.num_bytes
            return
        for row in range(self.shape[0]):
            yield self.offset + row * self.stride_bytes, self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]

    def read(self) -> bytes:
        """Returns its bytes: for small ones, whole. Raises CheckpointError."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                return file.read(self.num_bytes)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error


class _Entry(msgspec.Struct, frozen=True):
    """A tensor as the header tells it."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a file by name. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = file.read(min(length, _MAX_HEADER_BYTES + 1))
        num_data_bytes = path.stat().st_size - _LENGTH_BYTES - length
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        entries.pop(_METADATA, None)
        return {
            name: _stored(path, name, msgspec.json.decode(raw, type=_Entry), length, num_data_bytes)
            for name, raw in entries.items()
        }
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _stored(path: Path, name: str, entry: _Entry, length: int, num_data_bytes: int) -> StoredTensor:
    item_bytes = ITEM_BYTES.get(entry.dtype)
    if item_bytes is None:
        raise CheckpointError(f"tensor {name} of {path} is of unknown type {entry.dtype}")
    first, end = entry.data_offsets
    if min(entry.shape, default=0) < 0 or end - first != item_bytes * math.prod(entry.shape):
        raise CheckpointError(
            f"{path} cannot be read: tensor {name} of shape {entry.shape} in {entry.dtype} is said"
            f" to lie in bytes {first} to {end}"
        )
    if not 0 <= first <= end <= num_data_bytes:
        raise CheckpointError(
            f"{path} cannot be read: tensor {name} lies in bytes {first} to {end} of"
            f" {num_data_bytes}"
        )
    return StoredTensor(
        path=path,
        dtype=entry.dtype,
        shape=entry.shape,
        offset=_LENGTH_BYTES + length + first,
    )
