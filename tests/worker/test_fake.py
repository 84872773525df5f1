from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from tests.worker.driver import Driver, configuration, int32, ints, sampling
from tokenloom.wire.messages import Step, StepDone
from tokenloom.worker.errors import ProtocolError
from tokenloom.worker.fake import FakeConfig, FakeModel, expected_tokens

CONFIG = FakeConfig(vocab_size=100, num_blocks=64, block_size=4, max_model_tokens=64)


def make_driver(config: FakeConfig = CONFIG, *, max_step_tokens: int = 256) -> Driver:
    model = FakeModel(config)
    configure = configuration(max_num_requests=8, max_step_tokens=max_step_tokens)
    return Driver(model.step, model.configure(configure))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 100, length)]


@pytest.mark.parametrize("chunk", [None, 1, 3, 4, 7])
def test_tokens_are_the_expected_ones_however_prompts_are_cut(chunk: int | None) -> None:
    prompts = [prompt_of(length, length) for length in (1, 4, 5, 17, 30)]
    seeds = [3, 2**64 - 1, 0, 7, 8]
    params = [sampling(seed=seed) for seed in seeds]

    completions = make_driver().generate(prompts, 12, params, chunk=chunk)

    assert completions == [
        expected_tokens(prompt, 12, seed=seed, config=CONFIG)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def test_a_token_depends_on_every_token_before_it() -> None:
    prompt = prompt_of(9)
    completions = {tuple(expected_tokens(prompt, 6, seed=1, config=CONFIG))}
    for position in range(len(prompt)):
        changed = prompt.copy()
        changed[position] = (changed[position] + 1) % 100
        completions.add(tuple(expected_tokens(changed, 6, seed=1, config=CONFIG)))
    swapped = [prompt[1], prompt[0], *prompt[2:]]
    completions.add(tuple(expected_tokens(swapped, 6, seed=1, config=CONFIG)))
    assert len(completions) == len(prompt) + 2


def test_cached_blocks_are_found_again() -> None:
    driver = make_driver()
    prompt = prompt_of(10)
    first = driver.add(prompt)
    driver.run({first: 5})
    blocks = driver.release(first, keep_blocks=True).blocks

    again = driver.add(prompt, sampling(seed=9), shared_blocks=blocks[:2])
    driver.run({again: 5})

    assert driver.slots[again].completion == expected_tokens(prompt, 5, seed=9, config=CONFIG)


def test_a_request_may_read_what_another_writes_in_the_same_step() -> None:
    driver = make_driver()
    prompt = prompt_of(9)
    writer = driver.add(prompt)
    step = driver.plan({writer: 9})
    blocks = driver.slots[writer].blocks
    reader = driver.add(prompt, shared_blocks=blocks[:2])
    shared = driver.plan({reader: 1})
    both = msgspec.structs.replace(
        shared,
        admitted=step.admitted + shared.admitted,
        block_slots=step.block_slots + shared.block_slots,
        block_indices=step.block_indices + shared.block_indices,
        block_ids=step.block_ids + shared.block_ids,
        span_slots=shared.span_slots + step.span_slots,
        span_starts=shared.span_starts + step.span_starts,
        span_lengths=shared.span_lengths + step.span_lengths,
        span_samples=shared.span_samples + step.span_samples,
    )

    sampled = driver.finish(driver._step(both), {reader: 1, writer: 9})

    assert set(sampled.values()) == set(expected_tokens(prompt, 1, seed=0, config=CONFIG))


def test_readmission_after_preemption_goes_on_with_the_same_tokens() -> None:
    driver = make_driver()
    prompt = prompt_of(7)
    slot = driver.add(prompt, sampling(seed=5))
    driver.run({slot: 4})
    tokens = driver.release(slot).tokens

    slot = driver.add(tokens, sampling(seed=5), num_prompt=len(prompt))
    driver.run({slot: 9}, chunk=3)

    assert driver.slots[slot].completion == expected_tokens(prompt, 9, seed=5, config=CONFIG)


def test_eos_comes_by_script_alone() -> None:
    config = FakeConfig(vocab_size=8, eos_token_id=3, eos_period=5)
    tokens = expected_tokens([1, 2], 2000, seed=0, config=config)
    assert 300 < tokens.count(3) < 500
    driver = make_driver(replace(config, max_model_tokens=64))
    assert driver.generate([[1, 2]], 40) == [tokens[:40]]


def test_stop_tokens_wait_for_min_tokens() -> None:
    stops = tuple(range(0, 100, 2))
    params = sampling(min_tokens=6, stop_token_ids=stops)
    [completion] = make_driver().generate([[1]], 20, params)
    assert not set(completion[:6]) & set(stops)
    assert set(completion[6:]) & set(stops)
    assert completion == expected_tokens(
        [1], 20, seed=0, config=CONFIG, min_tokens=6, stop_token_ids=stops
    )


def test_logprobs_come_for_the_rows_that_asked() -> None:
    driver = make_driver()
    plain, asked = driver.add([1, 2]), driver.add([3], sampling(num_top_logprobs=3))
    sampled = driver.step({plain: 2, asked: 1})
    assert driver.last is not None
    [logprobs] = driver.last.logprobs
    assert logprobs.row == 1
    assert ints(logprobs.top_ids)[0] == sampled[asked]
    assert len(logprobs.top_logprobs) == 12


def test_a_faulty_prompt_is_reported_and_others_go_on() -> None:
    config = FakeConfig(vocab_size=100, faulty_token_id=13)
    driver = make_driver(config)
    good, bad = driver.add([1, 2]), driver.add([4, 13])
    sampled = driver.step({good: 2, bad: 2})
    assert driver.last is not None
    assert ints(driver.last.faulty_rows) == [1]
    assert sampled == {good: expected_tokens([1, 2], 1, seed=0, config=config)[0], bad: 0}


def edited(**columns: bytes | int) -> Callable[[Step], Step]:
    return lambda step: msgspec.structs.replace(step, **columns)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited(span_starts=int32([1, 1])), "do not start where they are"),
        (edited(span_lengths=int32([2, 1])), "reach past the last token"),
        (edited(span_lengths=int32([0, 1])), "empty span"),
        (edited(span_samples=bytes([0, 1])), "sample elsewhere"),
        (edited(span_slots=int32([0, 0])), "occurs twice"),
        (edited(span_slots=int32([0, 5])), "hold no request"),
        (edited(span_slots=int32([0, 8])), "there are 8 slots"),
        (edited(span_slots=int32([0])), "span columns"),
        (edited(span_slots=b"\0\0\0"), "3 bytes"),
        (edited(released=int32([4])), "hold no request"),
        (edited(released=int32([-1])), "there are 8 slots"),
        (edited(block_ids=int32([64])), "pool has 64 blocks"),
        (edited(block_indices=int32([2])), "expected"),
        (edited(block_slots=int32([1])), "expected"),
        (edited(block_slots=b"", block_indices=b"", block_ids=b""), "reach past their blocks"),
        (edited(block_ids=int32([1])), "slots hold it"),
        (edited(epoch=2), "epoch"),
        (edited(step_id=1), "came after"),
    ],
)
def test_a_breach_of_the_protocol_is_refused(edit: Callable[[Step], Step], message: str) -> None:
    driver = make_driver()
    slots = driver.add(prompt_of(4)), driver.add(prompt_of(5))
    driver.step({slots[0]: 4, slots[1]: 5})
    with pytest.raises(ProtocolError, match=message):
        driver._step(edit(driver.plan({slots[0]: 1, slots[1]: 1})))


