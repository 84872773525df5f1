from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.scheduler.front import validate
from tokenloom.scheduler.front.errors import InvalidRequest
from tokenloom.scheduler.front.validate import (
    ChatPrompt,
    Limits,
    TextPrompt,
    TokenPrompt,
    fit,
    validate_detokenize,
    validate_generate,
    validate_tokenize,
)
from tokenloom.v1 import inference_pb2 as pb

LIMITS = Limits(
    vocab_size=1000,
    max_model_tokens=100,
    longest_token_bytes=10,
    eos_token_ids=(2, 3),
    has_chat_template=True,
)
NAN, INF = math.nan, math.inf


def request(prompt: object = "hello", **settings: object) -> pb.GenerateRequest:
    made = pb.GenerateRequest()
    if isinstance(prompt, str):
        made.text = prompt
    elif isinstance(prompt, pb.Chat):
        made.chat.CopyFrom(prompt)
    elif isinstance(prompt, list):
        made.tokens.SetInParent()
        made.tokens.ids.extend(prompt)
    parts = (made.sampling, made.stopping, made.output)
    for name, value in settings.items():
        (part,) = (part for part in parts if name in part.DESCRIPTOR.fields_by_name)
        if isinstance(value, dict):
            getattr(part, name).update(value)
        elif isinstance(value, list):
            getattr(part, name).extend(value)
        else:
            setattr(part, name, value)
    return made


def chat(*messages: tuple[str, str]) -> pb.Chat:
    return pb.Chat(
        messages=[pb.ChatMessage(role=role, content=content) for role, content in messages]
    )


def violations(made: pb.GenerateRequest, limits: Limits = LIMITS) -> dict[str, str]:
    """Returns what is wrong with a request, by field."""
    try:
        validate_generate(made, limits, fallback_seed=7)
    except InvalidRequest as error:
        refusal = error
    else:
        return {}
    found = {violation.field: violation.description for violation in refusal.violations}
    assert len(found) == len(refusal.violations), "a field is named twice"
    return found


def test_an_empty_request_but_for_the_prompt_takes_the_documented_defaults() -> None:
    spec = validate_generate(request("hello"), LIMITS, fallback_seed=7)
    sampling = spec.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1, 1, 0, 0)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0, 0)
    assert sampling.repetition_penalty == 1
    assert sampling.seed == 7
    assert (sampling.min_tokens, sampling.stop_token_ids) == (0, (2, 3))
    assert (sampling.logit_bias, sampling.num_top_logprobs) == ((), None)
    assert (spec.max_tokens, spec.stop_strings, spec.skip_special_tokens) == (None, (), True)
    assert spec.prompt == TextPrompt(text="hello")


def test_a_present_zero_is_not_a_default() -> None:
    spec = validate_generate(
        request(temperature=0, seed=0, num_top_logprobs=0, skip_special_tokens=False),
        LIMITS,
        fallback_seed=7,
    )
    assert spec.sampling.temperature == 0
    assert spec.sampling.seed == 0
    assert spec.sampling.num_top_logprobs == 0
    assert not spec.skip_special_tokens


RIGHT: list[dict[str, Any]] = [
    {"temperature": 1e30},
    {"temperature": 0.7},
    {"top_p": 1},
    {"top_p": 1e-6},
    {"top_k": 2**32 - 1},
    {"min_p": 0},
    {"min_p": 1},
    {"presence_penalty": -2},
    {"presence_penalty": 2},
    {"frequency_penalty": -2},
    {"frequency_penalty": 2},
    {"repetition_penalty": 0.01},
    {"repetition_penalty": 10},
    {"seed": 2**64 - 1},
    {"logit_bias": {999: 100.0, 0: -100.0}},
    {"logit_bias": dict.fromkeys(range(1000), 1.0)},
    {"max_tokens": 1},
    {"min_tokens": 5, "max_tokens": 5},
    {"stop_strings": ["x" * 256] * 16},
    {"stop_token_ids": [999] * 32},
    {"ignore_eos": True},
    {"num_top_logprobs": 20},
]


