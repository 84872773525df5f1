"""What each rank reads and keeps of a checkpoint, and how many ranks can share one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.worker.checkpoints import (
    QUANTIZED,
    edit_config,
    make_checkpoint,
    quantize_checkpoint,
)
from tests.worker.test_plan import parsed
from tests.worker.test_quantized import (
    assert_same,
    four_bit_config,
    load_weights,
    quantize_in_place,
    whole,
)
from tokenloom.worker.config import ModelConfig
from tokenloom.worker.errors import LoadError
from tokenloom.worker.weights import copying
from tokenloom.worker.weights.checkpoint import read_tensors
from tokenloom.worker.weights.formats import Format, FourBits
from tokenloom.worker.weights.linears import DenseLinear, EightBitLinear, FourBitLinear, Linear
from tokenloom.worker.weights.matrices import matrices
from tokenloom.worker.weights.sharding import Run, Shard, check_split

HEAD_DIM = 64
WIDE: dict[str, Any] = {"head_dim": HEAD_DIM, "intermediate_size": 256, "vocab_size": 97}
NUM_Q, NUM_KV, WIDTH = 4 * HEAD_DIM, 2 * HEAD_DIM, 256
"""Of the checkpoints here, which have two key-value heads."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix is filled in several pieces."""
    monkeypatch.setattr(copying, "STAGE_BYTES", 3000)


def run(size: int, rank: int, num_ranks: int) -> range:
    return range(rank * size // num_ranks, (rank + 1) * size // num_ranks)


def key_value_rows(rank: int, num_ranks: int) -> range:
    """Of 2 heads 2 ranks have one each; of 4, the first two have the first."""
    if num_ranks == 1:
        return range(NUM_KV)
    head = rank * 2 // num_ranks
    return range(head * HEAD_DIM, (head + 1) * HEAD_DIM)


def merged_rows(rank: int, num_ranks: int) -> list[int]:
    """Returns which rows of the whole q, k and v a rank has."""
    own = key_value_rows(rank, num_ranks)
    return [
        *run(NUM_Q, rank, num_ranks),
        *(NUM_Q + row for row in own),
        *(NUM_Q + NUM_KV + row for row in own),
    ]


def gate_up_rows(rank: int, num_ranks: int) -> list[int]:
    own = run(WIDTH, rank, num_ranks)
    return [*own, *(WIDTH + row for row in own)]


def cut(linear: Linear, rows: Sequence[int] | None, columns: range | None) -> Linear:
    """Returns what is left of a matrix on a rank; biases of what is cut by columns apart."""
    num_outputs, num_inputs = linear.shape
    outputs = list(range(num_outputs)) if rows is None else list(rows)
    first, last = (0, num_inputs) if columns is None else (columns.start, columns.stop)
    bias = None if linear.bias is None else linear.bias[outputs]
    match linear:
        case DenseLinear():
            return replace(linear, weight=linear.weight[outputs, first:last], bias=bias)
        case FourBitLinear():
            size = linear.block_size
            return replace(
                linear,
                codes=linear.codes[outputs, first // 2 : last // 2],
                absmax=linear.absmax[outputs, first // size : last // size],
                bias=bias,
            )
        case EightBitLinear():
            return replace(
                linear,
                codes=linear.codes[outputs, first:last],
                scales=linear.scales[outputs],
                bias=bias,
            )


def assert_holds_its_slices(
    folder: Path, rank: int, num_ranks: int, *, quantize: str, lm_head: bool = False
) -> None:
    alone = load_weights(folder, quantize=quantize, lm_head=lm_head)
    found = load_weights(folder, quantize=quantize, lm_head=lm_head, rank=rank, num_ranks=num_ranks)
    for own, full in zip(found.layers, alone.layers, strict=True):
        assert torch.equal(own.attention_norm, full.attention_norm)
        assert_same(own.qkv, cut(full.qkv, merged_rows(rank, num_ranks), None))
        assert_same(own.gate_up, cut(full.gate_up, gate_up_rows(rank, num_ranks), None))
        for part, complete, size in (
            (own.output, full.output, NUM_Q),
            (own.down, full.down, WIDTH),
        ):
            expected = cut(complete, None, run(size, rank, num_ranks))
            if rank > 0 and expected.bias is not None:
                expected = replace(expected, bias=torch.zeros_like(expected.bias))
            assert_same(part, expected)
    per_rank = -(-97 // num_ranks)
    rows = range(rank * per_rank, min((rank + 1) * per_rank, 97))
    assert torch.equal(found.embedding[: len(rows)], alone.embedding[rows.start : rows.stop])
    assert not found.embedding[len(rows) :].any()
    assert_same(found.head.rows(0, len(rows)), alone.head.rows(rows.start, rows.stop))
    assert found.head.shape[0] == per_rank


@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 2), (1, 2), (0, 4), (2, 4), (3, 4)])
@pytest.mark.parametrize(
    ("name", "quantize", "lm_head"),
    [
        ("llama-bias", "none", False),
        ("llama", "nf4", True),
        ("qwen3", "fp4", False),
    ],
)
def test_a_rank_holds_its_slices_of_what_one_would_hold(
    tmp_path: Path, rank: int, num_ranks: int, name: str, quantize: str, lm_head: bool
) -> None:
    make_checkpoint(tmp_path, name, **WIDE)
    assert_holds_its_slices(tmp_path, rank, num_ranks, quantize=quantize, lm_head=lm_head)


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize(("rank", "num_ranks"), [(1, 2), (2, 4)])
def test_a_rank_holds_its_slices_of_a_quantized_checkpoint_bit_for_bit(
    tmp_path: Path, quantized: str, rank: int, num_ranks: int
) -> None:
    make_checkpoint(tmp_path / "dense", "llama-bias", **WIDE)
    quantize_checkpoint(tmp_path / "dense", tmp_path / "out", quantized)
    assert_holds_its_slices(tmp_path / "out", rank, num_ranks, quantize="none")


@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("nested", [False, True])
def test_rows_of_blocks_of_other_sizes_are_divided(
    tmp_path: Path, block_size: int, nested: bool
) -> None:
    """With 128, a block is two rows of 64."""
    make_checkpoint(tmp_path, "llama", **WIDE)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(3):
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            quantize_in_place(tensors, f"model.layers.{layer}.{name}", block_size, nested=nested)
    save_file(tensors, tmp_path / "model.safetensors")
    edit_config(tmp_path, quantization_config=four_bit_config())
    assert_holds_its_slices(tmp_path, 3, 4, quantize="none")


def test_of_8_bits_a_slice_of_the_inputs_has_scales_of_its_own(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", **WIDE)
    tensors = load_file(tmp_path / "model.safetensors")
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    for rank in (0, 1):
        found = load_weights(tmp_path, quantize="int8", rank=rank, num_ranks=2).layers[1]
        own = run(WIDTH, rank, 2)
        assert_same(found.down, whole(down[:, own.start : own.stop].contiguous(), "int8"))
        complete = load_weights(tmp_path, quantize="int8").layers[1]
        assert_same(found.qkv, cut(complete.qkv, merged_rows(rank, 2), None))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_rank_reads_its_slices_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    make_checkpoint(tmp_path, "llama-bias", **WIDE | {"num_key_value_heads": 4, "vocab_size": 96})
    num_read = 0
    read = os.preadv

    def counted(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal num_read
        num_new = read(descriptor, buffers, offset)
        num_read += num_new
        return num_new

    monkeypatch.setattr(os, "preadv", counted)
    for rank in range(num_ranks):
        load_weights(tmp_path, rank=rank, num_ranks=num_ranks)
    stored = read_tensors(tmp_path)
    norms = sum(each.num_bytes for name, each in stored.items() if "norm" in name)
    total = sum(each.num_bytes for each in stored.values())
    assert num_read == total + (num_ranks - 1) * norms


def formats(config: ModelConfig, block_size: int) -> dict[str, Format]:
    return {
        matrix.name: FourBits(codebook="nf4", block_size=block_size)
        for matrix in matrices(config)
        if matrix.name != "lm_head"
    }


@pytest.mark.parametrize(
    ("num_ranks", "sizes", "block_size", "message"),
    [
        (3, (1, 64, 96, 4, 2, 97), None, "4 attention heads do not .* 3; it divides by 1, 2, 4$"),
        (4, (1, 64, 90, 4, 2, 97), None, "90 columns .* do not divide by 4; it .* by 1, 2$"),
        (3, (1, 64, 96, 6, 2, 97), None, "2 key-value heads do not .* 3; it .* by 1, 2, 6$"),
        (4, (1, 64, 192, 4, 2, 97), 64, "the 48 inputs of .*down_proj .* no whole blocks of 64"),
        (2, (1, 96, 86, 4, 2, 97), 64, "the 43 rows of .*gate_proj .* no whole blocks of 64"),
    ],
)
def test_a_split_that_cannot_be_is_refused_with_those_that_can(
    num_ranks: int, sizes: tuple[int, ...], block_size: int | None, message: str
) -> None:
    config = parsed("Llama", sizes, head_dim=HEAD_DIM)
    quantized = {} if block_size is None else formats(config, block_size)
    with pytest.raises(LoadError, match=message):
        check_split(config, num_ranks, quantized)
    check_split(config, 1, quantized)


def test_more_ranks_than_tokens_leave_some_without() -> None:
    config = parsed("Llama", (1, 64, 96, 4, 2, 5))
    parts = [
        Shard(whole=config, rank=rank, num_ranks=4).parts(["lm_head.weight"])["lm_head.weight"]
        for rank in range(4)
    ]
    assert [each.rows for each in parts] == [
        Run(first=first, last=last, size=5) for first, last in ((0, 2), (2, 4), (4, 5), (5, 5))
    ]
