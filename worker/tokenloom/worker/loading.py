"""From a Configure to a model in memory: weights, KV pool.

                                               ┌ threads: weights copied ─────────────────┐
locate ─▶ config.json, headers ─▶ memory taken ┴ KV pool ─▶ what the caller prepares: its ┴▶ there
                                                            kernels, its rows
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from tokenloom.worker.attention import choose_attention
from tokenloom.worker.config import ModelConfig
from tokenloom.worker.errors import LoadError
from tokenloom.worker.fp8 import CODE_DTYPE
from tokenloom.worker.gpus import CAPABILITY_FP8
from tokenloom.worker.kernels import choose_operations
from tokenloom.worker.kv import KVPool, pool_bytes
from tokenloom.worker.memory import (
    CPU_STEP_TOKENS,
    CUDA_STEP_TOKENS,
    num_widened,
    scratch_bytes,
    widened_bytes,
)
from tokenloom.worker.model import Decoder
from tokenloom.worker.rotary import rotary_table
from tokenloom.worker.weights.checkpoint import (
    interpret,
    locate,
    read_config,
    read_tensors,
)
from tokenloom.worker.weights.copying import Copying
from tokenloom.worker.weights.filling import Filling, match
from tokenloom.worker.weights.fingerprint import fingerprint
from tokenloom.worker.weights.formats import EightBits
from tokenloom.worker.weights.linears import DenseLinear, EightBitLinear, Linear
from tokenloom.worker.weights.matrices import matrices
from tokenloom.worker.weights.merged import (
    allocate_weights,
    destinations,
    linears,
)
from tokenloom.worker.weights.precision import choose_formats
from tokenloom.worker.weights.rounding import load_bitsandbytes
from tokenloom.worker.weights.sharding import Shard, check_split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tokenloom.wire.messages import Configure
    from tokenloom.worker.attention import Attention
    from tokenloom.worker.options import WorkerOptions
    from tokenloom.worker.ranks import Ranks
    from tokenloom.worker.weights.merged import Weights
    from tokenloom.worker.weights.stored import StoredTensor

_log = logging.getLogger(__name__)

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True, kw_only=True)
class ModelAsked:
    """What of a Configure decides which weights are in memory."""

    model: str
    dtype: str
    quantize: str
    quantize_lm_head: bool
    int8_threshold: float
    kv_cache: str
    rank: int
    num_ranks: int

    @staticmethod
    def of(configure: Configure) -> ModelAsked:
        """Returns what `configure` asks for."""
        return ModelAsked(
            model=configure.model,
            dtype=configure.dtype,
            quantize=configure.quantize,
            quantize_lm_head=configure.quantize_lm_head,
            int8_threshold=configure.int8_threshold,
            kv_cache=configure.kv_cache,
            rank=configure.rank,
            num_ranks=configure.world_size,
        )


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in memory; it outlives epochs."""

    asked: ModelAsked
    config: ModelConfig
    """Of the whole decoder, whatever this rank has of it."""
    decoder: Decoder
    attention: Attention
    pool: KVPool
    weights_bytes: int
    fingerprint: str
    """Names the whole checkpoint and how it is computed with."""

    def outline(self) -> LoadedModel:
        """Returns one layer of each kind on torch's meta device: shapes without content."""
        decoder = self.decoder.excerpt().outline()
        return replace(self, decoder=decoder, pool=self.pool.outline())

    def among(self, ranks: Ranks) -> LoadedModel:
        """Returns the same model in another group."""
        return replace(self, decoder=self.decoder.among(ranks))


