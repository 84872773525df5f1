"""The pocket model through all of tokenloom: right answers, seeds, stops, log probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from models.pocket import tasks
from tests.e2e.server import Server
from tokenloom.client import Client, FinishReason

POCKET = Path(__file__).parents[2] / "models" / "pocket"
TASKS = ("addition2", "subtraction2", "copying", "sorting", "reversing", "lookup")


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Server.of_model(POCKET) as server:
        with server.client() as client:
            yield client
        server.assert_unharmed()
        assert server.stop() == 0


def ask(client: Client, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    result = client.chat(messages, temperature=0, max_tokens=100, timeout_s=100).result()
    assert result.finish_reason is FinishReason.STOP_TOKEN
    return result.text


def wrong_answers(client: Client) -> list[tuple[str, str]]:
    examples = [example for task in TASKS for example in tasks.held_out(task, 8, seed=3)]
    with ThreadPoolExecutor(len(examples)) as threads:
        answers = list(threads.map(lambda example: ask(client, example.prompt), examples))
    return [
        (example.prompt, answer)
        for example, answer in zip(examples, answers, strict=True)
        if answer != example.answer
    ]


def test_held_out_questions_are_answered_right(client: Client) -> None:
    assert len(wrong_answers(client)) <= 1


@pytest.mark.parametrize(
    "options",
    [
        "--quantize nf4",
        "--quantize fp4",
        "--quantize int8",
        "--quantize nf4 --quantize-lm-head",
        "--kv-cache fp8",
    ],
)
def test_held_out_questions_are_answered_right_in_fewer_bits(options: str) -> None:
    with Server.of_model(POCKET, *options.split()) as server:
        with server.client() as client:
            assert len(wrong_answers(client)) <= 1
        assert server.stop() == 0


def test_a_seeded_request_gives_the_same_alone_and_among_63_others(client: Client) -> None:
    def draw(seed: int) -> tuple[int, ...]:
        result = client.generate(
            [1, 4, 300, 301], seed=seed, temperature=1.5, max_tokens=40, ignore_eos=True
        ).result()
        assert result.seed == seed
        return tuple(result.token_ids)

    alone = draw(5)
    with ThreadPoolExecutor(64) as threads:
        crowd = list(threads.map(draw, range(64)))
    assert crowd[5] == alone
    assert len(set(crowd)) > 60


def test_a_stop_string_ends_the_text_before_it(client: Client) -> None:
    story = [{"role": "user", "content": "Tell a story about Mira and the lighthouse."}]
    whole = client.chat(story, temperature=0, max_tokens=300).result()
    stop = whole.text[40:52]
    cut = client.chat(story, temperature=0, max_tokens=300, stop=[stop, "never said"]).result()
    assert cut.finish_reason is FinishReason.STOP_STRING
    assert cut.stop_string == stop
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.usage.num_completion_tokens < whole.usage.num_completion_tokens


def test_greedy_tokens_are_the_likeliest_of_their_log_probabilities(client: Client) -> None:
    question = [{"role": "user", "content": "What is 47 + 38?"}]
    stream = client.chat(question, temperature=0, max_tokens=10, num_top_logprobs=5)
    for delta in stream:
        for token_id, logprob in zip(delta.token_ids, delta.logprobs, strict=True):
            assert len(logprob.top) == 5
            assert logprob.top[0].token_id == token_id
            assert logprob.top[0].logprob == pytest.approx(logprob.logprob)
            assert sum(math.exp(each.logprob) for each in logprob.top) <= 1.001
    assert stream.text() == "85"