@pytest.mark.parametrize("settings", RIGHT, ids=str)
def test_values_at_the_bounds_are_accepted(settings: dict[str, Any]) -> None:
    assert violations(request(**settings)) == {}


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": -0.5}, "sampling.temperature", "is -0.5; it must be at least 0 and finite"),
    ({"temperature": NAN}, "sampling.temperature", "is nan; it must be at least 0 and finite"),
    ({"temperature": INF}, "sampling.temperature", "is inf; it must be at least 0 and finite"),
    ({"top_p": 0}, "sampling.top_p", "is 0; it must be above 0 and at most 1"),
    ({"top_p": 1.5}, "sampling.top_p", "is 1.5; it must be above 0 and at most 1"),
    ({"top_p": NAN}, "sampling.top_p", "is nan; it must be above 0 and at most 1"),
    ({"min_p": -0.25}, "sampling.min_p", "is -0.25; it must be at least 0 and at most 1"),
    ({"min_p": 1.5}, "sampling.min_p", "is 1.5; it must be at least 0 and at most 1"),
    ({"min_p": NAN}, "sampling.min_p", "is nan; it must be at least 0 and at most 1"),
    *(
        (
            {f"{kind}_penalty": value},
            f"sampling.{kind}_penalty",
            f"is {value:g}; it must be at least -2 and at most 2",
        )
        for kind in ("presence", "frequency")
        for value in (-2.5, 2.5, NAN, INF, -INF)
    ),
    *(
        (
            {"repetition_penalty": value},
            "sampling.repetition_penalty",
            f"is {value:g}; it must be at least 0.01 and at most 10",
        )
        for value in (0.0, -1.0, 10.5, NAN, INF)
    ),
    (
        {"logit_bias": {1000: 1.0}},
        "sampling.logit_bias",
        "holds 1000; token ids of this model are below 1000",
    ),
    (
        {"logit_bias": {5: 100.5}},
        "sampling.logit_bias[5]",
        "is 100.5; it must be at least -100 and at most 100",
    ),
    (
        {"logit_bias": {5: NAN}},
        "sampling.logit_bias[5]",
        "is nan; it must be at least -100 and at most 100",
    ),
    (
        {"logit_bias": dict.fromkeys(range(1025), 1.0)},
        "sampling.logit_bias",
        "has 1025 entries; this server accepts 1024",
    ),
    ({"max_tokens": 0}, "stopping.max_tokens", "is 0; it must be at least 1"),
    (
        {"max_tokens": 4, "min_tokens": 5},
        "stopping.min_tokens",
        "is 5; it must not exceed max_tokens, which is 4",
    ),
    (
        {"stop_strings": ["x"] * 17},
        "stopping.stop_strings",
        "has 17 entries; this server accepts 16",
    ),
    ({"stop_strings": ["x", ""]}, "stopping.stop_strings[1]", "has 0 bytes; it must have 1 to 256"),
    (
        {"stop_strings": ["é" * 129]},
        "stopping.stop_strings[0]",
        "has 258 bytes; it must have 1 to 256",
    ),
    (
        {"stop_token_ids": [1] * 33},
        "stopping.stop_token_ids",
        "has 33 entries; this server accepts 32",
    ),
    (
        {"stop_token_ids": [1, 2**32 - 1]},
        "stopping.stop_token_ids",
        "holds 4294967295; token ids of this model are below 1000",
    ),
    ({"num_top_logprobs": 21}, "output.num_top_logprobs", "is 21; this server accepts 20"),
]


@pytest.mark.parametrize(("settings", "field", "description"), WRONG)
def test_values_out_of_range_are_named_with_their_numbers(
    settings: dict[str, Any], field: str, description: str
) -> None:
    assert violations(request(**settings)) == {field: description}


def test_every_scalar_of_the_request_has_a_case() -> None:
    tried = {name for settings in RIGHT for name in settings}
    for part in (pb.Sampling, pb.Stopping, pb.Output):
        for name in part.DESCRIPTOR.fields_by_name:
            assert name in tried or name == "skip_special_tokens"