@contextmanager
def load_model(
    configure: Configure,
    options: WorkerOptions,
    device: torch.device,
    report: Callable[[str, float], None],
    join: Callable[[], Ranks],
) -> Iterator[LoadedModel]:
    """Yields what this rank has of the model that `configure` names.

    Its weights are there at the end of `with`.

    Until then they are zeros or the checkpoint's own: good enough to compile kernels
    and to capture steps. `report` takes a phase and a fraction; `join` is called once, when the
    weights have their memory: what a group takes is no longer there for the KV pool.

    Raises:
        LoadError: It cannot be loaded here; of files that cannot be read, at the end of `with`.
    """
    report("finding the checkpoint", 0.0)
    folder = locate(configure.model)
    entries = read_config(folder)
    whole = ModelConfig.parse(entries)
    dtype = _dtype(configure.dtype, whole, device)
    kv_dtype = _kv_dtype(configure.kv_cache, dtype, device)
    shard = Shard(whole=whole, rank=configure.rank, num_ranks=configure.world_size)
    tensors = read_tensors(folder)
    weights, fillings = _take_memory(tensors, shard, configure, dtype, device)
    config = shard.config
    with Copying(fillings, device) as copying:
        attention = choose_attention(
            options.attention,
            head_dim=config.head_dim,
            dtype=dtype,
            device=device,
            num_widened=_num_widened(configure, config, device),
        )
        operations = choose_operations(device)
        _log.info(
            "%s: %s on %s in %s, keys and values in %s, attention %s, operations %s",
            configure.model,
            config.architecture,
            device,
            dtype,
            kv_dtype,
            attention.name,
            operations.name,
        )
        rotary = rotary_table(
            config.rope,
            head_dim=config.head_dim,
            num_positions=config.max_model_tokens,
            device=device,
        )
        ranks = join()
        yield LoadedModel(
            asked=ModelAsked.of(configure),
            config=whole,
            decoder=Decoder(config, weights, rotary, operations, ranks),
            attention=attention,
            pool=_pool(config, weights, configure, options, attention, dtype, kv_dtype, device),
            weights_bytes=sum(filling.num_place_bytes for filling in fillings),
            fingerprint=fingerprint(entries, tensors, _computed_in(configure, dtype, kv_dtype)),
        )
        copying.wait(lambda fraction: report("loading weights", fraction))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what quantizing took a stage at a time
    _log.info(
        "weights of rank %d of %d: read %.2f GB in %.2f s, %.1f GB/s",
        configure.rank,
        configure.world_size,
        copying.num_bytes / 1e9,
        copying.seconds,
        copying.num_bytes / 1e9 / copying.seconds,
    )


def _take_memory(
    tensors: Mapping[str, StoredTensor],
    shard: Shard,
    configure: Configure,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Weights, list[Filling]]:
    """Returns zeros for the weights, and what fills them. Raises LoadError."""
    config = shard.config
    stored = interpret(tensors, config)
    formats = choose_formats(
        matrices(shard.whole),
        stored,
        own=config.quantized_to,
        quantize=configure.quantize,
        quantize_lm_head=configure.quantize_lm_head,
        int8_threshold=configure.int8_threshold,
    )
    check_split(shard.whole, shard.num_ranks, formats)
    # A CPU that has codes to look up computes a token ten times as slowly: there they are made
    # dense as they are loaded. The numbers are those of the format, the memory is not. Where
    # outliers are parted, speed is not asked for.
    threshold = configure.int8_threshold
    kept = {
        name: each
        if device.type == "cuda" or (threshold > 0 and isinstance(each, EightBits))
        else None
        for name, each in formats.items()
    }
    if num_dense := sum(each is None for each in kept.values()):
        _log.info("on a CPU %d quantized matrices are kept dense", num_dense)
    weights = allocate_weights(
        config, formats=kept, int8_threshold=threshold, dtype=dtype, device=device
    )
    places = destinations(config, weights)
    fillings = match(stored, places, parts=shard.parts(places), formats=formats, dtype=dtype)
    if any(filling.rounded_to is not None for filling in fillings):
        load_bitsandbytes()
    return weights, fillings


