"""Quantized weights on CUDA: bitsandbytes' own codes, no second copy, the tokens of a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.worker.checkpoints import edit_config, make_checkpoint
from tests.worker.driver import Driver, configuration
from tests.worker.test_parity import random_prompt
from tests.worker.test_quantized import QKV, assert_same, load_weights, whole
from tokenloom.worker.loading import LoadedModel, load_model
from tokenloom.worker.options import WorkerOptions
from tokenloom.worker.ranks import ALONE
from tokenloom.worker.runner import ModelRunner
from tokenloom.worker.saving.writing import QuantizeOptions, save_quantized
from tokenloom.worker.weights.formats import EightBits, FourBits
from tokenloom.worker.weights.rounding import load_bitsandbytes, quantized

CUDA = torch.device("cuda", 0)
KV_BYTES = 32 * 1024 * 1024


def load(folder: Path, quantize: str, dtype: str = "bfloat16") -> LoadedModel:
    options = WorkerOptions(device="cuda", attention="triton", kv_cache_bytes=KV_BYTES)
    configure = configuration(str(folder), dtype=dtype, quantize=quantize)
    with (
        torch.inference_mode(),
        load_model(configure, options, CUDA, lambda *_: None, lambda: ALONE) as loaded,
    ):
        return loaded


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_codes_are_those_of_bitsandbytes_on_cuda(tmp_path: Path, quantize: str) -> None:
    make_checkpoint(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    parts = torch.cat([tensors[f"{name}.weight"] for name in QKV]).to(CUDA, torch.bfloat16)
    layers = load(tmp_path, quantize).decoder._weights.layers
    assert_same(layers[1].qkv, whole(parts, quantize))


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_quantizing_waits_for_what_its_stream_still_writes(quantize: str) -> None:
    load_bitsandbytes()
    formats = {"nf4": FourBits(codebook="nf4"), "fp4": FourBits(codebook="fp4")}
    wanted = formats.get(quantize, EightBits())
    values = torch.randn(512, 1024, dtype=torch.bfloat16, device=CUDA)
    expected = quantized(values, wanted)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        late = torch.zeros_like(values)
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
        late.copy_(values)
        found = quantized(late, wanted)
        copied = replace(found, codes=found.codes.clone())
        torch.cuda.current_stream().synchronize()
    assert_same(copied, expected)


def test_nested_scales_are_made_float32_as_on_a_cpu(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "dense", "llama")
    options = QuantizeOptions(to="nf4", nested=True)
    cpu = torch.device("cpu")
    save_quantized(str(tmp_path / "dense"), tmp_path / "out", options, cpu, lambda _: None)
    expected = load_weights(tmp_path / "out", dtype="bfloat16").layers[1].output
    assert_same(load(tmp_path / "out", "none").decoder._weights.layers[1].output, expected)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_loading_takes_little_beside_the_weights(tmp_path: Path, quantize: str) -> None:
    make_checkpoint(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.{}.mlp.{}_proj.weight"
    for layer in range(3):  # 2.25 GiB in bfloat16
        for part in ("gate", "up"):
            tensors[name.format(layer, part)] = torch.randn(2**21, 64, dtype=torch.bfloat16)
        tensors[name.format(layer, "down")] = torch.zeros(64, 2**21, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    edit_config(tmp_path, intermediate_size=2**21)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = load(tmp_path, quantize)
    beside = torch.cuda.max_memory_allocated() - before - loaded.weights_bytes - KV_BYTES
    assert loaded.weights_bytes < 0.6 * 9 * 2**28
    assert beside < 2**29


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [
        QuantizeOptions(to="nf4"),
        QuantizeOptions(to="nf4", nested=True),
        QuantizeOptions(to="fp4"),
    ],
    ids=repr,
)
def test_a_quantized_checkpoint_gives_the_tokens_of_a_cpu(
    tmp_path: Path, name: str, options: QuantizeOptions
) -> None:
    make_checkpoint(tmp_path / "dense", name)
    cpu = torch.device("cpu")
    save_quantized(str(tmp_path / "dense"), tmp_path / "out", options, cpu, lambda _: None)
    prompts = [random_prompt(length) for length in (1, 17, 40, 75)]

    def run(device: str) -> list[list[int]]:
        runner = ModelRunner(WorkerOptions(device=device, kv_cache_bytes=KV_BYTES))
        configure = configuration(str(tmp_path / "out"), dtype="float32")
        ready = runner.configure(configure, lambda *_: None)
        driver = Driver(lambda step: runner.launch(step).result(), ready)
        return driver.generate(prompts, 20, chunk=16)

    assert run("cuda") == run("cpu")
