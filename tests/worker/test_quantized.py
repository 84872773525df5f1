"""Quantized weights, from the file to the memory: codes, scales, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bitsandbytes
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.worker.checkpoints import (
    QUANTIZED,
    edit_config,
    generate,
    make_checkpoint,
    quantize_checkpoint,
    skipped,
)
from tests.worker.driver import Driver, configuration
from tokenloom.wire.messages import Configure, Ready
from tokenloom.worker.config import ModelConfig
from tokenloom.worker.errors import CheckpointError, LoadError, UnsupportedModelError
from tokenloom.worker.options import WorkerOptions
from tokenloom.worker.plan.capacity import Precision, Serving, make_plan
from tokenloom.worker.plan.reading import read_checkpoint
from tokenloom.worker.plan.sizes import WeightBytes, weight_bytes
from tokenloom.worker.runner import ModelRunner
from tokenloom.worker.weights import copying, rounding
from tokenloom.worker.weights.checkpoint import interpret, read_config, read_tensors
from tokenloom.worker.weights.copying import Copying
from tokenloom.worker.weights.filling import Filling, match
from tokenloom.worker.weights.formats import CODEBOOKS, FourBits, stored_format_name
from tokenloom.worker.weights.linears import DenseLinear, EightBitLinear, FourBitLinear, Linear
from tokenloom.worker.weights.matrices import matrices
from tokenloom.worker.weights.merged import (
    Weights,
    allocate_weights,
    destinations,
)
from tokenloom.worker.weights.precision import choose_formats
from tokenloom.worker.weights.sharding import Shard

CPU = torch.device("cpu")
PROMPT = [5, 3, 80, 41, 7]
QKV = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
DOWN = "model.layers.2.mlp.down_proj"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix is filled in several pieces."""
    monkeypatch.setattr(copying, "STAGE_BYTES", 1500)


def take_memory(
    folder: Path,
    *,
    quantize: str = "none",
    lm_head: bool = False,
    dtype: str = "float32",
    rank: int = 0,
    num_ranks: int = 1,
) -> tuple[Weights, list[Filling], WeightBytes]:
    """Returns the weights as a GPU keeps them, what fills them, and what is planned for them."""
    shard = Shard(whole=ModelConfig.parse(read_config(folder)), rank=rank, num_ranks=num_ranks)
    config = shard.config
    stored = interpret(read_tensors(folder), config)
    formats = choose_formats(
        matrices(shard.whole),
        stored,
        own=config.quantized_to,
        quantize=quantize,
        quantize_lm_head=lm_head,
    )
    weights = allocate_weights(
        config, formats=formats, int8_threshold=0.0, dtype=DTYPES[dtype], device=CPU
    )
    places = destinations(config, weights)
    fillings = match(
        stored, places, parts=shard.parts(places), formats=formats, dtype=DTYPES[dtype]
    )
    forms = {matrix.name: formats.get(matrix.name) for matrix in matrices(config)}
    return weights, fillings, weight_bytes(config, forms, DTYPES[dtype].itemsize)


def load_weights(
    folder: Path,
    *,
    quantize: str = "none",
    lm_head: bool = False,
    dtype: str = "float32",
    rank: int = 0,
    num_ranks: int = 1,
) -> Weights:
    """Returns the weights as a GPU keeps them."""
    weights, fillings, _ = take_memory(
        folder, quantize=quantize, lm_head=lm_head, dtype=dtype, rank=rank, num_ranks=num_ranks
    )
    with Copying(fillings, CPU, num_threads=3) as under_way:
        under_way.wait(lambda _: None)
    return weights


def load(configure: Configure) -> tuple[ModelRunner, Ready]:
    runner = ModelRunner(WorkerOptions(device="cpu", kv_cache_bytes=1024 * 1024))
    return runner, runner.configure(configure, lambda *_: None)


def complete(configure: Configure) -> list[int]:
    runner, ready = load(configure)
    [tokens] = Driver(lambda step: runner.launch(step).result(), ready).generate([PROMPT], 12)
    return tokens


