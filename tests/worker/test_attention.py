"""The readable backend against attention written out position by position; the others on a CPU."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.worker import attention_cases, flash2_stand_in, kernel_cases
from tests.worker.attention_cases import AttentionCase, make_case
from tokenloom.worker.attention import Pages, Spans, choose, choose_attention
from tokenloom.worker.attention.choose import SplitAttention
from tokenloom.worker.attention.flash import FlashAttention2
from tokenloom.worker.attention.reference import ReferenceAttention
from tokenloom.worker.errors import LoadError
from tokenloom.worker.options import ATTENTION_NAMES

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


def written_out(case: AttentionCase, window: int | None) -> Tensor:
    """Returns what each query should see, from the case's own dense keys and values."""
    num_heads, num_kv_heads = case.queries.shape[1], case.keys[0].shape[1]
    rows = []
    token = 0
    for span, (start, length) in enumerate(case.spans):
        for position in range(start, start + length):
            first = 0 if window is None else max(0, position + 1 - window)
            heads = []
            for head in range(num_heads):
                group = head // (num_heads // num_kv_heads)
                keys = case.keys[span][first : position + 1, group].double()
                values = case.values[span][first : position + 1, group].double()
                scores = keys @ case.queries[token, head].double()
                heads.append((scores / math.sqrt(keys.shape[1])).softmax(0) @ values)
            rows.append(torch.stack(heads))
            token += 1
    return torch.stack(rows)


SPANS: dict[str, Sequence[tuple[int, int]]] = {
    "one decode": [(12, 1)],
    "the very first token": [(0, 1)],
    "decodes of many lengths": [(0, 1), (3, 1), (4, 1), (5, 1), (31, 1), (64, 1), (200, 1)],
    "prefills": [(0, 5), (0, 16), (0, 17)],
    "chunks in the middle": [(7, 9), (16, 16), (33, 3)],
    "places left empty": [(7, 1), (0, 0), (0, 0), (5, 9), (0, 0)],
    "all kinds": [(0, 40), (21, 1), (8, 7), (100, 1), (0, 2), (22, 1), (50, 33)],
}


@pytest.mark.parametrize("window", [None, 1, 5, 300])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", SPANS)
def test_every_token_sees_its_positions(name: str, num_kv_heads: int, window: int | None) -> None:
    attention = ReferenceAttention(block_size=8)
    case = make_case(SPANS[name], num_heads=4, num_kv_heads=num_kv_heads, head_dim=8, block_size=8)
    mixed = attention.attend(case.pages, 0, case.queries, case.step, window)
    torch.testing.assert_close(mixed.double(), written_out(case, window), atol=1e-5, rtol=1e-5)


def test_a_request_does_not_see_what_lies_behind_its_end() -> None:
    attention = ReferenceAttention(block_size=8)
    spans = SPANS["all kinds"]
    case = make_case(spans, num_heads=2, num_kv_heads=1, head_dim=8, block_size=8, rest=0.0)
    other = make_case(spans, num_heads=2, num_kv_heads=1, head_dim=8, block_size=8, rest=1e4)
    one = attention.attend(case.pages, 0, case.queries, case.step, None)
    two = attention.attend(other.pages, 0, other.queries, other.step, None)
    torch.testing.assert_close(one, two)


def test_a_step_is_parted_into_its_decodes_and_the_others_without_a_copy() -> None:
    spans = [(12, 1), (40, 1), (0, 30), (7, 1), (5, 9)]
    step = make_case(spans, num_heads=1, num_kv_heads=1, head_dim=8, block_size=8).step
    assert step.decodes.kv_lengths.tolist() == [13, 41]
    assert step.decodes.offsets.tolist() == [0, 1, 2]
    assert (step.decodes.num_decodes, step.decodes.max_length) == (2, 1)
    assert step.others.kv_lengths.tolist() == [30, 8, 14]
    assert step.others.offsets.tolist() == [2, 32, 33, 42]
    assert step.others.num_decodes == 0
    assert step.others.block_tables.data_ptr() == step.block_tables[2:].data_ptr()
    assert step.others is step.others  # once for all layers
    assert step.others.kv_offsets.tolist() == [0, 30, 38, 52]


@pytest.mark.parametrize("name", ["decodes", "prefills", "decodes and chunks", "places left empty"])
def test_two_backends_share_a_step(name: str) -> None:
    case = make_case(
        attention_cases.SPANS[name], num_heads=4, num_kv_heads=2, head_dim=8, block_size=16
    )
    attention = SplitAttention(_Decoding(16), ReferenceAttention(block_size=16))
    kernel_cases.assert_attends_like_its_twin(attention, case, 100)


