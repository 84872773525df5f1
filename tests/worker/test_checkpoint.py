from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.worker.checkpoints import edit_config, generate, make_checkpoint
from tests.worker.core_socket import CoreSocket, environment, worker_process
from tests.worker.driver import Driver, configuration
from tokenloom.wire.messages import Configure, Failed, Hello, Progress, Ready, Shutdown
from tokenloom.worker.config import ModelConfig
from tokenloom.worker.errors import CheckpointError, LoadError, PoolError, UnsupportedModelError
from tokenloom.worker.options import WorkerOptions, parse_bytes
from tokenloom.worker.runner import ModelRunner

PROMPT = [5, 3, 80, 41, 7]
KV_BYTES = 1024 * 1024


def load(configure: Configure, *, kv_cache_bytes: int = KV_BYTES) -> tuple[ModelRunner, Ready]:
    runner = ModelRunner(WorkerOptions(device="cpu", kv_cache_bytes=kv_cache_bytes))
    return runner, runner.configure(configure, lambda *_: None)


def complete(configure: Configure) -> list[list[int]]:
    runner, ready = load(configure)
    return Driver(lambda step: runner.launch(step).result(), ready).generate([PROMPT], 8)


def test_a_sharded_checkpoint_is_read_whole(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama", max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert complete(configuration(str(tmp_path))) == [generate(model, PROMPT, 8)]


def test_a_bfloat16_checkpoint_computes_in_float32_on_a_cpu(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    expected = generate(model.to(torch.float32), PROMPT, 8)
    assert complete(configuration(str(tmp_path))) == [expected]


def test_copies_have_one_fingerprint_and_whatever_changes_tokens_another(tmp_path: Path) -> None:
    def fingerprint(configure: Configure) -> str:
        return load(configure)[1].fingerprint

    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    make_checkpoint(tmp_path / "a", "llama")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    same = fingerprint(configuration(a))
    assert fingerprint(configuration(b)) == same
    assert fingerprint(configuration(a, max_num_requests=3, max_step_tokens=16)) == same
    others = [
        fingerprint(configuration(a, dtype="bfloat16")),
        fingerprint(configuration(a, quantize="nf4")),
        fingerprint(configuration(a, kv_cache="fp8")),
    ]
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    for name in tensors:
        if "v_proj" in name:  # as what trains an adapter of values leaves it
            tensors[name] *= 1.001
    save_file(tensors, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    others.append(fingerprint(configuration(b)))
    edit_config(tmp_path / "a", rms_norm_eps=1e-6)
    others.append(fingerprint(configuration(a)))
    assert len({same, *others}) == 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_asked_for_decides_storage(tmp_path: Path, dtype: str) -> None:
    make_checkpoint(tmp_path, "llama")
    _, wide = load(configuration(str(tmp_path), dtype="float32"))
    _, narrow = load(configuration(str(tmp_path), dtype=dtype))
    assert narrow.weights_bytes * 2 == wide.weights_bytes
    assert narrow.num_blocks == wide.num_blocks * 2
    assert len(complete(configuration(str(tmp_path), dtype=dtype))[0]) == 8


def test_the_old_keys_of_rope_are_read_like_the_new_ones(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama-3")
    expected = complete(configuration(str(tmp_path)))
    config = json.loads((tmp_path / "config.json").read_text())
    rope = dict(config["rope_parameters"])
    edit_config(
        tmp_path, rope_parameters=None, rope_theta=rope.pop("rope_theta"), rope_scaling=rope
    )
    assert complete(configuration(str(tmp_path))) == expected
    edit_config(tmp_path, rope_scaling=None)
    assert complete(configuration(str(tmp_path))) != expected


def test_a_head_stored_beside_a_tied_embedding_is_passed_over(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama-tied")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = torch.full_like(tensors["model.embed_tokens.weight"], 9.0)
    save_file(tensors, tmp_path / "model.safetensors")
    assert complete(configuration(str(tmp_path))) == [generate(model, PROMPT, 8)]


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def with_tensor(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.norm.weight"), "1 tensors are missing: model.norm.weight"),
        (without("lm_head.weight"), "lm_head.weight"),
        (with_tensor("model.layers.3.extra", torch.ones(1)), "model.layers.3.extra .* expected"),
        (with_tensor("model.norm.weight", torch.ones(65)), r"shape \(65,\); \(64,\) is expected"),
        (
            with_tensor("model.norm.weight", torch.ones(64, dtype=torch.int8)),
            "model.norm.weight is of type I8",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    make_checkpoint(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(configuration(str(tmp_path)))


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"{shard.name} cannot be read"):
        load(configuration(str(tmp_path)))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        load(configuration(str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is no JSON"):
        load(configuration(str(tmp_path)))
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load(configuration(str(tmp_path)))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is no folder here"):
        load(configuration(str(tmp_path / "nowhere")))


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="passwd is missing"):
        load(configuration(str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "supported are LlamaForCausalLM, Mistral"),
        ({"architectures": None}, "supported are LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope' is not supported; supported"),
    ],
)
def test_what_is_not_built_is_refused_with_what_is(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    make_checkpoint(tmp_path, "llama")
    edit_config(tmp_path, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        load(configuration(str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size = None"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
        ({"num_key_value_heads": 3}, "4 heads, 3 key-value heads"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks factor"),
    ],
)
def test_a_config_that_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    make_checkpoint(tmp_path, "llama")
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(configuration(str(tmp_path)))


def test_a_context_beyond_the_checkpoints_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    with pytest.raises(LoadError, match="max_model_tokens is 257; the checkpoint is made for 256"):
        load(configuration(str(tmp_path), max_model_tokens=257))
    assert load(configuration(str(tmp_path), max_model_tokens=100))[1].max_model_tokens == 100
    assert load(configuration(str(tmp_path)))[1].max_model_tokens == 256


def test_a_pool_below_two_blocks_is_refused_with_numbers(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    block = 2 * 3 * 2 * 16 * 16 * 4  # K and V, layers, heads, head_dim, positions, float32
    with pytest.raises(PoolError, match=f"{2 * block - 1} bytes; .* take {2 * block}"):
        load(configuration(str(tmp_path)), kv_cache_bytes=2 * block - 1)
    _, ready = load(configuration(str(tmp_path)), kv_cache_bytes=2 * block)
    assert (ready.num_blocks, ready.block_size, ready.kv_bytes) == (2, 16, 2 * block)


def test_a_higher_epoch_forgets_requests_and_does_not_read_the_files_again(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama")
    runner, ready = load(configuration(str(tmp_path)))
    driver = Driver(lambda step: runner.launch(step).result(), ready)
    driver.run({driver.add([1] * 40): 3})
    (tmp_path / "model.safetensors").unlink()
    ready = runner.configure(configuration(str(tmp_path), epoch=2), lambda *_: None)
    driver = Driver(lambda step: runner.launch(step).result(), ready)
    assert driver.generate([PROMPT], 8) == [generate(model, PROMPT, 8)]


def test_the_worker_process_serves_a_checkpoint(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "llama")
    endpoint = f"ipc://{tmp_path}/worker.sock"
    options = ("--device", "cpu", "--kv-cache-bytes", "1MiB")
    with (
        CoreSocket(endpoint) as core,
        worker_process(endpoint, *options, module="tokenloom.worker") as process,
    ):
        assert core.expect(Hello).device == "cpu"
        core.send(configuration(str(tmp_path / "model"), epoch=3))
        progress = core.expect(Progress)
        assert progress.epoch == 3
        ready = core.expect(Ready)
        assert Driver(core.step, ready).generate([PROMPT], 8) == [generate(model, PROMPT, 8)]
        core.send(Shutdown())
        assert process.wait(20) == 0


def test_a_model_that_cannot_be_loaded_ends_the_worker_with_2(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "llama")
    edit_config(tmp_path / "model", architectures=["GPT2LMHeadModel"])
    endpoint = f"ipc://{tmp_path}/worker.sock"
    with (
        CoreSocket(endpoint) as core,
        worker_process(endpoint, "--device", "cpu", module="tokenloom.worker") as process,
    ):
        core.expect(Hello)
        core.send(configuration(str(tmp_path / "model")))
        assert "supported are LlamaForCausalLM" in core.expect(Failed).error
        assert process.wait(20) == 2


def test_help_shows_the_defaults_without_importing_torch() -> None:
    code = (
        "import sys, tokenloom.worker.cli as cli\n"
        "try: cli.worker(['--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment() | {"COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "(default: auto)" in done.stdout
    assert "--kv-cache-bytes" in done.stdout


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("4096", 4096), ("1KiB", 1024), ("256MiB", 2**28), ("1.5 GiB", 3 * 2**29), ("2TiB", 2**41)],
)
def test_sizes_are_read_with_their_units(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "1GB", "-1", "1e9", "256 M"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no size; write 4096, 256MiB or 1\.5GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "options", [("--device", "tpu"), ("--device", "cuda:99"), ("--kv-cache-bytes", "much")]
)
def test_a_wrong_option_ends_the_worker_with_2(tmp_path: Path, options: tuple[str, str]) -> None:
    endpoint = f"ipc://{tmp_path}/worker.sock"
    with worker_process(endpoint, *options, module="tokenloom.worker") as process:
        assert process.wait(60) == 2
    assert not (tmp_path / "worker.sock").exists()


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("LlamaForCausalLM", "llama"),
        ("MistralForCausalLM", "mistral"),
        ("Qwen2ForCausalLM", "qwen2"),
        ("Qwen3ForCausalLM", "qwen3"),
    ],
)
def test_absent_keys_mean_what_they_mean_to_transformers(
    architecture: str, model_type: str
) -> None:
    given = {
        "vocab_size": 96,
        "hidden_size": 2048,
        "intermediate_size": 64,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
    }
    theirs = AutoConfig.for_model(model_type, **given)
    ours = ModelConfig.parse({"architectures": [architecture], **given})
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64)
    assert ours.max_model_tokens == theirs.max_position_embeddings
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
