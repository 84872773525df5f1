"""A model on 1, 2 and 4 ranks, each a process: the same tokens, whatever it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.worker.checkpoints import (
    generate,
    load_quantized,
    make_checkpoint,
    quantize_checkpoint,
)
from tests.worker.driver import Driver, configuration, ints, sampling
from tests.worker.group import Group, RankFailed
from tests.worker.test_parity import clear_prompt
from tokenloom.wire.messages import StepDone
from tokenloom.worker.errors import LoadError, MeetingError
from tokenloom.worker.options import WorkerOptions, host_towards
from tokenloom.worker.ranks.meeting import Meeting
from tokenloom.worker.runner import ModelRunner

POCKET = Path(__file__).parents[2] / "models" / "pocket"
NUM_TOKENS = 12
WIDE: dict[str, Any] = {"head_dim": 64, "intermediate_size": 256, "vocab_size": 97}
"""Of which each of 4 ranks has whole blocks of 64, and an odd number of tokens."""


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    with Group(4) as started:
        yield started


@dataclass(frozen=True, kw_only=True)
class Subject:
    folder: Path
    quantize: str
    prompts: list[list[int]]
    expected: list[list[int]]
    """Greedy completions by transformers."""

    def driver(self, group: Group, num_ranks: int) -> Driver:
        configure = configuration(str(self.folder), quantize=self.quantize, max_num_requests=16)
        ready = group.configure(configure, num_ranks)
        return Driver(group.step, ready[0])


CASES = {
    "llama": ("llama", "none", None),
    "llama-bias": ("llama-bias", "none", None),
    "llama-tied": ("llama-tied", "none", None),
    "mistral-window": ("mistral-window", "none", None),
    "qwen2": ("qwen2", "none", None),
    "qwen3": ("qwen3", "none", None),
    "llama in nf4": ("llama", "nf4", None),
    "qwen3 in nf4": ("qwen3", "nf4", None),
    "llama stored in nf4": ("llama", "none", "nf4"),
    "llama-bias stored in nested nf4": ("llama-bias", "none", "nf4-nested"),
    "llama stored in int8": ("llama", "none", "int8"),
}
"""Checkpoint, what it is quantized to while it loads, what it is stored in."""


@pytest.fixture(scope="module", params=CASES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    torch.set_num_threads(1)
    name, quantize, stored = CASES[request.param]
    folder = tmp_path_factory.mktemp(name)
    model = make_checkpoint(folder, name, **WIDE)
    if quantize != "none":
        model = load_quantized(folder, quantize, skipped=["lm_head"])
    if stored is not None:
        out = folder / "out"
        model = quantize_checkpoint(folder, out, stored, skipped=["lm_head"])
        folder = out
    prompts = [clear_prompt(model, length) for length in (1, 17, 40)]
    return Subject(
        folder=folder,
        quantize=quantize,
        prompts=prompts,
        expected=[generate(model, prompt, NUM_TOKENS) for prompt in prompts],
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_greedy_output_is_that_of_transformers(
    group: Group, subject: Subject, num_ranks: int
) -> None:
    driver = subject.driver(group, num_ranks)
    assert driver.generate(subject.prompts, NUM_TOKENS, chunk=13) == subject.expected
    assert driver.generate(subject.prompts[:1], NUM_TOKENS) == subject.expected[:1]


PARAMS = {
    "plain": [
        sampling(temperature=1.1, seed=5),
        sampling(temperature=0.8, top_p=0.9, seed=6),
        sampling(),
        sampling(temperature=1.3, top_k=20, min_p=0.02, seed=2**63 + 1),
        sampling(temperature=0.7, seed=8),
    ],
    "edited": [
        sampling(temperature=0.9, presence_penalty=0.6, seed=1),
        sampling(repetition_penalty=1.4, frequency_penalty=0.3),
        sampling(temperature=1.0, logit_bias=((96, 4.0), (3, -5.0)), seed=2),
        sampling(temperature=1.2, min_tokens=6, stop_token_ids=tuple(range(40)), seed=3),
        sampling(temperature=0.6, top_p=0.8, seed=4),
    ],
    "with logprobs": [
        sampling(temperature=1.0, seed=1),
        sampling(num_top_logprobs=3),
        sampling(temperature=0.9, seed=2),
        sampling(temperature=0.9, seed=2, num_top_logprobs=0),
        sampling(temperature=1.0, top_k=5, seed=3, num_top_logprobs=5),
    ],
}
"""A step's five rows are divided 3 and 2 among two ranks; the last of four has none."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    completions: list[list[int]]
    last: StepDone


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint(folder, "llama", **WIDE)
    return folder


def draw(group: Group, folder: Path, num_ranks: int, kind: str) -> Drawn:
    configure = configuration(str(folder), max_num_requests=8)
    driver = Driver(group.step, group.configure(configure, num_ranks)[0])
    prompts = [[(7 * row + at) % 97 for at in range(3 + 5 * row)] for row in range(5)]
    completions = driver.generate(prompts, NUM_TOKENS, PARAMS[kind], chunk=11)
    assert driver.last is not None
    return Drawn(completions=completions, last=driver.last)


