"""The command `tokenloom plan`: what it reads, prints and refuses."""

from __future__ import annotations

import http.server
import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.worker.checkpoints import edit_config, make_checkpoint
from tests.worker.core_socket import environment
from tokenloom.worker.plan.cli import plan

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
MODEL = "meta-llama/Llama-3.1-8B"


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 16 GB of which only the headers take room: the rest is a hole."""
    folder = tmp_path_factory.mktemp("hub") / MODEL
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    shapes = {"model.embed_tokens": (128256, 4096), "lm_head": (128256, 4096)}
    for layer in range(32):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj": (4096, 4096) for name in "qo"}
        shapes |= {f"{prefix}.self_attn.{name}_proj": (1024, 4096) for name in "kv"}
        shapes |= {f"{prefix}.mlp.{name}_proj": (14336, 4096) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj"] = (4096, 14336)
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        first, end = end, end + 2 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [first, end]}
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    status = plan([str(each) for each in argv])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


TABLE = """\
a token's keys and values take 128 KiB in bfloat16, 66 KiB in fp8

weights          GiB  GPU  KV GiB  tokens  requests  fp8: tokens  requests  tok/s × 1  × 4  × 16
bfloat16       14.96   L4    3.22  26,368         6       51,200        12         17   63     –
int8            8.46   L4    9.19  75,264        18      146,048        35         31  106   259
nf4             5.61   L4   11.34  92,928        22      180,352        44         49  151   317
nf4, head too   4.91   L4   12.00  98,304        24      190,720        46         56  169   336