def test_all_violations_are_told_at_once() -> None:
    made = request(
        [5, 1000], temperature=-1, top_p=2, max_tokens=0, stop_strings=[""], num_top_logprobs=50
    )
    assert set(violations(made)) == {
        "tokens.ids",
        "sampling.temperature",
        "sampling.top_p",
        "stopping.max_tokens",
        "stopping.stop_strings[0]",
        "output.num_top_logprobs",
    }


@pytest.mark.parametrize(
    ("prompt", "field", "description"),
    [
        (None, "prompt", "is absent; set one of text, tokens, chat"),
        ("", "text", "is empty; a prompt has a token at least"),
        ("é" * 501, "text", "has 1002 bytes; this server accepts 1000"),
        ([], "tokens.ids", "has 0 tokens; a prompt has a token at least"),
        ([1, 1000], "tokens.ids", "holds 1000; token ids of this model are below 1000"),
        ([2**31], "tokens.ids", "holds 2147483648; token ids of this model are below 1000"),
        ([1] * 101, "tokens.ids", "prompt has 101 tokens; this server accepts 100"),
        (
            [1] * 100,
            "tokens.ids",
            (
                "prompt has 100 tokens; this server accepts 100 with the completion, "
                "which has a token at least"
            ),
        ),
        (chat(), "chat.messages", "is empty; a chat has a message at least"),
        (
            chat(*[("user", "")] * 1025),
            "chat.messages",
            "has 1025 messages; this server accepts 1024",
        ),
        (chat(("", "x")), "chat.messages[0].role", "has 0 bytes; it must have 1 to 64"),
        (
            chat(("user", "x"), ("r" * 65, "x")),
            "chat.messages[1].role",
            "has 65 bytes; it must have 1 to 64",
        ),
        (
            chat(("user", "x" * 500), ("user", "x" * 501)),
            "chat.messages",
            "has 1001 bytes; this server accepts 1000",
        ),
    ],
)
def test_bad_prompts_are_named_with_their_numbers(
    prompt: object, field: str, description: str
) -> None:
    assert violations(request(prompt)) == {field: description}


def test_a_chat_needs_a_template() -> None:
    limits = Limits(
        vocab_size=1000,
        max_model_tokens=100,
        longest_token_bytes=10,
        eos_token_ids=(),
        has_chat_template=False,
    )
    found = violations(request(chat(("user", "hi"))), limits)
    assert found == {"chat": "the served model has no chat template; send text instead"}


def test_prompts_come_out_as_they_went_in() -> None:
    spec = validate_generate(request([5, 999, 0]), LIMITS, fallback_seed=0)
    assert isinstance(spec.prompt, TokenPrompt)
    assert spec.prompt.ids.tolist() == [5, 999, 0]
    assert spec.prompt.ids.dtype.name == "int32"
    spec = validate_generate(request(chat(("user", "a"), ("x", ""))), LIMITS, fallback_seed=0)
    assert spec.prompt == ChatPrompt(messages=(("user", "a"), ("x", "")))


@pytest.mark.parametrize(
    ("settings", "num_prompt_tokens", "expected"),
    [
        ({}, 30, 70),
        ({}, 99, 1),
        ({"max_tokens": 70}, 30, 70),
        ({"max_tokens": 3}, 30, 3),
        ({"min_tokens": 70}, 30, 70),
        (
            {"max_tokens": 71},
            30,
            (
                "stopping.max_tokens: is 71 and the prompt has 30 tokens; "
                "this server accepts 100 together"
            ),
        ),
        (
            {"min_tokens": 71},
            30,
            (
                "stopping.min_tokens: is 71 and the prompt has 30 tokens; "
                "this server accepts 100 together"
            ),
        ),
        ({}, 9000, "text: prompt has 9000 tokens; this server accepts 100"),
        ({}, 0, "text: has 0 tokens; a prompt has a token at least"),
    ],
)
def test_prompt_and_completion_share_the_context(
    settings: dict[str, Any], num_prompt_tokens: int, expected: int | str
) -> None:
    spec = validate_generate(request("text", **settings), LIMITS, fallback_seed=0)
    if isinstance(expected, int):
        assert fit(spec, num_prompt_tokens, LIMITS) == expected
    else:
        with pytest.raises(InvalidRequest) as caught:
            fit(spec, num_prompt_tokens, LIMITS)
        assert caught.value.message == expected