def test_a_stale_cached_block_is_refused() -> None:
    driver = make_driver()
    first = driver.add(prompt_of(8))
    driver.run({first: 1})
    blocks = driver.release(first, keep_blocks=True).blocks
    other = driver.add(prompt_of(8, seed=1)[:4] + prompt_of(8)[4:] + [1], shared_blocks=blocks[:2])
    with pytest.raises(ProtocolError, match="holds something else at position 0"):
        driver.step({other: 1})


def test_a_block_that_others_read_is_not_written_again() -> None:
    driver = make_driver()
    prompt = prompt_of(9)
    writer = driver.add(prompt)
    driver.run({writer: 1})
    blocks = driver.slots[writer].blocks
    reader = driver.add(prompt, shared_blocks=blocks[:2])
    driver.run({reader: 1})
    driver.release(writer)
    thief = driver.add(prompt_of(4, seed=2))
    driver.free_blocks.append(blocks[0])
    with pytest.raises(ProtocolError, match="takes block"):
        driver.step({thief: 4})


@pytest.mark.parametrize(
    ("length", "message"), [(65, "1 to 64 are possible"), (0, "1 to 64 are possible")]
)
def test_an_admission_out_of_bounds_is_refused(length: int, message: str) -> None:
    driver = make_driver()
    driver.add(prompt_of(length))
    with pytest.raises(ProtocolError, match=message):
        driver.step({})


def test_unknown_token_ids_are_refused() -> None:
    driver = make_driver()
    driver.add([5, 100])
    with pytest.raises(ProtocolError, match="the vocabulary has 100"):
        driver.step({})


def test_a_step_over_its_token_limit_is_refused() -> None:
    driver = make_driver(max_step_tokens=8)
    slot = driver.add(prompt_of(9))
    with pytest.raises(ProtocolError, match="at most 8"):
        driver.step({slot: 9})


def test_a_new_epoch_starts_from_nothing() -> None:
    model = FakeModel(CONFIG)
    Driver(model.step, model.configure(configuration())).generate([prompt_of(5)], 3)
    ready = model.configure(configuration(epoch=2))
    done: list[StepDone] = []

    def step(step: Step) -> StepDone:
        done.append(model.step(step))
        return done[-1]

    completions = Driver(step, ready).generate([[7]], 3)

    assert completions == [expected_tokens([7], 3, seed=0, config=CONFIG)]
    assert {each.epoch for each in done} == {2}


def test_the_fake_worker_needs_no_torch() -> None:
    code = "import sys, tokenloom.worker.fake; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
