"""The one validator: every field of every request, before anything is allocated.

Pure: what it needs of the server stands in `Limits`. It collects all that is
wrong with a request and raises one InvalidRequest. Lengths in tokens of text
and chat prompts are known only after tokenization: `fit` checks them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokenloom.scheduler.front.errors import InvalidRequest, Violation
from tokenloom.v1 import inference_pb2 as pb
from tokenloom.wire.messages import SamplingParams

MAX_CHAT_MESSAGES = 1024
MAX_ROLE_BYTES = 64
MAX_LOGIT_BIASES = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_STOP_TOKEN_IDS = 32
MAX_TOP_LOGPROBS = 20
MAX_PROMPT_BYTES = 32 * 1024 * 1024
"""Also what a request message may have."""
MAX_BYTES_PER_TOKEN = 16
"""Of a prompt, on average: text has 4, code with deep indentation 6. What has more than this is
made to take memory: tokenizers take some 450 bytes for each, however few tokens come out."""
MIN_TEMPERATURE = 1e-4
"""A lower one draws as greedy does, and its reciprocal overflows: it counts as 0."""
MIN_REPETITION_PENALTY = 0.01
MAX_PRIORITY = 100
"""The least one is its negation."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the served model and this server allow."""

    vocab_size: int
    """Token ids lie below it: the width of the logits."""
    max_model_tokens: int
    """Longest prompt + completion."""
    longest_token_bytes: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    max_tokens: int | None = None
    """Of a completion, for the tenant that asks; None: as many as fit."""

    @property
    def max_prompt_bytes(self) -> int:
        """A longer text has more tokens than fit, or is made of nothing but the longest."""
        token_bytes = min(self.longest_token_bytes, MAX_BYTES_PER_TOKEN)
        return min(MAX_PROMPT_BYTES, self.max_model_tokens * token_bytes)


@dataclass(frozen=True, kw_only=True)
class TextPrompt:
    """A prompt of plain text."""

    text: str
    field: str = "text"


@dataclass(frozen=True, kw_only=True)
class TokenPrompt:
    """A prompt of token ids."""

    ids: NDArray[np.int32]  # [num_prompt_tokens]
    field: str = "tokens.ids"


@dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """A prompt of (role, content) messages."""

    messages: tuple[tuple[str, str], ...]
    field: str = "chat.messages"