def test_lengths_of_token_prompts_are_told_with_the_other_violations() -> None:
    found = violations(request([1] * 60, max_tokens=41, temperature=-1))
    assert set(found) == {"stopping.max_tokens", "sampling.temperature"}


@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        ({}, (2, 3)),
        ({"ignore_eos": True}, ()),
        ({"stop_token_ids": [9, 2, 9]}, (2, 3, 9)),
        ({"stop_token_ids": [9, 2], "ignore_eos": True}, (9, 2)),
    ],
)
def test_stop_tokens_are_the_models_own_and_the_clients(
    settings: dict[str, Any], stops: tuple[int, ...]
) -> None:
    spec = validate_generate(request(**settings), LIMITS, fallback_seed=0)
    assert spec.sampling.stop_token_ids == stops


def test_values_that_mean_nothing_to_a_worker_are_made_plain() -> None:
    made = request(temperature=1e-30, top_k=1000, logit_bias={7: 1.0, 3: -2.0})
    sampling = validate_generate(made, LIMITS, fallback_seed=0).sampling
    assert sampling.temperature == 0
    assert sampling.top_k == 0
    assert sampling.logit_bias == ((3, -2.0), (7, 1.0))


@pytest.mark.parametrize(
    ("made", "field"),
    [
        (pb.TokenizeRequest(), "prompt"),
        (pb.TokenizeRequest(text="x" * 2001), "text"),
        (pb.TokenizeRequest(chat=chat()), "chat.messages"),
        (pb.TokenizeRequest(chat=chat(("", ""))), "chat.messages[0].role"),
    ],
)
def test_bad_tokenize_requests_are_refused(made: pb.TokenizeRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate_tokenize(made, LIMITS)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_tokenize_takes_an_empty_text() -> None:
    assert validate_tokenize(pb.TokenizeRequest(text=""), LIMITS) == TextPrompt(text="")


@pytest.mark.parametrize("ids", [[1000], [0] * 101])
def test_bad_detokenize_requests_are_refused(ids: list[int]) -> None:
    with pytest.raises(InvalidRequest):
        validate_detokenize(pb.DetokenizeRequest(token_ids=ids), LIMITS)


def test_detokenize_skips_special_tokens_by_default() -> None:
    assert validate_detokenize(pb.DetokenizeRequest(token_ids=[4]), LIMITS) == ([4], True)
    made = pb.DetokenizeRequest(token_ids=[], skip_special_tokens=False)
    assert validate_detokenize(made, LIMITS) == ([], False)


@given(data=st.binary(max_size=200))
def test_whatever_parses_is_either_refused_or_within_bounds(data: bytes) -> None:
    made = pb.GenerateRequest()
    try:
        made.ParseFromString(data)
    except Exception:  # noqa: BLE001 - not a message at all
        return
    try:
        spec = validate_generate(made, LIMITS, fallback_seed=0)
    except InvalidRequest:
        return
    sampling = spec.sampling
    assert sampling.temperature == 0 or validate.MIN_TEMPERATURE <= sampling.temperature < INF
    assert 0 <= sampling.top_k < LIMITS.vocab_size
    assert all(token_id < LIMITS.vocab_size for token_id in sampling.stop_token_ids)
    assert spec.max_tokens is None or spec.max_tokens >= max(1, sampling.min_tokens)


def test_bytes_a_token_are_bounded_however_long_the_longest_token_is() -> None:
    limits = dataclasses.replace(LIMITS, longest_token_bytes=256)
    assert violations(request("x" * 1600), limits) == {}
    assert violations(request("x" * 1601), limits) == {
        "text": "has 1601 bytes; this server accepts 1600"
    }