def whole(values: Tensor, name: str) -> Linear:
    """Returns what bitsandbytes makes of a whole matrix."""
    num_outputs, num_inputs = values.shape
    if name == "int8":
        codes, stats, _ = bitsandbytes.int8_vectorwise_quant(values.half())
        return EightBitLinear(codes=codes, scales=stats / 127, bias=None)
    codes, state = bitsandbytes.quantize_4bit(values, blocksize=64, quant_type=name)
    return FourBitLinear(
        codes=codes.view(num_outputs, num_inputs // 2),
        absmax=state.absmax.view(num_outputs, num_inputs // 64),
        codebook=state.code,
        bias=None,
    )


def assert_same(found: Linear, expected: Linear) -> None:
    assert type(found) is type(expected)
    for field in vars(expected):
        values = getattr(found, field), getattr(expected, field)
        if isinstance(values[1], torch.Tensor):
            assert torch.equal(values[0].cpu(), values[1].cpu()), field


def test_codebooks_are_those_of_bitsandbytes() -> None:
    for name, values in CODEBOOKS.items():
        expected = bitsandbytes.get_4bit_type(name, device="cpu")  # type: ignore[no-untyped-call]
        assert torch.equal(torch.tensor(values, dtype=torch.float32), expected)


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_merged_matrix_is_quantized_exactly_as_its_parts_as_a_whole(
    tmp_path: Path, quantize: str, dtype: str, stored: str
) -> None:
    make_checkpoint(tmp_path, "llama").to(DTYPES[stored]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    weights = load_weights(tmp_path, quantize=quantize, dtype=dtype)
    # Dense values are rounded to the activations' type before, as transformers does it.
    parts = torch.cat([tensors[f"{name}.weight"] for name in QKV]).to(DTYPES[dtype])
    assert_same(weights.layers[1].qkv, whole(parts, quantize))
    assert isinstance(weights.head, DenseLinear)


def test_a_device_has_one_codebook_for_its_matrices_and_the_pieces_they_come_in(
    tmp_path: Path,
) -> None:
    make_checkpoint(tmp_path, "llama")
    qkv = load_weights(tmp_path, quantize="nf4").layers[1].qkv
    piece = rounding.quantized(torch.randn(2, 64), FourBits(codebook="nf4"))
    assert isinstance(qkv, FourBitLinear)
    assert isinstance(piece, FourBitLinear)
    assert qkv.codebook is piece.codebook


def test_a_bias_stays_as_it_is(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen2")
    tensors = load_file(tmp_path / "model.safetensors")
    bias = load_weights(tmp_path, quantize="nf4").layers[1].qkv.bias
    assert bias is not None
    assert torch.equal(bias, torch.cat([tensors[f"{name}.bias"] for name in QKV]))


def bitsandbytes_dense(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Returns the values of a stored matrix, float32, as bitsandbytes computes them."""
    if f"{name}.SCB" in tensors:
        return tensors[f"{name}.weight"] * (tensors[f"{name}.SCB"] / 127)[:, None]
    prefix = f"{name}.weight"
    own = {key.removeprefix(prefix + "."): tensors[key] for key in tensors if prefix + "." in key}
    state = bitsandbytes.QuantState.from_dict(own, device=CPU)
    state.dtype = torch.float32
    # On a CPU it is right only where rows are whole blocks.
    shape = state.shape
    state.shape = torch.Size((shape.numel() // state.blocksize, state.blocksize))
    return bitsandbytes.dequantize_4bit(tensors[prefix], state).view(shape)


@pytest.mark.parametrize("quantized", QUANTIZED)
def test_a_quantized_checkpoint_is_read_bit_for_bit(tmp_path: Path, quantized: str) -> None:
    make_checkpoint(tmp_path / "dense", "llama")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "out", quantized)
    weights = load_weights(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    qkv = weights.layers[1].qkv
    assert not isinstance(qkv, DenseLinear)
    expected = torch.cat([bitsandbytes_dense(tensors, name) for name in QKV])
    assert torch.equal(qkv.dense(torch.float32), expected)
    # Its 96 inputs are one and a half block: it is made dense, but for whole rows of 8 bits.
    down = weights.layers[2].down
    assert isinstance(down, EightBitLinear if quantized == "int8" else DenseLinear)
    values = down.weight if isinstance(down, DenseLinear) else down.dense(torch.float32)
    assert torch.equal(values, bitsandbytes_dense(tensors, DOWN))
    assert isinstance(weights.head, DenseLinear)


@pytest.mark.parametrize("name", ["llama", "llama-bias", "llama-tied", "qwen3"])
@pytest.mark.parametrize("quantized", QUANTIZED)
def test_a_quantized_checkpoint_is_served_as_transformers_serves_it(
    tmp_path: Path, name: str, quantized: str
) -> None:
    make_checkpoint(tmp_path / "dense", name)
    model = quantize_checkpoint(
        tmp_path / "dense", tmp_path / "out", quantized, skipped=skipped(name, quantized)
    )
    configure = configuration(str(tmp_path / "out"))
    assert complete(configure) == generate(model, PROMPT, 12)


@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("nested", [False, True])
def test_other_block_sizes_are_kept(tmp_path: Path, block_size: int, nested: bool) -> None:
    make_checkpoint(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        for layer in range(3):
            quantize_in_place(tensors, f"model.layers.{layer}.{name}", block_size, nested=nested)
    save_file(tensors, tmp_path / "model.safetensors")
    edit_config(tmp_path, quantization_config=four_bit_config())
    gate_up = load_weights(tmp_path).layers[1].gate_up
    parts = [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up")]
    expected = torch.cat([bitsandbytes_dense(tensors, name) for name in parts])
    if block_size == 32:
        assert isinstance(gate_up, FourBitLinear)
        assert gate_up.block_size == 32
        assert torch.equal(gate_up.dense(torch.float32), expected)
    else:  # a block is two rows of 64
        assert isinstance(gate_up, DenseLinear)
        assert torch.equal(gate_up.weight, expected)


def quantize_in_place(
    tensors: dict[str, Tensor], name: str, block_size: int = 64, *, nested: bool = False
) -> None:
    codes, state = bitsandbytes.quantize_4bit(
        tensors[f"{name}.weight"],
        blocksize=block_size,
        quant_type="nf4",
        compress_statistics=nested,
    )
    tensors[f"{name}.weight"] = codes
    for key, value in state.as_dict(packed=True).items():
        tensors[f"{name}.weight.{key}"] = value


def four_bit_config(**changes: object) -> dict[str, object]:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return config | changes


def test_a_merged_matrix_of_which_a_part_is_dense_is_dense(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    dense = {name: tensors[f"{name}.weight"] for name in QKV}
    for name in QKV[:2]:
        quantize_in_place(tensors, name)
    save_file(tensors, tmp_path / "model.safetensors")
    edit_config(tmp_path, quantization_config=four_bit_config())
    qkv = load_weights(tmp_path).layers[1].qkv
    assert isinstance(qkv, DenseLinear)
    expected = [bitsandbytes_dense(tensors, name) for name in QKV[:2]] + [dense[QKV[2]]]
    assert torch.equal(qkv.weight, torch.cat(expected))
    _, fillings, _ = take_memory(tmp_path)
    serving = Serving(dtype="float32", kv_types=("float32",), context_tokens=16)
    nf4 = Precision(label="nf4", form=FourBits(codebook="nf4"))
    (row,) = make_plan(read_checkpoint(str(tmp_path)), serving, (nf4,), None).rows
    assert row.weights_bytes == sum(filling.num_place_bytes for filling in fillings)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_the_head_is_quantized_when_that_is_asked_for(
    tmp_path: Path, name: str, quantize: str
) -> None:
    make_checkpoint(tmp_path, name)
    tensors = load_file(tmp_path / "model.safetensors")
    weights = load_weights(tmp_path, quantize=quantize, lm_head=True)
    source = "model.embed_tokens.weight" if name == "llama-tied" else "lm_head.weight"
    assert_same(weights.head, whole(tensors[source], quantize))
    # Where both are one matrix, the embedding stays and the head is a copy.
    assert torch.equal(weights.embedding, tensors["model.embed_tokens.weight"])


def test_the_head_of_a_quantized_checkpoint_is_quantized_as_the_rest(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "dense", "llama")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "out", "fp4")
    head = load_weights(tmp_path / "out", lm_head=True).head
    dense = load_file(tmp_path / "dense" / "model.safetensors")["lm_head.weight"]
    assert_same(head, whole(dense, "fp4"))


def test_a_quantized_checkpoint_may_have_a_quantized_head(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "dense", "llama")
    model = quantize_checkpoint(tmp_path / "dense", tmp_path / "out", "nf4", skipped=["down_proj"])
    assert isinstance(load_weights(tmp_path / "out").head, FourBitLinear)
    assert complete(configuration(str(tmp_path / "out"))) == generate(model, PROMPT, 12)


@pytest.mark.parametrize("name", ["llama-bias", "llama-tied", "qwen3"])
@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
@pytest.mark.parametrize("lm_head", [False, True])
def test_quantized_weights_take_what_is_planned_for_them(
    tmp_path: Path, name: str, quantize: str, lm_head: bool
) -> None:
    make_checkpoint(tmp_path, name)
    _, fillings, planned = take_memory(
        tmp_path, quantize=quantize, lm_head=lm_head and quantize != "none", dtype="bfloat16"
    )
    assert sum(filling.num_place_bytes for filling in fillings) == planned.total


def test_a_cpu_keeps_the_rounded_values_dense_and_says_so(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    plain, ready = load(configuration(str(tmp_path)))
    rounded, ready_rounded = load(configuration(str(tmp_path), quantize="nf4"))
    assert ready_rounded.weights_bytes == ready.weights_bytes
    expected = whole(first_qkv(plain).weight, "nf4")
    assert isinstance(expected, FourBitLinear)
    assert torch.equal(first_qkv(rounded).weight, expected.dense(torch.float32))


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_cpu_keeps_the_rounded_values_of_the_head_beside_the_embedding(
    tmp_path: Path, name: str
) -> None:
    make_checkpoint(tmp_path, name)
    tensors = load_file(tmp_path / "model.safetensors")
    runner, _ = load(configuration(str(tmp_path), quantize="nf4", quantize_lm_head=True))
    assert runner._loaded is not None
    weights = runner._loaded.decoder._weights
    source = "model.embed_tokens.weight" if name == "llama-tied" else "lm_head.weight"
    expected = whole(tensors[source], "nf4")
    assert isinstance(expected, FourBitLinear)
    assert isinstance(weights.head, DenseLinear)
    assert torch.equal(weights.head.weight, expected.dense(torch.float32))
    assert torch.equal(weights.embedding, tensors["model.embed_tokens.weight"])


def test_a_threshold_for_outliers_reaches_matrices_of_8_bits(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    asked = configuration(str(tmp_path), quantize="int8", int8_threshold=2.0)
    runner, _ = load(asked)
    assert runner._loaded is not None
    qkv = runner._loaded.decoder._weights.layers[0].qkv
    assert isinstance(qkv, EightBitLinear)
    assert qkv.threshold == 2.0
    rows = torch.linspace(-3, 3, 64)[None]
    assert not torch.equal(qkv(rows), rows @ qkv.dense(torch.float32).T)
    assert len(complete(asked)) == 12


def first_qkv(runner: ModelRunner) -> DenseLinear:
    assert runner._loaded is not None
    qkv = runner._loaded.decoder._weights.layers[0].qkv
    assert isinstance(qkv, DenseLinear)
    return qkv


def test_what_is_kept_dense_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint(tmp_path, "llama")
    with caplog.at_level(logging.INFO):
        load(configuration(str(tmp_path), quantize="nf4"))
    # The layers' down projections have 96 inputs.
    assert "3 matrices are kept dense, as model.layers.0.mlp.down_proj:" in caplog.text
    assert "on a CPU 18 quantized matrices are kept dense" in caplog.text


def test_a_scalar_for_a_matrix_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors") | {f"{QKV[0]}.weight": torch.ones(())}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has shape \(\); \(64, 64\) is expected"):
        load(configuration(str(tmp_path), quantize="nf4"))


def test_another_format_is_loaded_anew(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    runner = ModelRunner(WorkerOptions(device="cpu", kv_cache_bytes=1024 * 1024))
    told: list[str] = []
    for epoch, quantize in enumerate(["nf4", "nf4", "int8"], start=1):
        told.clear()
        configure = configuration(str(tmp_path), epoch=epoch, quantize=quantize)
        runner.configure(configure, lambda phase, _: told.append(phase))
        assert ("loading weights" in told) == (epoch != 2)


@pytest.mark.parametrize(
    ("own", "options", "message"),
    [
        ("nf4", {"quantize": "int8"}, "quantized to nf4 already; .* with quantize = int8"),
        ("nf4", {"quantize": "fp4"}, "quantized to nf4 already"),
        ("int8", {"quantize": "nf4"}, "quantized to int8 already"),
        (None, {"quantize_lm_head": True}, "quantize_lm_head is set, but neither"),
        (
            None,
            {"int8_threshold": 6.0},
            "int8_threshold is 6, but .* none, the checkpoint is dense",
        ),
        (
            None,
            {"quantize": "nf4", "int8_threshold": 6.0},
            "no matrix is in 8 bits: quantize is nf4",
        ),
        ("nf4", {"int8_threshold": 0.5}, "int8_threshold is 0.5, .* the checkpoint is nf4"),
        (None, {"quantize": "int4"}, "quantize is 'int4'; it must be one of none, nf4, fp4, int8"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(
    tmp_path: Path, own: str | None, options: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "dense"
    make_checkpoint(folder, "llama")
    if own is not None:
        quantize_checkpoint(folder, tmp_path / "out", own)
        folder = tmp_path / "out"
    with pytest.raises(LoadError, match=message):
        load(configuration(str(folder), **options))


def test_asking_for_what_the_checkpoint_is_changes_nothing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "dense", "llama")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "out", "nf4")
    plain = configuration(str(tmp_path / "out"))
    assert complete(plain) == complete(configuration(str(tmp_path / "out"), quantize="nf4"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq'"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit = False and load_in_8bit = False"),
        (four_bit_config(load_in_8bit=True), "load_in_4bit = True and load_in_8bit = True"),
        (four_bit_config(bnb_4bit_quant_type="nf3"), "'nf3' is not supported; supported are nf4"),
    ],
)
def test_other_quantizations_are_refused_with_what_is_built(
    config: dict[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        stored_format_name(config)


def test_the_quantization_of_old_exports_is_understood() -> None:
    assert stored_format_name(None) is None
    assert stored_format_name({"load_in_8bit": True, "llm_int8_threshold": 6.0}) == "int8"
    assert stored_format_name({"load_in_4bit": True}) == "fp4"


def state(**changes: object) -> Tensor:
    known = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 64]}
    return torch.frombuffer(bytearray(json.dumps(known | changes).encode()), dtype=torch.uint8)


NAME = QKV[0] + ".weight"
STATE = NAME + ".quant_state.bitsandbytes__nf4"
NESTED = {"nested_blocksize": 256, "nested_offset": 0.5, "nested_dtype": "float32"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({STATE: torch.zeros(3, dtype=torch.uint8)}, f"{STATE} cannot be read"),
        ({STATE: state(quant_type="fp4")}, "says quant_type = 'fp4'"),
        ({STATE: state(blocksize=63)}, "says blocksize = 63; it is one of"),
        ({STATE: state(shape=[64, 32])}, r"has 2048 bytes; shape \(64, 32\) of 4 bits takes 1024"),
        ({STATE: state(shape=[32, 128])}, r"has shape \(32, 128\); \(64, 64\) is expected"),
        ({STATE: state(shape=[4096, 1])}, "an even number of inputs"),
        ({STATE: state(blocksize=32)}, r"absmax is of type F32 and shape \(64,\); F32 of \(128,\)"),
        ({STATE: state(**NESTED)}, "nested_absmax is missing"),
        ({NAME + ".absmax": None}, "absmax is missing, which .* needs"),
        ({NAME + ".absmax": torch.zeros(64, dtype=torch.uint8)}, "F32 of .* is expected"),
        ({NAME + ".extra": torch.zeros(1)}, "extra is not expected"),
    ],
)
def test_a_matrix_of_4_bits_that_does_not_fit_is_named(
    tmp_path: Path, changes: Mapping[str, Tensor | None], message: str
) -> None:
    make_checkpoint(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    quantize_in_place(tensors, QKV[0])
    edit_config(tmp_path, quantization_config=four_bit_config())
    save_file(with_changes(tensors, changes), tmp_path / "model.safetensors")
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        load(configuration(str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({QKV[0] + ".SCB": torch.ones(63)}, r"shape \(63,\); F32 of \(64,\) is expected"),
        ({NAME: torch.ones(64, 64)}, "is of type F32 and shape .* a matrix of I8 is expected"),
        ({QKV[0] + ".weight_format": torch.tensor(1, dtype=torch.uint8)}, "supported is 0"),
        ({NAME: torch.ones(64, 63, dtype=torch.int8)}, r"shape \(64, 63\); \(64, 64\) is expected"),
    ],
)
def test_a_matrix_of_8_bits_that_does_not_fit_is_named(
    tmp_path: Path, changes: Mapping[str, Tensor | None], message: str
) -> None:
    make_checkpoint(tmp_path / "dense", "llama")
    quantize_checkpoint(tmp_path / "dense", tmp_path, "int8")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(with_changes(tensors, changes), tmp_path / "model.safetensors")
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        load(configuration(str(tmp_path)))


def with_changes(
    tensors: Mapping[str, Tensor], changes: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    both = {**tensors, **changes}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def test_tensors_that_contradict_the_config_are_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    quantize_in_place(tensors, QKV[0])
    save_file(tensors, tmp_path / "model.safetensors")
    edit_config(tmp_path, quantization_config=four_bit_config(bnb_4bit_quant_type="fp4"))
    with pytest.raises(CheckpointError, match=f"{NAME} is nf4; config.json says fp4"):
        load(configuration(str(tmp_path)))


def test_without_bitsandbytes_only_what_is_to_be_quantized_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path / "dense", "llama")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "out", "nf4")
    monkeypatch.setattr("tokenloom.worker.weights.rounding.find_spec", lambda _: None)
    assert len(complete(configuration(str(tmp_path / "out")))) == 12
    with pytest.raises(LoadError, match="bitsandbytes is not installed"):
        load(configuration(str(tmp_path / "dense"), quantize="nf4"))