requests: as many as fit at once with 4,096 tokens each, up to 256
tok/s: the most that memory bandwidth allows for so many such requests, KV in bfloat16
"""


def test_the_table_answers_which_precision_where_and_for_how_many(
    llama_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, table, _ = run(capsys, llama_8b)
    first, _, others = table.partition("\n")
    assert first.endswith(
        "LlamaForCausalLM, 8.03 billion weights, contexts of up to 131,072 tokens"
    )
    assert others == TABLE
    assert status == 0


def test_what_does_not_fit_is_told_with_what_would_do(
    llama_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, table, _ = run(capsys, llama_8b, "--memory", "12GiB")
    assert status == 0  # some precision fits
    assert "bfloat16 does not fit: 12GiB lacks 7.07 GiB for one request" in table
    assert "; 2 × 12GiB or L4 would do" in table
    status, table, _ = run(capsys, llama_8b, "--memory", "12GiB", "--quantize", "none")
    assert status == 1
    status, table, _ = run(
        capsys, llama_8b, "--gpu", "rtx-4090", "--context", "131072", "--quantize", "nf4"
    )
    assert status == 1
    assert "nf4 does not fit: RTX 4090 lacks" in table
    assert "2 × RTX 4090 or RTX 5090 would do" in table


def test_json_has_the_figures_under_their_names_and_units(
    llama_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text, _ = run(capsys, llama_8b, "--json", "--gpu", "H200", "--quantize", "nf4")
    assert status == 0
    answer = json.loads(text)
    (row,) = answer.pop("rows")
    pools = row.pop("pools")
    assert answer == {
        "model": str(llama_8b),
        "architecture": "LlamaForCausalLM",
        "num_weights": 8030261248,
        "max_model_tokens": 131072,
        "stored": None,
        "unquantized_bytes": 16060522496,
        "kv_bytes_per_token": {"bfloat16": 131072, "fp8": 67584},
        "serving": {
            "dtype": "bfloat16",
            "kv_types": ["bfloat16", "fp8"],
            "context_tokens": 4096,
            "num_ranks": 1,
            "max_model_tokens": None,
            "max_num_requests": 256,
            "max_step_tokens": None,
            "kv_memory_fraction": 0.92,
        },
    }
    assert row.pop("gpu")["name"] == "H200"
    assert row == {
        "precision": "nf4",
        "weights_bytes": 6027747328,
        "weights": {"layers": 3926401024, "embedding": 1050673152, "head": 1050673152},
        "smallest": {"gpu": "L4", "num_gpus": 1},
        "num_gpus": 1,
        "obstacle": None,
        "lacking_bytes": 0,
        "least_num_gpus": 1,
        "fits": True,
    }
    assert [pool["kv_type"] for pool in pools] == ["bfloat16", "fp8"]
    for pool in pools:
        assert pool["num_tokens"] == 128 * pool["num_blocks"]
        assert set(pool["tokens_per_s"]) == {"1", "4", "16"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tensor-parallel", "3"), "--tensor-parallel 3 cannot be: 32 attention heads"),
        (("--context", "200000"), "--context is 200000; the checkpoint is made for 131072"),
        (("--max-model-tokens", "131073"), "131073; the checkpoint is made for 131072"),
        (
            ("--max-model-tokens", "8192", "--context", "8193"),
            "--context is 8193; --max-model-tokens is 8192",
        ),
        (("--dtype", "float8"), "dtype float8 is not supported"),
        (("--quantize", "none", "--quantize-lm-head"), "--quantize-lm-head is set, but neither"),
    ],
)
def test_what_the_server_would_refuse_is_refused(
    llama_8b: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    status, table, said = run(capsys, llama_8b, *options)
    assert (status, table) == (2, "")
    assert message in said


def test_shorter_requests_leave_more_for_the_pool_in_8_bits(
    llama_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (llama_8b, "--json", "--gpu", "H200", "--quantize", "nf4", "--kv-cache", "fp8")
    sizes = []
    for options in ((), ("--max-model-tokens", "2048")):
        (row,) = json.loads(run(capsys, *asked, *options)[1])["rows"]
        sizes.append(row["pools"][0]["num_bytes"])
    # What is widened of a layer's keys and values, 4,096 bytes a position.
    saved, block_bytes = 0.92 * (131_072 - 2048) * 4096, 128 * 67_584
    assert sizes[1] - sizes[0] == pytest.approx(saved, abs=block_bytes)


def test_a_request_is_planned_no_longer_than_it_may_be(
    llama_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run(capsys, llama_8b, "--max-model-tokens", "2048")[1]
    assert "as fit at once with 2,048 tokens each" in text


def test_an_unknown_gpu_is_answered_with_the_known_ones(
    llama_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(capsys, llama_8b, "--gpu", "H300")
    assert exit_info.value.code == 2
    assert "'H300' is not in the list: T4, L4, A10G" in capsys.readouterr().err


# Checkpoints that contradict themselves.


def test_a_checkpoint_that_is_not_as_its_config_says_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(tmp_path, "llama")
    edit_config(tmp_path, num_hidden_layers=4)
    assert "tensor model.layers.3.self_attn.q_proj.weight is missing" in run(capsys, tmp_path)[2]
    edit_config(tmp_path, num_hidden_layers=3, intermediate_size=128)
    assert "mlp.gate_proj.weight has shape (96, 64); (128, 64)" in run(capsys, tmp_path)[2]
    (tmp_path / "model.safetensors").unlink()
    assert "model.safetensors is missing" in run(capsys, tmp_path)[2]


# Checkpoints that bitsandbytes quantized.


def store_quantized(
    folder: Path,
    store: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
    *,
    to: str = "nf4",
) -> None:
    """Rewrites a small checkpoint as transformers saves it: its layers' matrices in parts."""
    make_checkpoint(folder, "llama")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        is_quantized = name.endswith("_proj.weight")
        tensors |= store(name, tensor) if is_quantized else {name: tensor}
    save_file(tensors, folder / "model.safetensors")
    how: dict[str, object] = {"load_in_4bit": True, "bnb_4bit_quant_type": to}
    if to == "int8":
        how = {"load_in_8bit": True}
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", **how})


def four_bit(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    num_blocks = -(-tensor.numel() // 64)
    return {
        name: torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8),
        f"{name}.absmax": torch.zeros(num_blocks, dtype=torch.uint8),  # nested
        f"{name}.nested_absmax": torch.zeros(-(-num_blocks // 256)),
        f"{name}.quant_map": torch.zeros(16),
        f"{name}.nested_quant_map": torch.zeros(256),
        f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    }


def eight_bit(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros(tensor.shape, dtype=torch.int8),
        name.replace(".weight", ".SCB"): torch.zeros(tensor.shape[0]),
    }


def told(capsys: pytest.CaptureFixture[str], *argv: object) -> Any:  # noqa: ANN401 - JSON
    status, text, said = run(capsys, *argv, "--json", "--dtype", "bfloat16")
    assert status == 0, said
    return json.loads(text)


def matrix_bytes(capsys: pytest.CaptureFixture[str], folder: Path, quantize: str) -> int:
    (row,) = told(capsys, folder, "--quantize", quantize)["rows"]
    return int(row["weights_bytes"])


@pytest.mark.parametrize(("label", "store"), [("nf4", four_bit), ("int8", eight_bit)])
def test_a_quantized_checkpoint_is_planned_as_it_is_stored(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    label: str,
    store: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    make_checkpoint(plain, "llama")
    store_quantized(quantized, store, to=label)
    answer = told(capsys, quantized)
    assert (answer["stored"], len(answer["rows"])) == (label, 1)
    assert answer["rows"][0]["weights_bytes"] == matrix_bytes(capsys, plain, label)
    assert answer["unquantized_bytes"] == matrix_bytes(capsys, plain, "none")
    assert f"stored in {label}" in run(capsys, quantized)[1]


def test_what_a_quantized_checkpoint_left_dense_is_planned_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def all_but_one(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        is_skipped = name == "model.layers.1.self_attn.o_proj.weight"
        return {name: tensor} if is_skipped else four_bit(name, tensor)

    whole, skipping = tmp_path / "whole", tmp_path / "skipping"
    store_quantized(whole, four_bit)
    store_quantized(skipping, all_but_one)
    sizes = [told(capsys, each)["rows"][0]["weights_bytes"] for each in (whole, skipping)]
    assert sizes[1] - sizes[0] == 64 * 64 * 2 - 64 * 64 * 9 // 16


def test_a_head_may_be_quantized_beside_a_quantized_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store_quantized(tmp_path, four_bit)
    (row,) = told(capsys, tmp_path, "--quantize-lm-head")["rows"]
    assert row["precision"] == "nf4, head too"
    assert row["weights"]["head"] == 96 * 64 * 9 // 16


def test_what_is_quantized_already_stays_so_without_quantizing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store_quantized(tmp_path, four_bit)
    assert told(capsys, tmp_path, "--quantize", "none") == told(capsys, tmp_path)


def test_another_quantization_than_the_stored_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store_quantized(tmp_path, four_bit)
    status, _, said = run(capsys, tmp_path, "--quantize", "int8")
    assert status == 2
    assert "--quantize is int8; the checkpoint is stored in nf4 already" in said
    edit_config(tmp_path, quantization_config={"quant_method": "gptq"})
    assert "quantized by 'gptq'" in run(capsys, tmp_path)[2]


def test_matrices_that_contradict_the_config_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store_quantized(tmp_path, four_bit, to="fp4")
    assert "says that matrices are fp4; they are nf4" in run(capsys, tmp_path)[2]
    make_checkpoint(tmp_path, "llama")
    edit_config(tmp_path, quantization_config={"load_in_8bit": True})
    assert "says that matrices are int8; they are dense" in run(capsys, tmp_path)[2]


# From the Hub.


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Serves folders as the Hub does; yields its address and the bytes of each answer."""
    served: list[int] = []

    class Repositories(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = folder / self.path.replace("/resolve/main", "").lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            size = path.stat().st_size
            first, last = 0, size - 1
            if (asked := self.headers.get("range")) is not None:
                first, last = (int(each) for each in asked.removeprefix("bytes=").split("-"))
            body = b""
            if with_body:
                with path.open("rb") as file:
                    file.seek(first)
                    body = file.read(last + 1 - first)
                served.append(len(body))
            self.send_response(200 if asked is None else 206)
            self.send_header("ETag", '"some"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(body) if with_body else size))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Repositories) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", served
        server.shutdown()


def plan_from_hub(address: str, home: Path) -> subprocess.CompletedProcess[str]:
    variables = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tokenloom.worker.plan", MODEL],
        env=environment() | variables | {"NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_from_the_hub_come_headers_and_no_weights(llama_8b: Path, tmp_path: Path) -> None:
    with hub(llama_8b.parents[1]) as (address, served):
        done = plan_from_hub(address, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(TABLE)
    assert sum(served) < 200_000 < (llama_8b / "model.safetensors").stat().st_size


def test_a_hub_that_cannot_be_reached_is_an_error_that_says_so(tmp_path: Path) -> None:
    done = plan_from_hub("http://127.0.0.1:9", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{MODEL} is no folder here and cannot be read from the Hub" in done.stderr
    assert "Traceback" not in done.stderr
