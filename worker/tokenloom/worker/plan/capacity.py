"""What fits: weights, KV cache, requests and their speed, by precision and GPU. Pure.

A decode step of a batch reads all weights once and each request's keys and values, so

    tokens a second  <=  batch * bandwidth / (weights read + batch * KV bytes of a context)

which is a bound by memory alone, of all ranks at once and without what they tell each other.
For the batches of BATCHES arithmetic is no tighter one on any GPU of the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from tokenloom.worker.config import ModelConfig
from tokenloom.worker.gpus import FLASH4_HEAD_DIMS, GPUS, Gpu
from tokenloom.worker.memory import (
    CUDA_BYTES,
    CUDA_STEP_TOKENS,
    FP8_BYTES,
    MIN_BLOCKS,
    KVBytes,
    block_bytes,
    num_widened,
    pool_share,
    rotary_bytes,
    scratch_bytes,
    widened_bytes,
)
from tokenloom.worker.plan.sizes import (
    ITEM_BYTES,
    Form,
    WeightBytes,
    all_dense,
    num_weights,
    weight_bytes,
)
from tokenloom.worker.weights.formats import FourBits, fits
from tokenloom.worker.weights.matrices import HEAD, matrices, merged_with
from tokenloom.worker.weights.sharding import shard, why_not_split

BATCHES = (1, 4, 16)
KV_BLOCK_SIZE = 128
"""flash-attn-4's. Of other backends 64 or 256, which changes the end of a request alone."""
MAX_RANKS = 8
"""GPUs of one host."""
_KV_BYTES = {name: KVBytes(item=item) for name, item in ITEM_BYTES.items()} | {"fp8": FP8_BYTES}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How weights are kept."""

    label: str
    form: Form
    """Of the layers' matrices, where their inputs divide into its blocks."""
    quantizes_head: bool = False


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A checkpoint's own quantization."""

    label: str
    forms: Mapping[str, Form]
    """By the matrix's name; dense where it names none."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What its files tell of a model."""

    name: str
    config: ModelConfig
    stored: Stored | None
    """None: it is not quantized."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How the model is to be served; defaults are the server's."""

    dtype: str
    """Of activations, of the KV cache unless said, and of weights that are not quantized."""
    kv_types: tuple[str, ...]
    """Names of ITEM_BYTES or fp8; the first one decides what fits."""
    context_tokens: int
    """Prompt + completion of each request."""
    num_ranks: int = 1
    max_model_tokens: int | None = None
    """The longest that a request may be; None: as long as the checkpoint is made for."""
    max_num_requests: int = 256
    max_step_tokens: int | None = None
    kv_memory_fraction: float = 0.92

    @property
    def step_tokens(self) -> int:
        """The most tokens of a step on a GPU, decided as by the worker."""
        return self.max_step_tokens or max(CUDA_STEP_TOKENS, self.max_num_requests)


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A rank's KV cache in one type."""

    kv_type: str
    num_bytes: int
    num_blocks: int
    num_tokens: int
    num_requests: int
    """Of the context asked about, at once."""
    tokens_per_s: dict[int, float]
    """At most, by batch; without batches that do not fit, empty without a bandwidth."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """GPUs that hold a model together."""

    gpu: str
    num_gpus: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One precision."""

    precision: str
    weights_bytes: int
    """Of a rank."""
    weights: WeightBytes
    """The same in parts."""
    smallest: Group | None
    """The fewest GPUs of the table, and of these the smallest, that serve one request; at least
    as many as asked about."""
    gpu: Gpu | None
    """The one that was asked about, else the smallest, as all that follows."""
    num_gpus: int
    obstacle: str | None
    """Why it cannot be served there, whatever the memory."""
    lacking_bytes: int
    """What a rank's memory lacks for one request; 0: it fits."""
    least_num_gpus: int | None
    """The fewest GPUs of this kind that serve one request."""
    fits: bool
    """Whether at least one request is served."""
    pools: tuple[Pool, ...]
    """One a KV type that the GPU has; none without a GPU."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer."""

    model: str
    architecture: str
    num_weights: int
    max_model_tokens: int
    stored: str | None
    """The checkpoint's own quantization."""
    unquantized_bytes: int
    """What a rank would keep without any."""
    kv_bytes_per_token: dict[str, int]
    """Of a rank, by KV type."""
    serving: Serving
    rows: tuple[Row, ...]