class _Decoding:
    """The readable backend for decodes alone."""

    name = "readable"

    def __init__(self, block_size: int) -> None:
        self._reference = ReferenceAttention(block_size)

    def attend(
        self,
        pages: Pages,
        layer: int,
        queries: Tensor,
        spans: Spans,
        window: int | None,
        mixed: Tensor,
    ) -> None:
        assert spans.num_decodes == spans.num_spans
        tokens = slice(int(spans.offsets[-1]))  # the last spans may be empty
        mixed[tokens] = self._reference.attend(pages, layer, queries[tokens], spans, window)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", flash2_stand_in.module())


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("name", attention_cases.SPANS)
def test_flash2_is_called_as_its_interface_says(name: str, window: int | None) -> None:
    flash = FlashAttention2()
    case = make_case(
        attention_cases.SPANS[name],
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        block_size=flash.block_size,
        dtype=torch.float16,
        rest=1e4,
    )
    for attention in (flash, SplitAttention(_Decoding(256), flash)):
        kernel_cases.assert_attends_like_its_twin(attention, case, window)


class _Obstacles:
    """Sets what stands in the way of each backend, as `choose` sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def are(self, **obstacles: str | None) -> None:
        for name, obstacle in obstacles.items():
            prefix = "_why_not_" if name == "triton" else "why_not_"
            self._monkeypatch.setattr(
                choose, prefix + name, lambda *_, obstacle=obstacle, **__: obstacle
            )


@pytest.fixture
def obstacles(monkeypatch: pytest.MonkeyPatch) -> _Obstacles:
    return _Obstacles(monkeypatch)


def chosen(name: str, device: str = "cuda") -> str:
    return choose_attention(
        name, head_dim=128, dtype=torch.bfloat16, device=torch.device(device)
    ).name


def test_a_cpu_gets_the_readable_backend_and_says_why_not_another() -> None:
    assert chosen("auto", "cpu") == "torch"
    assert chosen("torch", "cpu") == "torch"
    for name in set(ATTENTION_NAMES) - {"auto", "torch"}:
        with pytest.raises(LoadError, match=f"{name} is not possible: it needs a CUDA device"):
            chosen(name, "cpu")


@needs_triton
@pytest.mark.usefixtures("flash_attn")
def test_where_flash2_is_what_is_installed_it_serves_all_but_decodes(obstacles: _Obstacles) -> None:
    obstacles.are(flash4="not installed", flash2=None, triton=None)
    assert chosen("auto") == "flash2, triton for decodes"
    assert chosen("flash2") == "flash2"
    assert chosen("triton") == "triton"


@needs_triton
def test_without_a_flash_package_triton_serves_and_the_log_says_why(
    obstacles: _Obstacles, caplog: pytest.LogCaptureFixture
) -> None:
    obstacles.are(flash4="not for this chip", flash2="not installed", triton=None)
    with caplog.at_level(logging.INFO):
        assert chosen("auto") == "triton"
    assert [record.getMessage() for record in caplog.records] == [
        "attention flash4 is not possible: not for this chip",
        "attention flash2 is not possible: not installed",
    ]


@needs_triton
@pytest.mark.usefixtures("flash_attn")
def test_only_flash_needs_room_beside_keys_and_values_in_8_bits(obstacles: _Obstacles) -> None:
    obstacles.are(flash4="not for this chip", flash2=None, triton=None)

    def num_widened(name: str, device: str = "cuda") -> int:
        return choose_attention(
            name,
            head_dim=128,
            dtype=torch.bfloat16,
            device=torch.device(device),
            num_widened=1000,
        ).num_widened

    assert num_widened("auto") == num_widened("flash2") == 1024  # whole blocks of 256
    assert num_widened("triton") == num_widened("torch") == 0
    obstacles.are(flash2="not installed")
    assert num_widened("auto") == 0


@pytest.mark.usefixtures("flash_attn")
def test_without_triton_flash_serves_decodes_too(obstacles: _Obstacles) -> None:
    obstacles.are(flash4="not installed", flash2=None, triton="not installed")
    assert chosen("auto") == "flash2"
    obstacles.are(flash2="too old")
    assert chosen("auto") == "torch"


@needs_triton
def test_triton_kernels_agree_with_their_twin_in_the_interpreter() -> None:
    cases = Path(__file__).with_name("interpreted_attention.py")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout
