"""Greedy output equals transformers' generate, token for token, however it is batched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.worker.checkpoints import (
    CONFIGS,
    VOCAB_SIZE,
    generate,
    has_tie,
    load_quantized,
    make_checkpoint,
    skipped,
)
from tests.worker.driver import Driver, configuration, sampling
from tokenloom.wire.messages import Step, StepDone
from tokenloom.worker.options import WorkerOptions
from tokenloom.worker.runner import ModelRunner

NUM_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class Subject:
    folder: Path
    model: PreTrainedModel
    runner: ModelRunner
    prompts: list[list[int]]
    expected: list[list[int]]
    quantize: str

    def driver(self) -> Driver:
        configure = configuration(str(self.folder), quantize=self.quantize)

        def step(step: Step) -> StepDone:
            return self.runner.launch(step).result()

        return Driver(step, self.runner.configure(configure, lambda *_: None))


def random_prompt(length: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng([length, seed])
    return [int(token) for token in rng.integers(0, VOCAB_SIZE, length)]


def clear_prompt(model: PreTrainedModel, length: int) -> list[int]:
    """Returns a random prompt whose greedy completion no rounding can change."""
    seed = 0
    while True:
        prompt = random_prompt(length, seed)
        if not has_tie(model, prompt, generate(model, prompt, NUM_TOKENS)):
            return prompt
        seed += 1


QUANTIZING = ("llama nf4", "llama-tied int8", "qwen3 nf4", "mistral-window fp4")


@pytest.fixture(scope="module", params=[*(f"{name} none" for name in CONFIGS), *QUANTIZING])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    torch.set_num_threads(1)
    name, quantize = request.param.split()
    folder = tmp_path_factory.mktemp(name)
    model = make_checkpoint(folder, name)
    if quantize != "none":
        model = load_quantized(folder, quantize, skipped=skipped(name, quantize))
    prompts = [clear_prompt(model, length) for length in (1, 3, 16, 17, 40, 75)]
    return Subject(
        folder=folder,
        model=model,
        runner=ModelRunner(WorkerOptions(device="cpu", kv_cache_bytes=32 * 1024 * 1024)),
        prompts=prompts,
        expected=[generate(model, prompt, NUM_TOKENS) for prompt in prompts],
        quantize=quantize,
    )


def test_one_request_at_a_time(subject: Subject) -> None:
    driver = subject.driver()
    for prompt, expected in zip(subject.prompts, subject.expected, strict=True):
        assert driver.generate([prompt], NUM_TOKENS) == [expected]


@pytest.mark.parametrize("chunk", [None, 1, 7, 16])
def test_a_batch_with_prompts_cut_in_chunks(subject: Subject, chunk: int | None) -> None:
    assert subject.driver().generate(subject.prompts, NUM_TOKENS, chunk=chunk) == subject.expected


def test_64_requests_of_mixed_lengths(subject: Subject) -> None:
    prompts = (subject.prompts * 11)[:64]
    wanted = [1 + 7 * row % NUM_TOKENS for row in range(64)]
    completions = subject.driver().generate(prompts, wanted, chunk=19)
    for row, completion in enumerate(completions):
        assert completion == subject.expected[row % len(subject.prompts)][: wanted[row]]


def test_a_seeded_request_draws_the_same_alone_and_among_63_others(subject: Subject) -> None:
    prompt, params = subject.prompts[3], sampling(temperature=1.2, top_p=0.95, seed=2**60 + 7)
    [alone] = subject.driver().generate([prompt], NUM_TOKENS, params)
    others = [sampling(temperature=0.9, top_k=row % 30, seed=row) for row in range(63)]
    prompts = [*(subject.prompts * 11)[:40], prompt, *(subject.prompts * 11)[40:63]]
    mixed = [*others[:40], params, *others[40:]]
    completions = subject.driver().generate(prompts, NUM_TOKENS, mixed, chunk=23)
    assert completions[40] == alone
    assert alone != subject.expected[3]


def test_prefill_of_one_beside_decode_of_others(subject: Subject) -> None:
    driver = subject.driver()
    first = [driver.add(prompt) for prompt in subject.prompts[:3]]
    driver.run(dict.fromkeys(first, 5))
    last = [driver.add(prompt) for prompt in subject.prompts[3:]]
    driver.run(dict.fromkeys(first + last, NUM_TOKENS), chunk=11)
    assert [driver.slots[slot].completion for slot in first + last] == subject.expected


def test_a_cached_prefix_is_shared(subject: Subject) -> None:
    driver = subject.driver()
    prompt, expected = subject.prompts[-1], subject.expected[-1]
    first = driver.add(prompt)
    driver.run({first: 3})
    blocks = driver.slots[first].blocks[: len(prompt) // driver.ready.block_size]
    second = driver.add(prompt, shared_blocks=blocks)
    third = driver.add(prompt, shared_blocks=blocks[:1])
    driver.run({first: NUM_TOKENS, second: NUM_TOKENS, third: NUM_TOKENS})
    for slot in (first, second, third):
        assert driver.slots[slot].completion == expected


def test_a_preempted_request_is_recomputed_in_other_blocks(subject: Subject) -> None:
    driver = subject.driver()
    prompt, expected = subject.prompts[-2], subject.expected[-2]
    slot = driver.add(prompt)
    driver.run({slot: 9})
    tokens = driver.release(slot).tokens
    driver.free_blocks.insert(0, driver.free_blocks.pop())
    slot = driver.add(tokens, num_prompt=len(prompt))
    driver.run({slot: NUM_TOKENS}, chunk=13)
    assert driver.slots[slot].completion == expected


def test_what_others_left_in_the_pool_harms_no_request(subject: Subject) -> None:
    driver = subject.driver()
    loaded = subject.runner._loaded
    assert loaded is not None
    with torch.inference_mode():
        loaded.pool.pages.keys.fill_(float("nan"))
        loaded.pool.pages.values.fill_(float("nan"))
    assert driver.generate(subject.prompts, NUM_TOKENS, chunk=7) == subject.expected


def test_the_next_step_is_launched_before_the_last_one_is_answered(subject: Subject) -> None:
    driver = subject.driver()
    prompt, expected = subject.prompts[1], subject.expected[1]
    slot = driver.add(prompt)
    pending = subject.runner.launch(driver.plan({slot: len(prompt)}))
    state = driver.slots[slot]
    state.num_computed = len(prompt)
    state.tokens.append(0)  # what it is only the device knows
    second = subject.runner.launch(driver.plan({slot: 1}))
    tokens = [int(np.frombuffer(each.result().tokens, "<i4")[0]) for each in (pending, second)]
    assert tokens == expected[:2]


def test_logits_are_those_of_transformers(subject: Subject) -> None:
    driver = subject.driver()
    prompt = subject.prompts[-1]
    slot = driver.add(prompt)
    captured: list[torch.Tensor] = []
    rows = subject.runner._rows
    assert rows is not None
    sample = rows.sampler.sample

    def spy(logits: torch.Tensor, *args: object) -> object:
        captured.append(logits.clone())
        return sample(logits, *args)  # type: ignore[arg-type]

    rows.sampler.sample = spy  # type: ignore[method-assign, assignment]
    driver.run({slot: 1}, chunk=32)
    with torch.inference_mode():
        expected = subject.model(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(captured[0][0], expected, atol=2e-5, rtol=1e-4)