Prompt: TypeAlias = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What the client has of a completion that it wants to go on."""

    fingerprint: str
    token_ids: NDArray[np.int32]  # [num_tokens]
    num_text_bytes: int
    """In UTF-8."""


@dataclass(frozen=True, kw_only=True)
class GenerateSpec:
    """A Generate request whose fields are all in range, defaults applied."""

    prompt: Prompt
    sampling: SamplingParams
    max_tokens: int | None
    """None: as many as the context leaves room for."""
    stop_strings: tuple[str, ...]
    skip_special_tokens: bool
    beginning: Beginning | None
    """None: the completion is a new one."""
    priority: int


class _Violations:
    """Collects what is wrong."""

    def __init__(self) -> None:
        self._found: list[Violation] = []
        self._is_all_length = True

    def add(self, field: str, description: str, *, is_length: bool = False) -> None:
        self._found.append(Violation(field=field, description=description))
        self._is_all_length &= is_length

    def check(self, is_right: bool, field: str, description: str) -> bool:  # noqa: FBT001 - a condition
        if not is_right:
            self.add(field, description)
        return is_right

    def raise_if_any(self) -> None:
        if self._found:
            reason = "PROMPT_TOO_LONG" if self._is_all_length else "INVALID_REQUEST"
            raise InvalidRequest(self._found, reason)


def validate_generate(
    request: pb.GenerateRequest, limits: Limits, *, fallback_seed: int
) -> GenerateSpec:
    """Returns the request with defaults applied. Raises InvalidRequest."""
    found = _Violations()
    prompt = _prompt(request, limits, found)
    sampling = _sampling(request, limits, found, fallback_seed=fallback_seed)
    stopping = request.stopping
    max_tokens = stopping.max_tokens if stopping.HasField("max_tokens") else None
    if max_tokens is not None:
        found.check(
            max_tokens >= 1, "stopping.max_tokens", f"is {max_tokens}; it must be at least 1"
        )
        found.check(
            limits.max_tokens is None or max_tokens <= limits.max_tokens,
            "stopping.max_tokens",
            f"is {max_tokens}; this tenant may have {limits.max_tokens}",
        )
        found.check(
            stopping.min_tokens <= max_tokens,
            "stopping.min_tokens",
            f"is {stopping.min_tokens}; it must not exceed max_tokens, which is {max_tokens}",
        )
    elif limits.max_tokens is not None:
        found.check(
            stopping.min_tokens <= limits.max_tokens,
            "stopping.min_tokens",
            f"is {stopping.min_tokens}; this tenant may have {limits.max_tokens} tokens",
        )
    stop_strings = _stop_strings(stopping.stop_strings, found)
    beginning = _beginning(request, limits, found)
    found.check(
        -MAX_PRIORITY <= request.priority <= MAX_PRIORITY,
        "priority",
        f"is {request.priority}; it must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]",
    )
    if isinstance(prompt, TokenPrompt):
        num_tokens = len(request.tokens.ids)
        _lengths(num_tokens, prompt.field, sampling.min_tokens, max_tokens, limits, found)
    found.raise_if_any()
    assert prompt is not None
    return GenerateSpec(
        prompt=prompt,
        sampling=sampling,
        max_tokens=max_tokens,
        stop_strings=stop_strings,
        skip_special_tokens=_default_true(request.output),
        beginning=beginning,
        priority=request.priority,
    )


def fit(spec: GenerateSpec, num_prompt_tokens: int, limits: Limits) -> int:
    """Returns the most tokens to complete. Raises InvalidRequest if the context has no room.

    Who names no number gets what the context, or the tenant's limit, leaves.
    """
    found = _Violations()
    _lengths(
        num_prompt_tokens,
        spec.prompt.field,
        spec.sampling.min_tokens,
        spec.max_tokens,
        limits,
        found,
    )
    found.raise_if_any()
    room = limits.max_model_tokens - num_prompt_tokens
    return spec.max_tokens or min(room, limits.max_tokens or room)


def validate_tokenize(request: pb.TokenizeRequest, limits: Limits) -> TextPrompt | ChatPrompt:
    """Returns what to tokenize. Raises InvalidRequest."""
    found = _Violations()
    prompt = _prompt(request, limits, found, may_be_empty=True)
    found.raise_if_any()
    assert isinstance(prompt, TextPrompt | ChatPrompt)
    return prompt


def validate_detokenize(request: pb.DetokenizeRequest, limits: Limits) -> tuple[list[int], bool]:
    """Returns (token ids, skip_special_tokens). Raises InvalidRequest."""
    found = _Violations()
    ids = list(request.token_ids)
    if found.check(
        len(ids) <= limits.max_model_tokens,
        "token_ids",
        f"has {len(ids)} tokens; this server accepts {limits.max_model_tokens}",
    ):
        _token_ids(ids, "token_ids", limits, found)
    found.raise_if_any()
    return ids, _default_true(request)


def _default_true(message: pb.Output | pb.DetokenizeRequest) -> bool:
    return message.skip_special_tokens if message.HasField("skip_special_tokens") else True


def _prompt(
    request: pb.GenerateRequest | pb.TokenizeRequest,
    limits: Limits,
    found: _Violations,
    *,
    may_be_empty: bool = False,
) -> Prompt | None:
    form = request.WhichOneof("prompt")
    if form == "text":
        num_bytes = len(request.text.encode())
        found.check(
            may_be_empty or num_bytes > 0, "text", "is empty; a prompt has a token at least"
        )
        _prompt_bytes(num_bytes, "text", limits, found)
        return TextPrompt(text=request.text)
    if form == "chat":
        return _chat(request.chat, limits, found)
    if form == "tokens":
        assert isinstance(request, pb.GenerateRequest)
        ids = request.tokens.ids
        if len(ids) >= limits.max_model_tokens:  # `_lengths` tells it; no need to copy them
            return TokenPrompt(ids=np.empty(0, np.int32))
        _token_ids(ids, "tokens.ids", limits, found)
        return TokenPrompt(ids=np.asarray(ids, np.uint32).astype(np.int32))
    forms = [field.name for field in request.DESCRIPTOR.oneofs_by_name["prompt"].fields]
    found.add("prompt", f"is absent; set one of {', '.join(forms)}")
    return None


def _chat(chat: pb.Chat, limits: Limits, found: _Violations) -> ChatPrompt:
    field = "chat.messages"
    found.check(
        limits.has_chat_template, "chat", "the served model has no chat template; send text instead"
    )
    num_messages = len(chat.messages)
    found.check(num_messages > 0, field, "is empty; a chat has a message at least")
    if not found.check(
        num_messages <= MAX_CHAT_MESSAGES,
        field,
        f"has {num_messages} messages; this server accepts {MAX_CHAT_MESSAGES}",
    ):
        return ChatPrompt(messages=())
    messages = tuple((message.role, message.content) for message in chat.messages)
    for place, (role, _) in enumerate(messages):
        num_bytes = len(role.encode())
        found.check(
            1 <= num_bytes <= MAX_ROLE_BYTES,
            f"{field}[{place}].role",
            f"has {num_bytes} bytes; it must have 1 to {MAX_ROLE_BYTES}",
        )
    _prompt_bytes(sum(len(content.encode()) for _, content in messages), field, limits, found)
    return ChatPrompt(messages=messages)


def _beginning(request: pb.GenerateRequest, limits: Limits, found: _Violations) -> Beginning | None:
    if not request.HasField("resume_from"):
        return None
    given, field = request.resume_from, "resume_from.token_ids"
    lacking = "is absent; what goes on needs that of its Admission"
    found.check(request.sampling.HasField("seed"), "sampling.seed", lacking)
    if not found.check(request.stopping.HasField("max_tokens"), "stopping.max_tokens", lacking):
        return None
    num_tokens = len(given.token_ids)
    most = min(request.stopping.max_tokens, limits.max_model_tokens)
    if not found.check(
        num_tokens <= most, field, f"has {num_tokens} tokens; at most {most} may be"
    ):
        return None
    _token_ids(given.token_ids, field, limits, found)
    return Beginning(
        fingerprint=given.fingerprint,
        token_ids=np.asarray(given.token_ids, np.uint32).astype(np.int32),
        num_text_bytes=given.num_text_bytes,
    )


def _prompt_bytes(num_bytes: int, field: str, limits: Limits, found: _Violations) -> None:
    if num_bytes > limits.max_prompt_bytes:
        found.add(
            field,
            f"has {num_bytes} bytes; this server accepts {limits.max_prompt_bytes}",
            is_length=True,
        )


def _token_ids(ids: Sequence[int], field: str, limits: Limits, found: _Violations) -> None:
    largest = max(ids, default=0)
    found.check(
        largest < limits.vocab_size,
        field,
        f"holds {largest}; token ids of this model are below {limits.vocab_size}",
    )


def _lengths(
    num_prompt_tokens: int,
    prompt_field: str,
    min_tokens: int,
    max_tokens: int | None,
    limits: Limits,
    found: _Violations,
) -> None:
    """Checks that prompt and completion fit the context together."""
    most = limits.max_model_tokens
    room = most - num_prompt_tokens
    if num_prompt_tokens == 0:
        found.add(prompt_field, "has 0 tokens; a prompt has a token at least")
    elif num_prompt_tokens > most:
        found.add(
            prompt_field,
            f"prompt has {num_prompt_tokens} tokens; this server accepts {most}",
            is_length=True,
        )
    elif room == 0:
        found.add(
            prompt_field,
            f"prompt has {num_prompt_tokens} tokens; this server accepts {most} "
            "with the completion, which has a token at least",
            is_length=True,
        )
    elif max_tokens is not None and max_tokens > room:
        found.add(
            "stopping.max_tokens",
            f"is {max_tokens} and the prompt has {num_prompt_tokens} tokens; "
            f"this server accepts {most} together",
            is_length=True,
        )
    elif max_tokens is None and min_tokens > room:
        found.add(
            "stopping.min_tokens",
            f"is {min_tokens} and the prompt has {num_prompt_tokens} tokens; "
            f"this server accepts {most} together",
            is_length=True,
        )


def _sampling(
    request: pb.GenerateRequest, limits: Limits, found: _Violations, *, fallback_seed: int
) -> SamplingParams:
    given = request.sampling
    numbers = _Numbers(given, found)
    temperature = numbers.read("temperature", 1.0, 0.0, math.inf)
    top_k = given.top_k
    output = request.output
    num_top_logprobs = output.num_top_logprobs if output.HasField("num_top_logprobs") else None
    found.check(
        (num_top_logprobs or 0) <= MAX_TOP_LOGPROBS,
        "output.num_top_logprobs",
        f"is {num_top_logprobs}; this server accepts {MAX_TOP_LOGPROBS}",
    )
    return SamplingParams(
        temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
        top_p=numbers.read("top_p", 1.0, 0.0, 1.0, above_low=True),
        top_k=top_k if top_k < limits.vocab_size else 0,
        min_p=numbers.read("min_p", 0.0, 0.0, 1.0),
        presence_penalty=numbers.read("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=numbers.read("frequency_penalty", 0.0, -2.0, 2.0),
        repetition_penalty=numbers.read("repetition_penalty", 1.0, MIN_REPETITION_PENALTY, 10.0),
        seed=given.seed if given.HasField("seed") else fallback_seed,
        min_tokens=request.stopping.min_tokens,
        stop_token_ids=_stop_token_ids(request.stopping, limits, found),
        logit_bias=_logit_bias(given.logit_bias, limits, found),
        num_top_logprobs=num_top_logprobs,
    )


class _Numbers:
    """Reads the optional numbers of Sampling within their ranges."""

    def __init__(self, sampling: pb.Sampling, found: _Violations) -> None:
        self._sampling = sampling
        self._found = found

    def read(
        self, name: str, default: float, low: float, high: float, *, above_low: bool = False
    ) -> float:
        if not self._sampling.HasField(name):  # type: ignore[arg-type]  # one of the stub's literals
            return default
        number: float = getattr(self._sampling, name)
        # A proto float has 24 bits: compare with the bounds as the client could send them.
        is_within = np.float32(low) <= number <= np.float32(high) and math.isfinite(number)
        bounds = f"{'above' if above_low else 'at least'} {low:g}"
        if math.isfinite(high):
            bounds += f" and at most {high:g}"
        self._found.check(
            bool(is_within) and not (above_low and number == low),
            f"sampling.{name}",
            f"is {number:g}; it must be {bounds}" + ("" if math.isfinite(high) else " and finite"),
        )
        return number


def _stop_token_ids(stopping: pb.Stopping, limits: Limits, found: _Violations) -> tuple[int, ...]:
    """Returns the ids that end the completion, the model's own among them."""
    ids = stopping.stop_token_ids
    field = "stopping.stop_token_ids"
    if found.check(
        len(ids) <= MAX_STOP_TOKEN_IDS,
        field,
        f"has {len(ids)} entries; this server accepts {MAX_STOP_TOKEN_IDS}",
    ):
        _token_ids(ids, field, limits, found)
    own = () if stopping.ignore_eos else limits.eos_token_ids
    return tuple(dict.fromkeys((*own, *ids)))