@pytest.mark.parametrize("kind", PARAMS)
def test_seeded_output_does_not_depend_on_the_ranks(group: Group, llama: Path, kind: str) -> None:
    alone = draw(group, llama, 1, kind)
    for num_ranks in (2, 4):
        together = draw(group, llama, num_ranks, kind)
        assert together.completions == alone.completions
        assert_same_logprobs(together.last, alone.last)


def assert_same_logprobs(found: StepDone, expected: StepDone) -> None:
    assert len(found.logprobs) == len(expected.logprobs)
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert (one.row, one.top_ids) == (other.row, other.top_ids)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_pocket_model_says_the_same_on_any_number_of_ranks(group: Group, quantize: str) -> None:
    prompts = [[1, *range(300, 340)], [1, 17, 230, 512], [1, *range(600, 900, 3)]]
    params = [sampling(), sampling(temperature=0.9, top_p=0.95, seed=11), sampling()]
    found = []
    for num_ranks in (1, 2, 4):
        configure = configuration(str(POCKET), quantize=quantize, max_num_requests=4)
        driver = Driver(group.step, group.configure(configure, num_ranks)[0])
        found.append(driver.generate(prompts, 24, params, chunk=64))
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_ranks_agree_on_what_they_can_hold(group: Group, llama: Path) -> None:
    configure = configuration(str(llama), max_num_requests=8)
    [alone] = group.configure(configure, 1)
    ready = group.configure(configure, 4)
    sizes = {(each.num_blocks, each.vocab_size, each.max_step_tokens) for each in ready}
    assert len(sizes) == 1
    # A rank has one of the two key-value heads, and the last rank the smallest pool.
    assert 1.9 * alone.num_blocks < ready[0].num_blocks <= 2 * alone.num_blocks
    assert {each.kv_bytes for each in ready} != {ready[0].kv_bytes}
    assert sum(each.weights_bytes for each in ready) > alone.weights_bytes
    assert max(each.weights_bytes for each in ready) < 0.3 * alone.weights_bytes


def test_a_row_that_is_not_finite_fails_alone_wherever_it_is_drawn(
    group: Group, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, "llama", **WIDE)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][50] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    configure = configuration(str(tmp_path), max_num_requests=8)
    driver = Driver(group.step, group.configure(configure, 2)[0])
    for bad in range(5):
        slots = [driver.add([3, 50 if row == bad else 9, 20 + row]) for row in range(5)]
        tokens = driver.step(dict.fromkeys(slots, 3))
        assert driver.last is not None
        assert ints(driver.last.faulty_rows) == [bad]
        assert tokens[slots[bad]] == 0
        for slot in slots:
            driver.release(slot)


def test_a_refusal_says_how_many_ranks_would_do(group: Group, llama: Path) -> None:
    refused = configuration(str(llama), quantize="nf4")
    with pytest.raises(RankFailed, match=r"LoadError: .* 3 ranks: 4 attention .* by 1, 2, 4"):
        group.configure(refused, 3)
    assert len(group.configure(refused, 2)) == 2


def test_a_group_is_made_anew_for_each_epoch(group: Group, llama: Path) -> None:
    first, second = (draw(group, llama, 2, "plain") for _ in range(2))
    assert first.completions == second.completions


def test_a_worker_without_a_host_serves_alone(llama: Path) -> None:
    runner = ModelRunner(WorkerOptions(device="cpu"))
    assert runner.address == ""
    configure = configuration(str(llama), num_ranks=2, rendezvous="127.0.0.1:1")
    with pytest.raises(LoadError, match="world_size is 2; this worker serves alone"):
        runner.configure(configure, lambda *_: None)


def test_what_is_no_place_to_meet_is_named(llama: Path) -> None:
    runner = ModelRunner(WorkerOptions(device="cpu", host="localhost"))
    host, _, port = runner.address.rpartition(":")
    assert host
    assert 0 < int(port) < 65536
    configure = configuration(str(llama), rank=1, num_ranks=2, rendezvous="nowhere")
    with pytest.raises(MeetingError, match="cannot meet the others at 'nowhere'"):
        runner.configure(configure, lambda *_: None)
    with pytest.raises(MeetingError, match="epoch 1 comes after 1; a new process can join"):
        runner.configure(configure, lambda *_: None)
    with pytest.raises(LoadError, match=r"no port of 192\.0\.2\.1 can be had"):
        Meeting("192.0.2.1")


def test_a_host_is_the_one_from_which_the_core_is_reached() -> None:
    assert host_towards("ipc:///run/tokenloom/worker.sock") == "127.0.0.1"
    assert host_towards("tcp://127.0.0.1:5555") == "127.0.0.1"
    with pytest.raises(LoadError, match="there is no way to tcp:"):
        host_towards("tcp://127.0.0.1")
