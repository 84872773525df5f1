"""The whole worker on CUDA: within bfloat16's limits of the CPU, and right answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from models.pocket import data, tasks
from tests.worker.checkpoints import CONFIGS, generate, make_checkpoint
from tests.worker.core_socket import CoreSocket, worker_process
from tests.worker.driver import Driver, configuration, ints, sampling
from tests.worker.random_load import RandomLoad
from tests.worker.test_parity import random_prompt
from tokenloom.wire.messages import Hello, SamplingParams, Step, StepDone
from tokenloom.worker.options import WorkerOptions
from tokenloom.worker.runner import ModelRunner

POCKET = Path(__file__).parents[2] / "models" / "pocket"
ANSWERED = ("addition2", "subtraction2", "sorting", "copying", "reversing", "lookup")


@dataclass
class Machine:
    """A runner on a device, driven step by step.

    The logits are kept of steps without a graph, and of those that are asked for log
    probabilities.
    """

    folder: Path
    device: str
    dtype: str
    attention: str = "auto"
    graphs: bool = True
    kv_cache: str = "auto"
    logits: list[Tensor] = field(default_factory=list)
    num_faulty: int = 0
    """Sampled rows whose logits were not finite, those of graphs among them."""

    def __post_init__(self) -> None:
        options = WorkerOptions(
            device=self.device,
            attention=self.attention,
            graphs=self.graphs,
            kv_cache_bytes=256 * 1024 * 1024,
        )
        self.runner = ModelRunner(options)
        configure = configuration(
            str(self.folder), dtype=self.dtype, kv_cache=self.kv_cache, max_step_tokens=8192
        )
        self.ready = self.runner.configure(configure, lambda *_: None)
        rows = self.runner._rows
        assert rows is not None
        sample = rows.sampler.sample

        def spy(logits: Tensor, *args: object) -> object:
            self.logits.append(logits.double().cpu())
            return sample(logits, *args)  # type: ignore[arg-type]

        rows.sampler.sample = spy  # type: ignore[method-assign, assignment]
        self.driver = Driver(self.step, self.ready)

    def step(self, step: Step) -> StepDone:
        done = self.runner.launch(step).result()
        self.num_faulty += len(ints(done.faulty_rows))
        return done

    def logits_beside(self, tokens: Sequence[int]) -> Tensor:
        """Returns what `logits_along` does, in steps in which another request decodes."""
        asks = sampling(num_top_logprobs=0)
        other = self.driver.add(random_prompt(30, 1), asks)
        self.driver.run({other: 1})
        rows = []
        for index, end in enumerate(range(40, len(tokens), 7)):
            slot = self.driver.add(tokens[:end], asks)
            for chunk in [end - 1, 1] if index % 2 else [33] * (end // 33) + [end % 33]:
                if chunk:
                    self.driver.step({other: 1, slot: chunk})
            rows.append(self.logits[-1][-1:])
            self.driver.release(slot)
        return torch.cat(rows)

    def logits_along(self, tokens: Sequence[int]) -> Tensor:
        """Returns [num_prefixes, vocab_size] after prefixes in chunks, each other ending in one."""
        self.logits.clear()
        for index, end in enumerate(range(40, len(tokens), 7)):
            slot = self.driver.add(tokens[:end])
            self.driver.run({slot: 1}, chunk=end - 1 if index % 2 else 33)
            self.driver.release(slot)
        return torch.cat(self.logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_on_cuda_gives_transformers_tokens(tmp_path: Path, name: str) -> None:
    model = make_checkpoint(tmp_path, name)
    prompts = [random_prompt(length) for length in (1, 17, 40, 75)]
    machine = Machine(tmp_path, "cuda", "float32")
    expected = [generate(model, prompt, 20) for prompt in prompts]
    assert machine.driver.generate(prompts, 20, chunk=16) == expected


@pytest.mark.parametrize("attention", ["auto", "torch"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_logits_on_cuda_are_near_the_cpus(
    tmp_path: Path, name: str, attention: str
) -> None:
    make_checkpoint(tmp_path, name)
    tokens = random_prompt(200)
    exact = Machine(tmp_path, "cpu", "float32").logits_along(tokens)
    rounded = Machine(tmp_path, "cpu", "bfloat16").logits_along(tokens)
    logits = Machine(tmp_path, "cuda", "bfloat16", attention, graphs=False).logits_along(tokens)
    # As far from float32 as bfloat16 itself is, on a model that amplifies every rounding.
    assert float((logits - exact).norm()) < 1.3 * float((rounded - exact).norm())


@pytest.mark.parametrize("attention", ["auto", "triton"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_logits_of_captured_steps_are_near_the_cpus(
    tmp_path: Path, name: str, attention: str
) -> None:
    make_checkpoint(tmp_path, name)
    tokens = random_prompt(200)
    exact = Machine(tmp_path, "cpu", "float32").logits_along(tokens)
    rounded = Machine(tmp_path, "cpu", "bfloat16").logits_along(tokens)
    logits = Machine(tmp_path, "cuda", "bfloat16", attention).logits_beside(tokens)
    assert float((logits - exact).norm()) < 1.3 * float((rounded - exact).norm())


@pytest.mark.parametrize("edits", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window"])
def test_captured_steps_with_prompts_give_the_tokens_of_steps_without_a_graph(
    tmp_path: Path, name: str, *, edits: bool
) -> None:
    make_checkpoint(tmp_path, name)

    def run(*, graphs: bool) -> list[list[int]]:
        machine = Machine(tmp_path, "cuda", "float32", graphs=graphs)
        return RandomLoad(machine.driver, len(name), edits=edits).run(75)

    assert run(graphs=True) == run(graphs=False)


@pytest.mark.parametrize("num_requests", [1, 5, 64])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_captured_steps_give_the_tokens_of_steps_without_a_graph(
    tmp_path: Path, name: str, num_requests: int
) -> None:
    make_checkpoint(tmp_path, name)
    prompts = [random_prompt(1 + 5 * row % 90) for row in range(num_requests)]
    lengths = [3 + 7 * row % 40 for row in range(num_requests)]
    params = [
        sampling(
            temperature=row % 4 / 2,
            top_k=row % 3 * 20,
            top_p=1 - row % 5 / 20,
            seed=row,
            presence_penalty=row % 7 / 6 if row % 7 > 4 else 0,
            num_top_logprobs=2 if row % 11 == 10 else None,
        )
        for row in range(num_requests)
    ]

    def run(*, graphs: bool) -> list[list[int]]:
        machine = Machine(tmp_path, "cuda", "float32", graphs=graphs)
        assert machine.runner._rows is not None
        assert (machine.runner._rows.graphs is not None) == graphs
        return machine.driver.generate(prompts, lengths, params)

    assert run(graphs=True) == run(graphs=False)


def test_a_new_epoch_keeps_the_graphs_and_forgets_the_requests(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama")
    machine = Machine(tmp_path, "cuda", "float32")
    prompts = [random_prompt(length) for length in (30, 3, 50)]
    machine.driver.generate([random_prompt(60)] * 5, 9)
    rows = machine.runner._rows
    configure = configuration(str(tmp_path), dtype="float32", max_step_tokens=8192, epoch=2)
    ready = machine.runner.configure(configure, lambda *_: None)
    assert machine.runner._rows is rows
    driver = Driver(machine.step, ready)
    assert driver.generate(prompts, 12) == [generate(model, prompt, 12) for prompt in prompts]


def test_the_next_step_is_launched_while_the_last_one_runs(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama")
    machine = Machine(tmp_path, "cuda", "float32")
    prompt = random_prompt(17)
    slot = machine.driver.add(prompt)
    pending = [machine.runner.launch(machine.driver.plan({slot: 17}))]
    state = machine.driver.slots[slot]
    for _ in range(9):
        state.num_computed = len(state.tokens)
        state.tokens.append(0)  # what it is only the device knows
        pending.append(machine.runner.launch(machine.driver.plan({slot: 1})))
    tokens = [ints(each.result().tokens)[0] for each in pending]
    assert tokens == generate(model, prompt, 10)
    assert all(each.result().compute_s > 0 for each in pending)


def test_steps_with_prompts_are_launched_while_the_ones_before_run(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama")
    machine = Machine(tmp_path, "cuda", "float32")
    driver, prompts = machine.driver, [random_prompt(length) for length in (17, 40)]
    first, second = (driver.add(prompt) for prompt in prompts)
    found: dict[int, list[int]] = {first: [], second: []}
    steps = [{first: 17}, {first: 1, second: 30}, {first: 1, second: 10}]
    steps += [{first: 1, second: 1}] * 8
    launched = []
    for spans in steps:
        pending = machine.runner.launch(driver.plan(spans))
        sampled = []
        for slot, length in spans.items():
            state = driver.slots[slot]
            state.num_computed += length
            if state.num_computed == len(state.tokens):
                state.tokens.append(0)  # what it is only the device knows
                sampled.append(slot)
        launched.append((sampled, pending))
    for sampled, pending in launched:
        for slot, token in zip(sampled, ints(pending.result().tokens), strict=True):
            found[slot].append(token)
    assert found[first] == generate(model, prompts[0], 11)
    assert found[second] == generate(model, prompts[1], 9)


def test_the_worker_process_keeps_two_steps_in_flight(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "llama")
    endpoint = f"ipc://{tmp_path}/worker.sock"
    prompt = random_prompt(17)
    with (
        CoreSocket(endpoint) as core,
        worker_process(endpoint, "--kv-cache-bytes", "64MiB", module="tokenloom.worker"),
    ):
        assert core.expect(Hello).device == "cuda:0"
        ready = core.configure(configuration(str(tmp_path / "model"), dtype="float32"))
        driver = Driver(core.step, ready)
        slot = driver.add(prompt)
        core.send(driver.plan({slot: 17}))
        state, tokens = driver.slots[slot], []
        for _ in range(9):
            state.num_computed = len(state.tokens)
            state.tokens.append(0)  # what it is only the device knows
            core.send(driver.plan({slot: 1}))
            tokens += ints(core.expect(StepDone).tokens)
        tokens += ints(core.expect(StepDone).tokens)
        assert tokens == generate(model, prompt, 10)


def test_the_pool_takes_its_fraction_of_the_free_memory(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    runner = ModelRunner(WorkerOptions(device="cuda", kv_memory_fraction=0.05))
    ready = runner.configure(configuration(str(tmp_path), dtype="bfloat16"), lambda *_: None)
    assert 0.9 * 0.05 * free < ready.kv_bytes <= 0.05 * free


def test_a_seeded_request_draws_on_cuda_what_it_draws_on_a_cpu(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3")
    prompts = [random_prompt(length) for length in range(10, 42)]
    params = [
        sampling(
            temperature=0.5 + row / 20,
            top_k=row % 3 * 10,
            top_p=0.95,
            min_p=0.01 * (row % 2),
            repetition_penalty=1 + row / 100,
            presence_penalty=row / 50,
            seed=row << 40,
            num_top_logprobs=row % 4,
        )
        for row in range(32)
    ]

    def run(device: str) -> list[list[int]]:
        return Machine(tmp_path, device, "float32").driver.generate(prompts, 24, params)

    assert run("cuda") == run("cpu")


@pytest.mark.parametrize("kv_cache", ["auto", "fp8"])
def test_a_request_that_left_nan_behind_harms_no_other(tmp_path: Path, kv_cache: str) -> None:
    make_checkpoint(tmp_path, "llama")
    machine = Machine(tmp_path, "cuda", "bfloat16", kv_cache=kv_cache)
    loaded = machine.runner._loaded
    assert loaded is not None
    with torch.inference_mode():
        for numbers in (loaded.pool.pages.keys, loaded.pool.pages.values):
            numbers.view(torch.uint8).fill_(0xFF)  # NaN in every type
    machine.driver.generate([random_prompt(40)], 5)
    assert all(logits.isfinite().all() for logits in machine.logits)
    assert machine.num_faulty == 0


@pytest.fixture(scope="module")
def pocket_prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    examples = [example for task in ANSWERED for example in tasks.held_out(task, 12)]
    texts = [
        data.render([("user", example.prompt)], add_generation_prompt=True) for example in examples
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_the_pocket_model_answers_as_on_a_cpu(pocket_prompts: list[list[int]]) -> None:
    def answers(device: str, dtype: str, params: SamplingParams | None = None) -> list[list[int]]:
        driver = Machine(POCKET, device, dtype).driver
        completions = driver.generate(pocket_prompts[:64], 48, params, chunk=64)
        return [answer[: answer.index(data.END_ID)] for answer in completions]

    assert answers("cuda", "auto") == answers("cpu", "auto")


def test_the_pocket_model_answers_with_a_cache_in_8_bits(pocket_prompts: list[list[int]]) -> None:
    def answers(device: str, kv_cache: str) -> list[list[int]]:
        driver = Machine(POCKET, device, "auto", kv_cache=kv_cache).driver
        completions = driver.generate(pocket_prompts[:64], 48, chunk=64)
        return [answer[: answer.index(data.END_ID)] for answer in completions]

    expected = answers("cpu", "auto")
    same = sum(map(list.__eq__, answers("cuda", "fp8"), expected))
    assert same >= len(expected) - 1