def _stop_strings(strings: Sequence[str], found: _Violations) -> tuple[str, ...]:
    field = "stopping.stop_strings"
    if not found.check(
        len(strings) <= MAX_STOP_STRINGS,
        field,
        f"has {len(strings)} entries; this server accepts {MAX_STOP_STRINGS}",
    ):
        return ()
    for place, string in enumerate(strings):
        num_bytes = len(string.encode())
        found.check(
            1 <= num_bytes <= MAX_STOP_STRING_BYTES,
            f"{field}[{place}]",
            f"has {num_bytes} bytes; it must have 1 to {MAX_STOP_STRING_BYTES}",
        )
    return tuple(strings)


def _logit_bias(
    biases: Mapping[int, float], limits: Limits, found: _Violations
) -> tuple[tuple[int, float], ...]:
    field = "sampling.logit_bias"
    if not found.check(
        len(biases) <= MAX_LOGIT_BIASES,
        field,
        f"has {len(biases)} entries; this server accepts {MAX_LOGIT_BIASES}",
    ):
        return ()
    entries = tuple(sorted(biases.items()))
    _token_ids([token_id for token_id, _ in entries], field, limits, found)
    for token_id, bias in entries:
        found.check(
            -100.0 <= bias <= 100.0,
            f"{field}[{token_id}]",
            f"is {bias:g}; it must be at least -100 and at most 100",
        )
    return entries
