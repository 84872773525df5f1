"""Greedy output through gRPC equals transformers' generate, token for token.

Each checkpoint is served twice: with room, and so tight that prompts are
computed in chunks and requests are preempted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.e2e.server import Server
from tests.worker.checkpoints import (
    VOCAB_SIZE,
    generate,
    has_tie,
    load_quantized,
    make_checkpoint,
    skipped,
)
from tokenloom.client import Client, FinishReason

POCKET = Path(__file__).parents[2] / "models" / "pocket"
RANDOM = ("llama", "llama-tied", "llama-3", "mistral-window", "qwen2", "qwen3")
NUM_REQUESTS = 64
NUM_TOKENS = 24
POSITION_BYTES = dict.fromkeys(RANDOM, 3 * 2 * 2 * 16 * 4) | {
    "llama-tied": 3 * 2 * 1 * 16 * 4,
    "llama-3": 3 * 2 * 2 * 32 * 4,
    "qwen3": 3 * 2 * 2 * 24 * 4,
}
"""layers x (K, V) x KV heads x head_dim x float32"""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A checkpoint, random prompts, and transformers' completions of them."""

    folder: Path
    position_bytes: int
    prompts: list[list[int]]
    expected: list[list[int]]
    quantize: str


def random_truth(folder: Path, name: str, quantize: str) -> Truth:
    model = make_checkpoint(folder, name)
    if quantize != "none":
        model = load_quantized(folder, quantize, skipped=skipped(name, quantize))
    vocab = {f"<{token}>": token for token in range(VOCAB_SIZE)}
    Tokenizer(models.WordLevel(vocab, unk_token="<0>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    return truth(folder, model, VOCAB_SIZE, POSITION_BYTES[name], quantize)


def pocket_truth(quantize: str) -> Truth:
    if quantize == "none":
        model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32).eval()
    else:
        model = load_quantized(POCKET, quantize)
    config = model.config
    position_bytes = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    return truth(POCKET, model, config.vocab_size, position_bytes, quantize)


def truth(
    folder: Path, model: PreTrainedModel, vocab_size: int, position_bytes: int, quantize: str
) -> Truth:
    # Ends are for other tests; here every completion has its full length.
    model.generation_config.eos_token_id = None
    rng = np.random.default_rng(5)
    shared = rng.integers(0, vocab_size, 48).tolist()
    prompts: list[list[int]] = []
    expected: list[list[int]] = []
    while len(prompts) < NUM_REQUESTS:
        own = rng.integers(0, vocab_size, rng.integers(1, 90)).tolist()
        prompt = (shared if len(prompts) % 4 == 0 else []) + own
        completion = generate(model, prompt, NUM_TOKENS)
        if not has_tie(model, prompt, completion):
            prompts.append(prompt)
            expected.append(completion)
    return Truth(
        folder=folder,
        position_bytes=position_bytes,
        prompts=prompts,
        expected=expected,
        quantize=quantize,
    )


CASES = (*(f"{name} none" for name in (*RANDOM, "pocket")), "llama int8", "pocket nf4")


@pytest.fixture(scope="module", params=CASES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    torch.set_num_threads(1)
    name, quantize = request.param.split()
    if name == "pocket":
        return pocket_truth(quantize)
    return random_truth(tmp_path_factory.mktemp(name), name, quantize)


def options(subject: Truth) -> tuple[str, ...]:
    return ("--dtype", "float32", "--quantize", subject.quantize)


@pytest.fixture(scope="module")
def roomy(subject: Truth) -> Iterator[Server]:
    with Server.of_model(subject.folder, *options(subject)) as server:
        yield server


def complete(client: Client, prompt: list[int]) -> list[int]:
    result = client.generate(
        prompt, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, timeout_s=200
    ).result()
    assert result.finish_reason is FinishReason.LENGTH
    assert result.usage.num_prompt_tokens == len(prompt)
    return list(result.token_ids)


def complete_all(client: Client, prompts: list[list[int]]) -> list[list[int]]:
    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(lambda prompt: complete(client, prompt), prompts))


def test_one_request(subject: Truth, roomy: Server) -> None:
    with roomy.client() as client:
        for index in (0, 1, 2):
            assert complete(client, subject.prompts[index]) == subject.expected[index]


def test_64_requests_at_once(subject: Truth, roomy: Server) -> None:
    with roomy.client() as client:
        assert complete_all(client, subject.prompts) == subject.expected
    roomy.assert_unharmed()


def test_a_prefix_cache_hit_changes_nothing(subject: Truth, roomy: Server) -> None:
    longest = max(range(NUM_REQUESTS), key=lambda index: len(subject.prompts[index]))
    with roomy.client() as client:
        for _ in range(2):
            stream = client.generate(
                subject.prompts[longest], temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True
            )
            result = stream.result()
            assert list(result.token_ids) == subject.expected[longest]
        assert result.usage.num_cached_tokens > 32


def test_chunked_prefill_and_preemption_change_nothing(subject: Truth) -> None:
    longest = max(map(len, subject.prompts)) + NUM_TOKENS
    pool_bytes = 2 * (longest + 16) * subject.position_bytes
    with Server.of_model(
        subject.folder,
        *options(subject),
        *("--max-num-requests", "12", "--max-step-tokens", "13"),
        *("--max-model-tokens", str(longest)),
        *("--kv-cache-bytes", str(pool_bytes)),
    ) as server:
        with server.client() as client:
            assert complete_all(client, subject.prompts) == subject.expected
        assert server.inspect().num_preemptions > 0
        server.assert_unharmed()
        assert server.stop() == 0