def _pool(
    config: ModelConfig,
    weights: Weights,
    configure: Configure,
    options: WorkerOptions,
    attention: Attention,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    device: torch.device,
) -> KVPool:
    """Returns the KV pool, out of the memory that the weights leave."""
    scratch = scratch_bytes(
        config,
        num_rows=configure.max_num_requests,
        num_step_tokens=max_step_tokens(configure, device),
        item_bytes=dtype.itemsize,
        makes_dense=any(map(_is_made_dense, linears(weights))),
    )
    scratch += widened_bytes(config, num_positions=attention.num_widened, item_bytes=dtype.itemsize)
    num_bytes = pool_bytes(
        device,
        fixed_bytes=options.kv_cache_bytes,
        memory_fraction=options.kv_memory_fraction,
        scratch=scratch,
    )
    pool = KVPool(
        config,
        num_bytes=num_bytes,
        block_size=attention.block_size,
        dtype=kv_dtype,
        device=device,
    )
    _log.info("KV pool: %d blocks of %d positions", pool.num_blocks, attention.block_size)
    return pool


def _is_made_dense(linear: Linear) -> bool:
    """Returns whether steps may make a matrix dense: 8 bits have kernels, but for outliers."""
    if isinstance(linear, EightBitLinear):
        return linear.threshold > 0
    return not isinstance(linear, DenseLinear)


def max_step_tokens(configure: Configure, device: torch.device) -> int:
    """Returns how many tokens a step may compute: as configured, or what suits the device."""
    if configure.max_step_tokens is not None:
        return configure.max_step_tokens
    own = CUDA_STEP_TOKENS if device.type == "cuda" else CPU_STEP_TOKENS
    return max(own, configure.max_num_requests)


def max_model_tokens(configure: Configure, config: ModelConfig) -> int:
    """Returns the longest prompt + completion. Raises LoadError if the checkpoint's is shorter."""
    wanted = configure.max_model_tokens
    if wanted is None:
        return config.max_model_tokens
    if wanted > config.max_model_tokens:
        raise LoadError(
            f"max_model_tokens is {wanted}; the checkpoint is made for {config.max_model_tokens}"
        )
    return wanted


def _num_widened(configure: Configure, config: ModelConfig, device: torch.device) -> int | None:
    """Returns how many positions in 8 bits may be widened at once; None: they are not in 8 bits."""
    if configure.kv_cache != "fp8":
        return None
    return num_widened(
        max_model_tokens=max_model_tokens(configure, config),
        num_step_tokens=max_step_tokens(configure, device),
    )


def find_device(name: str) -> torch.device:
    """Returns the device that `cpu`, `cuda:1` or `auto` means. Raises LoadError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LoadError(f"{name!r} is no device") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        raise LoadError(
            f"device {name} is not there; this machine has {torch.cuda.device_count()} CUDA devices"
        )
    device = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(device)
    return device


def _computed_in(
    configure: Configure, dtype: torch.dtype, kv_dtype: torch.dtype
) -> tuple[object, ...]:
    """Returns what beside the checkpoint decides the numbers, up to rounding."""
    return (
        dtype,
        kv_dtype,
        configure.quantize,
        configure.quantize_lm_head,
        configure.int8_threshold,
    )


def _dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """Returns the type of weights and arithmetic, and of the KV pool unless it is in 8 bits.

    `auto` is the checkpoint's own on CUDA, and float32 on a CPU whatever the
    checkpoint says: CPUs without bfloat16 units emulate it slowly, and float32
    keeps batched and single results within rounding that flips no token.
    """
    if name != "auto":
        own = name
    elif device.type == "cuda":
        own = config.dtype or "float32"
    else:
        own = "float32"
    if own not in DTYPES:
        raise LoadError(f"dtype {own} is not supported; supported are {', '.join(DTYPES)}")
    return DTYPES[own]


def _kv_dtype(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the type of the KV pool."""
    if name == "auto":
        return dtype
    if name != "fp8":
        raise LoadError(f"kv_cache {name} is not supported; supported are auto, fp8")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < CAPABILITY_FP8:
            raise LoadError(
                f"kv_cache fp8 needs a GPU of compute capability 8.9 at least;"
                f" {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
            )
    return CODE_DTYPE
