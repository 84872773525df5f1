"""`tokenloom quantize`: what it writes, transformers and the worker load alike."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.worker.checkpoints import (
    computing_exactly,
    edit_config,
    generate,
    load_quantized,
    make_checkpoint,
    quantize_checkpoint,
    skipped,
)
from tests.worker.driver import Driver, configuration
from tokenloom.worker.errors import CheckpointError, LoadError
from tokenloom.worker.options import WorkerOptions
from tokenloom.worker.runner import ModelRunner
from tokenloom.worker.saving import writing
from tokenloom.worker.saving.cli import quantize
from tokenloom.worker.saving.writing import QuantizeOptions, Saved, save_quantized

CPU = torch.device("cpu")
PROMPT = [5, 3, 80, 41, 7]
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def save(
    model: Path, out: Path, to: str = "nf4", *, lm_head: bool = False, nested: bool = False
) -> Saved:
    options = QuantizeOptions(to=to, lm_head=lm_head, nested=nested)
    return save_quantized(str(model), out, options, CPU, lambda _: None)


def complete(folder: Path, quantize: str = "none") -> list[int]:
    runner = ModelRunner(WorkerOptions(device="cpu", kv_cache_bytes=1024 * 1024))
    ready = runner.configure(configuration(str(folder), quantize=quantize), lambda *_: None)
    [tokens] = Driver(lambda step: runner.launch(step).result(), ready).generate([PROMPT], 12)
    return tokens


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3"])
@pytest.mark.parametrize(
    ("to", "nested"),
    [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False)],
)
def test_transformers_loads_what_was_written(
    tmp_path: Path, name: str, to: str, nested: bool
) -> None:
    make_checkpoint(tmp_path / "dense", name)
    save(tmp_path / "dense", tmp_path / "out", to, nested=nested)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    model = computing_exactly(model)
    ids = torch.tensor([PROMPT])
    if not nested:
        own = load_quantized(tmp_path / "dense", to, skipped=skipped(name, to))
        with torch.inference_mode():
            assert torch.equal(model(ids).logits, own(ids).logits)
    assert complete(tmp_path / "out") == generate(model, PROMPT, 12)
    if not nested:
        assert complete(tmp_path / "out") == complete(tmp_path / "dense", to)


@pytest.mark.parametrize("quantized", ["nf4", "nf4-nested", "int8"])
def test_the_tensors_are_those_that_transformers_saves(tmp_path: Path, quantized: str) -> None:
    make_checkpoint(tmp_path / "dense", "llama")
    quantize_checkpoint(
        tmp_path / "dense", tmp_path / "theirs", quantized, skipped=skipped("llama", quantized)
    )
    to, _, nested = quantized.partition("-")
    save(tmp_path / "dense", tmp_path / "ours", to, nested=bool(nested))
    ours, theirs = (load_file(tmp_path / each / "model.safetensors") for each in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    read = [
        json.loads((tmp_path / each / "config.json").read_text())["quantization_config"]
        for each in ("ours", "theirs")
    ]
    for config in read:
        config["llm_int8_skip_modules"].sort()
        config.pop("_load_in_4bit", None)
        config.pop("_load_in_8bit", None)
    assert [name.removeprefix("mlp.") for name in read[0].pop("llm_int8_skip_modules")] == sorted(
        read[1].pop("llm_int8_skip_modules"), key=lambda name: name != "lm_head"
    )
    assert read[0] == read[1]


def test_the_head_is_quantized_when_that_is_asked_for(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "dense", "llama")
    saved = save(tmp_path / "dense", tmp_path / "out", lm_head=True)
    assert saved.num_quantized == 3 * 6 + 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    model = computing_exactly(model)
    assert "lm_head.weight.absmax" in load_file(tmp_path / "out" / "model.safetensors")
    assert complete(tmp_path / "out") == generate(model, PROMPT, 12)


def test_large_checkpoints_are_several_files_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SHARD_BYTES", 30_000)
    make_checkpoint(tmp_path / "dense", "llama", max_shard_size="100KB")
    saved = save(tmp_path / "dense", tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == saved.num_bytes
    sizes = [sum(each.nbytes for each in load_file(path).values()) for path in files]
    assert sum(sizes) == saved.num_bytes < saved.num_read_bytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    assert complete(tmp_path / "out") == generate(computing_exactly(model), PROMPT, 12)


def test_all_but_weights_and_config_is_copied(tmp_path: Path) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    make_checkpoint(dense, "llama", max_shard_size="100KB")
    for name in ("tokenizer.json", "chat_template.jinja", "merges.txt", "LICENSE"):
        (dense / name).write_text(name)
    (dense / "pytorch_model.bin").write_text("not wanted")
    save(dense, out)
    assert (out / "tokenizer.json").read_text() == "tokenizer.json"
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "chat_template.jinja", "merges.txt", "LICENSE"),
    }


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "dense", "llama")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(LoadError, match="out cannot be written: no space left"):
        save(tmp_path / "dense", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_weights_that_find_no_room_leave_nothing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "dense", "llama")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(LoadError, match=r"out cannot be written: .*File too large"):
            save(tmp_path / "dense", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "dense", "llama")
    make_checkpoint(tmp_path / "tied", "llama-tied")
    make_checkpoint(tmp_path / "wide", "llama")
    edit_config(tmp_path / "wide", dtype="float64")
    save(tmp_path / "dense", tmp_path / "nf4")
    for model, out, options, message in (
        ("dense", "nf4", {}, "nf4 exists already"),
        ("nf4", "out", {}, "nf4 is quantized to nf4 already"),
        ("tied", "out", {"lm_head": True}, "are one matrix"),
        ("dense", "out", {"to": "int8", "nested": True}, "nested is about the scales of 4 bits"),
        ("wide", "out", {}, "dtype float64 is not supported; supported are bfloat16"),
        ("none", "out", {}, "none is no folder here"),
    ):
        with pytest.raises(LoadError, match=message):
            save(tmp_path / model, tmp_path / out, **options)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({K_PROJ: None}, f"1 tensors are missing: {K_PROJ}"),
        ({"model.norm.weight": None}, "1 tensors are missing: model.norm.weight"),
        ({K_PROJ: torch.ones(8, 64)}, r"has shape \(8, 64\); \(\d+, 64\) is expected"),
        ({"model.norm.weight": torch.ones(64, dtype=torch.int32)}, "is of type I32; weights are"),
        ({"model.extra.weight": torch.ones(1)}, "tensor model.extra.weight is not expected"),
    ],
)
def test_a_checkpoint_that_is_not_as_its_config_says_is_refused(
    tmp_path: Path, name: str, changes: Mapping[str, torch.Tensor | None], message: str
) -> None:
    make_checkpoint(tmp_path / "dense", name)
    path = tmp_path / "dense" / "model.safetensors"
    changed = {**load_file(path), **changes}
    save_file({each: value for each, value in changed.items() if value is not None}, path)
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_tells_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(tmp_path / "dense", "llama")
    arguments = [str(tmp_path / "dense"), str(tmp_path / "out"), "--to", "int8", "--device", "cpu"]
    assert quantize(arguments) == 0
    assert "21 matrices in int8" in capsys.readouterr().out
    assert quantize(arguments) == 2
    assert "out exists already" in capsys.readouterr().err
