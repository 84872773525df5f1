"""How much memory the KV pool leaves to a step."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.worker.checkpoints import make_checkpoint
from tests.worker.driver import configuration
from tokenloom.worker import loading
from tokenloom.worker.config import ModelConfig
from tokenloom.worker.kv import pool_bytes
from tokenloom.worker.memory import DENSE_BYTES, scratch_bytes
from tokenloom.worker.options import WorkerOptions
from tokenloom.worker.runner import ModelRunner
from tokenloom.worker.steps.warmup import warm_up_steps

CONFIG = ModelConfig.parse(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    }
)


def scratch(num_rows: int, num_step_tokens: int) -> int:
    return scratch_bytes(CONFIG, num_rows=num_rows, num_step_tokens=num_step_tokens, item_bytes=2)


def test_scratch_covers_the_logits_of_every_row_many_times() -> None:
    logits_bytes = 256 * CONFIG.vocab_size * 4
    assert scratch(256, 2048) > 8 * logits_bytes


def test_scratch_grows_with_rows_and_with_step_tokens() -> None:
    assert scratch(1, 512) < scratch(1, 8192) < scratch(512, 8192)


@pytest.mark.parametrize("item_bytes", [2, 4])
def test_what_is_made_dense_has_a_room_in_a_graph_and_one_outside(item_bytes: int) -> None:
    size = partial(scratch_bytes, CONFIG, num_rows=1, num_step_tokens=512, item_bytes=item_bytes)
    assert size(makes_dense=True) - size() == 2 * DENSE_BYTES


@pytest.mark.parametrize(
    ("options", "is_made_dense"),
    [
        ({"quantize": "int8", "int8_threshold": 6.0}, True),
        ({"quantize": "int8"}, False),
        ({}, False),
    ],
)
def test_matrices_whose_outliers_are_parted_are_made_dense_at_each_use(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    is_made_dense: bool,
) -> None:
    asked: list[bool] = []

    def counted(config: ModelConfig, *, makes_dense: bool, **others: int) -> int:
        asked.append(makes_dense)
        return scratch_bytes(config, makes_dense=makes_dense, **others)

    monkeypatch.setattr(loading, "scratch_bytes", counted)
    make_checkpoint(tmp_path, "llama")
    runner = ModelRunner(WorkerOptions(device="cpu", kv_cache_bytes=1024 * 1024))
    runner.configure(configuration(str(tmp_path), **options), lambda *_: None)
    assert asked == [is_made_dense]


def test_keys_and_values_in_8_bits_leave_no_room_for_an_attention_that_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []

    def counted(
        device: torch.device, *, fixed_bytes: int | None, memory_fraction: float, scratch: int
    ) -> int:
        left.append(scratch)
        return pool_bytes(
            device, fixed_bytes=fixed_bytes, memory_fraction=memory_fraction, scratch=scratch
        )

    monkeypatch.setattr(loading, "pool_bytes", counted)
    make_checkpoint(tmp_path, "llama")
    for kv_cache in ("auto", "fp8"):
        runner = ModelRunner(WorkerOptions(device="cpu", kv_cache_bytes=1024 * 1024))
        runner.configure(configuration(str(tmp_path), kv_cache=kv_cache), lambda *_: None)
    assert left[0] == left[1]


def test_a_fixed_size_is_taken_as_it_is() -> None:
    device = torch.device("cpu")
    assert pool_bytes(device, fixed_bytes=123, memory_fraction=0.5, scratch=10**12) == 123


@pytest.mark.parametrize(
    ("asked", "max_num_requests", "expected"), [(None, 4, 2048), (None, 3000, 3000), (16, 4, 16)]
)
def test_a_cpu_takes_smaller_steps_unless_asked_for_others(
    tmp_path: Path, asked: int | None, max_num_requests: int, expected: int
) -> None:
    make_checkpoint(tmp_path, "llama")
    runner = ModelRunner(WorkerOptions(device="cpu", kv_cache_bytes=1024 * 1024))
    configure = configuration(
        str(tmp_path), max_num_requests=max_num_requests, max_step_tokens=asked
    )
    assert runner.configure(configure, lambda *_: None).max_step_tokens == expected


@pytest.mark.parametrize(("max_step_tokens", "max_model_tokens"), [(1, 2), (3, 256), (2048, 5)])
def test_warming_up_keeps_to_the_smallest_limits(
    tmp_path: Path, max_step_tokens: int, max_model_tokens: int
) -> None:
    make_checkpoint(tmp_path, "llama")
    runner = ModelRunner(WorkerOptions(device="cpu", kv_cache_bytes=1024 * 1024))
    configure = msgspec.structs.replace(
        configuration(str(tmp_path)),
        max_num_requests=1,
        max_step_tokens=max_step_tokens,
        max_model_tokens=max_model_tokens,
    )
    runner.configure(configure, lambda *_: None)
    assert runner._rows is not None
    for step in warm_up_steps(configure.epoch, runner._rows.limits):
        runner.launch(step)  # raises if it goes past one


def test_warming_up_draws_rows_with_and_without_log_probabilities(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    runner = ModelRunner(WorkerOptions(device="cpu", kv_cache_bytes=1024 * 1024))
    configure = configuration(str(tmp_path))
    runner.configure(configure, lambda *_: None)
    assert runner._rows is not None
    steps = warm_up_steps(configure.epoch, runner._rows.limits)
    assert {len(runner.launch(step).result().logprobs) for step in steps} == {0, 1}