def make_plan(
    checkpoint: Checkpoint, serving: Serving, precisions: tuple[Precision, ...], gpu: Gpu | None
) -> Plan:
    """Returns a row a precision, for a GPU or for the smallest that fits each.

    The model can be divided among `serving.num_ranks`.
    """
    config = checkpoint.config
    stored = {} if checkpoint.stored is None else checkpoint.stored.forms
    plain = _Case(config=config, forms=all_dense(config), serving=serving, stored=stored)
    rows = (
        _row(replace(plain, forms=_forms(checkpoint, precision)), precision.label, gpu)
        for precision in precisions
    )
    return Plan(
        model=checkpoint.name,
        architecture=config.architecture,
        num_weights=num_weights(config),
        max_model_tokens=config.max_model_tokens,
        stored=None if checkpoint.stored is None else checkpoint.stored.label,
        unquantized_bytes=plain.weights(serving.num_ranks).total,
        kv_bytes_per_token={
            kv_type: plain.block_bytes(serving.num_ranks, kv_type) // KV_BLOCK_SIZE
            for kv_type in serving.kv_types
        },
        serving=serving,
        rows=tuple(rows),
    )


def _forms(checkpoint: Checkpoint, precision: Precision) -> dict[str, Form]:
    """Returns the form of each matrix: the stored one, else the precision's."""
    stored = {} if checkpoint.stored is None else checkpoint.stored.forms
    forms = {}
    for matrix in matrices(checkpoint.config):
        wanted = precision.quantizes_head if matrix.name == HEAD else checkpoint.stored is None
        form = stored.get(matrix.name, precision.form if wanted else None)
        # Where blocks would reach over rows, a matrix is kept dense.
        forms[matrix.name] = form if fits(form, matrix.num_inputs) else None
    # And where parts of one differ.
    return {
        name: form if all(forms[part] == form for part in merged_with(name)) else None
        for name, form in forms.items()
    }


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A model in one precision."""

    config: ModelConfig
    forms: Mapping[str, Form]
    serving: Serving
    stored: Mapping[str, Form] = field(default_factory=dict)
    """The form of matrices that are stored quantized, though they may be made dense."""

    def obstacle(self, num_ranks: int, gpu: Gpu | None) -> str | None:
        """Returns why it cannot be served, whatever the memory."""
        if gpu is not None and not gpu.has_bfloat16 and self.serving.dtype == "bfloat16":
            return f"{gpu.name} has no bfloat16; --dtype float16 works there"
        if gpu is not None and not gpu.has_fp8 and self.serving.kv_types[0] == "fp8":
            return f"{gpu.name} has no 8-bit floats; --kv-cache auto works there"
        return why_not_split(self.config, num_ranks, {**self.forms, **self.stored})

    def weights(self, num_ranks: int) -> WeightBytes:
        """Returns what a rank keeps."""
        rank = shard(self.config, num_ranks)
        return weight_bytes(rank, self.forms, ITEM_BYTES[self.serving.dtype])

    def free_bytes(self, num_ranks: int, gpu: Gpu) -> int:
        """Returns what weights and positions leave of a GPU; may be negative."""
        weights = self.weights(num_ranks).total
        return gpu.memory_bytes - CUDA_BYTES - rotary_bytes(self.config) - weights

    def scratch_bytes(self, num_ranks: int, gpu: Gpu, kv_type: str) -> int:
        """Returns what a rank leaves aside for the largest step."""
        rank = shard(self.config, num_ranks)
        num_step_tokens = self.serving.step_tokens
        item_bytes = ITEM_BYTES[self.serving.dtype]
        scratch = scratch_bytes(
            rank,
            num_rows=self.serving.max_num_requests,
            num_step_tokens=num_step_tokens,
            item_bytes=item_bytes,
            makes_dense=any(isinstance(form, FourBits) for form in self.forms.values()),
        )
        if kv_type == "fp8" and self._is_widened(gpu):
            num_positions = num_widened(
                max_model_tokens=self.serving.max_model_tokens or self.config.max_model_tokens,
                num_step_tokens=num_step_tokens,
            )
            scratch += widened_bytes(rank, num_positions=num_positions, item_bytes=item_bytes)
        return scratch

    def _is_widened(self, gpu: Gpu) -> bool:
        """Returns whether attention reads keys and values in 8 bits from a room of their own.

        As where flash-attn-4 is installed if the GPU has kernels in it, and flash-attn 2 is not.
        """
        has_type = self.serving.dtype != "float32"
        return has_type and gpu.has_flash4 and self.config.head_dim in FLASH4_HEAD_DIMS

    def block_bytes(self, num_ranks: int, kv_type: str) -> int:
        """Returns what a block takes on a rank."""
        rank = shard(self.config, num_ranks)
        return block_bytes(rank, KV_BLOCK_SIZE, _KV_BYTES[kv_type])

    def lacking_bytes(self, num_ranks: int, gpu: Gpu) -> int:
        """Returns how much less than a pool for one request is left; 0 if it is there."""
        kv_type = self.serving.kv_types[0]
        one = self.block_bytes(num_ranks, kv_type)
        pool = max(MIN_BLOCKS, self._blocks_of_a_request()) * one
        left = self.free_bytes(num_ranks, gpu) - self.scratch_bytes(num_ranks, gpu, kv_type)
        return max(0, math.ceil(pool / self.serving.kv_memory_fraction) - left)

    def pools(self, num_ranks: int, gpu: Gpu) -> Iterator[Pool]:
        """Yields a rank's pool in each type that the GPU has."""
        free_bytes = self.free_bytes(num_ranks, gpu)
        read_bytes = self.weights(num_ranks).read_a_step
        for kv_type in self.serving.kv_types:
            if kv_type == "fp8" and not gpu.has_fp8:
                continue
            num_bytes = pool_share(
                free_bytes,
                scratch=self.scratch_bytes(num_ranks, gpu, kv_type),
                memory_fraction=self.serving.kv_memory_fraction,
            )
            one = self.block_bytes(num_ranks, kv_type)
            num_blocks = num_bytes // one
            num_requests = min(
                self.serving.max_num_requests, num_blocks // self._blocks_of_a_request()
            )
            context_bytes = self.serving.context_tokens * one / KV_BLOCK_SIZE
            yield Pool(
                kv_type=kv_type,
                num_bytes=num_blocks * one,
                num_blocks=num_blocks,
                num_tokens=num_blocks * KV_BLOCK_SIZE,
                num_requests=num_requests,
                tokens_per_s={
                    batch: batch * gpu.bytes_per_s / (read_bytes + batch * context_bytes)
                    for batch in BATCHES
                    if batch <= num_requests and gpu.bytes_per_s is not None
                },
            )

    def serves(self, num_ranks: int, gpu: Gpu) -> bool:
        """Returns whether so many GPUs serve one request."""
        return self.obstacle(num_ranks, gpu) is None and not self.lacking_bytes(num_ranks, gpu)

    def _blocks_of_a_request(self) -> int:
        return -(-self.serving.context_tokens // KV_BLOCK_SIZE)


def _row(case: _Case, label: str, asked: Gpu | None) -> Row:
    num_ranks = case.serving.num_ranks
    smallest = _smallest(case, GPUS, at_least=num_ranks)
    found = asked
    if asked is None and smallest is not None:
        found, num_ranks = smallest
    weights = case.weights(num_ranks)
    least = None if found is None else _smallest(case, (found,), at_least=1)
    return Row(
        precision=label,
        weights_bytes=weights.total,
        weights=weights,
        smallest=None if smallest is None else Group(gpu=smallest[0].name, num_gpus=smallest[1]),
        gpu=found,
        num_gpus=num_ranks,
        obstacle=case.obstacle(num_ranks, found),
        lacking_bytes=0 if found is None else case.lacking_bytes(num_ranks, found),
        least_num_gpus=None if least is None else least[1],
        fits=found is not None and case.serves(num_ranks, found),
        pools=() if found is None else tuple(case.pools(num_ranks, found)),
    )


def _smallest(case: _Case, gpus: tuple[Gpu, ...], *, at_least: int) -> tuple[Gpu, int] | None:
    """Returns the first of the GPUs of which as few as possible serve, and how many it takes."""
    num_ranks = at_least
    while num_ranks <= max(MAX_RANKS, at_least):
        for gpu in gpus:
            if case.serves(num_ranks, gpu):
                return gpu, num_ranks
        num_ranks *= 2
    return None
