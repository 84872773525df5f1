"""What each rank of a group has of a decoder. Pure: no torch.

    divided by heads          q, k, v by outputs, o by inputs; of fewer key-value heads than ranks
                              each is on several
    divided by width          gate, up by outputs, down by inputs
    divided by vocabulary     embedding and head, rounded up: the last ranks' end in rows of zeros
    rank 0's                  biases of o and down, which are added once
    every rank's              norms

A matrix that is divided by inputs gives each rank a part of every sum: o and down alone, so
a layer has two sums over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from tokenloom.worker.config import ModelConfig
from tokenloom.worker.errors import LoadError
from tokenloom.worker.weights.formats import Format, FourBits, fits
from tokenloom.worker.weights.matrices import (
    DOWN,
    EMBEDDING,
    GATE_UP,
    HEAD,
    OUTPUT,
    QKV,
    Matrix,
    matrices,
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a rank has along an axis of a stored tensor."""

    first: int
    last: int
    """Behind its end."""
    size: int
    """Of the whole axis."""

    def __len__(self) -> int:
        return self.last - self.first


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a rank has of a stored tensor."""

    rows: Run | None = None
    """None: all."""
    columns: Run | None = None
    """None: all."""

    def whole(self, *shape: int) -> tuple[int, ...]:
        """Returns the shape of the tensor of which this part has `shape`."""
        axes = zip(shape, (self.rows, self.columns), strict=False)
        return tuple(size if run is None else run.size for size, run in axes)


WHOLE = Part()


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A rank's share of a decoder."""

    whole: ModelConfig
    rank: int = 0
    num_ranks: int = 1

    @cached_property
    def config(self) -> ModelConfig:
        """The decoder that the rank computes."""
        return shard(self.whole, self.num_ranks)

    def parts(self, names: Iterable[str]) -> dict[str, Part]:
        """Returns what it has of the checkpoint's tensors, by name."""
        return {name: self._part(name) for name in names}

    def _part(self, name: str) -> Part:
        module, _, kind = name.rpartition(".")
        module = ".".join(module.split(".")[-2:])  # `self_attn.q_proj`, in whatever layer
        if kind == "bias" and module in OUTPUT + DOWN:
            size = self.whole.hidden_size
            return Part(rows=Run(first=0, last=0 if self.rank else size, size=size))
        heads, key_value_heads = self._run(self._num_q), self._key_value_heads()
        width, vocabulary = self._run(self.whole.intermediate_size), self._vocabulary()
        rows = dict(zip(QKV, (heads, key_value_heads, key_value_heads), strict=True))
        rows |= dict.fromkeys(GATE_UP, width) | dict.fromkeys((EMBEDDING, HEAD), vocabulary)
        columns = dict.fromkeys(OUTPUT, heads) | dict.fromkeys(DOWN, width)
        return Part(rows=rows.get(module), columns=columns.get(module))

    @property
    def _num_q(self) -> int:
        return self.whole.num_heads * self.whole.head_dim

    def _key_value_heads(self) -> Run:
        head_dim, num_heads = self.whole.head_dim, self.config.num_kv_heads
        first = self.rank * self.whole.num_kv_heads // self.num_ranks
        return Run(
            first=first * head_dim,
            last=(first + num_heads) * head_dim,
            size=self.whole.num_kv_heads * head_dim,
        )

    def _run(self, size: int) -> Run:
        own = size // self.num_ranks
        return Run(first=self.rank * own, last=(self.rank + 1) * own, size=size)

    def _vocabulary(self) -> Run:
        own, size = self.config.vocab_size, self.whole.vocab_size
        first = min(self.rank * own, size)
        return Run(first=first, last=min(first + own, size), size=size)


def shard(config: ModelConfig, num_ranks: int) -> ModelConfig:
    """Returns the decoder that one of the ranks computes, where `why_not_split` is None."""
    return replace(
        config,
        vocab_size=-(-config.vocab_size // num_ranks),
        num_heads=config.num_heads // num_ranks,
        num_kv_heads=max(1, config.num_kv_heads // num_ranks),
        intermediate_size=config.intermediate_size // num_ranks,
    )


def check_split(config: ModelConfig, num_ranks: int, formats: Mapping[str, Format]) -> None:
    """Raises LoadError if so many ranks cannot share a model with these matrices quantized."""
    if (reason := why_not_split(config, num_ranks, formats)) is not None:
        raise LoadError(f"the model cannot be divided among {num_ranks} ranks: {reason}")


def why_not_split(
    config: ModelConfig, num_ranks: int, formats: Mapping[str, Format | None]
) -> str | None:
    """Returns why so many ranks cannot share a model, and how many can; None if they can.

    `formats` has, by name, what quantized matrices are stored in or rounded to.
    """
    reason = _obstacle(config, num_ranks, formats)
    if reason is None:
        return None
    sizes = [
        str(size)
        for size in range(1, config.num_heads + 1)
        if _obstacle(config, size, formats) is None
    ]
    return f"{reason}; it divides by {', '.join(sizes)}"


def _obstacle(
    config: ModelConfig, num_ranks: int, formats: Mapping[str, Format | None]
) -> str | None:
    divided = {
        "attention heads": config.num_heads,
        "columns between the MLP's projections": config.intermediate_size,
    }
    for name, count in divided.items():
        if count % num_ranks:
            return f"{count} {name} do not divide by {num_ranks}"
    small, large = sorted((config.num_kv_heads, num_ranks))
    if large % small:
        return f"{config.num_kv_heads} key-value heads do not divide by {num_ranks}"
    pairs = zip(matrices(config), matrices(shard(config, num_ranks)), strict=True)
    obstacles = (_cut_block(whole, own, formats.get(whole.name), num_ranks) for whole, own in pairs)
    return next((each for each in obstacles if each is not None), None)


def _cut_block(whole: Matrix, own: Matrix, wanted: Format | None, num_ranks: int) -> str | None:
    """Returns how a split cuts through a matrix's blocks; None: it does not."""
    if not isinstance(wanted, FourBits) or own == whole:
        return None
    size = wanted.block_size
    if own.num_inputs != whole.num_inputs:
        if own.num_inputs % size == 0:
            return None
        return (
            f"the {own.num_inputs} inputs of {own.name} that each of {num_ranks} ranks has are no"
            f" whole blocks of {size}"
        )
    if fits(wanted, own.num_inputs) or own.num_weights % size == 0:
        return None
    return (
        f"the {own.num_outputs} rows of {own.name} that each of {num_ranks} ranks has are no whole"
        f" blocks of {size}"
    )
