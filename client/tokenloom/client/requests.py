"""What a caller asks, turned into the API's messages.

An option that is left out, or is None, is not sent: the server's default
applies. A 0 is sent as 0. Ranges are judged by the server alone, so that a
client never refuses what a newer server would take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypedDict

from tokenloom.v1 import inference_pb2 as pb


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    """A role that the checkpoint's template knows: system, user, assistant, tool."""
    content: str


Prompt: TypeAlias = str | Sequence[int]
"""Text, or token ids of the served model's vocabulary."""

ChatMessages: TypeAlias = Sequence[Message | Mapping[str, str]]
"""Turns of a chat; a mapping has the keys `role` and `content`."""


class Options(TypedDict, total=False):
    """How a completion is drawn, when it ends, and what its deltas carry.

    Keyword arguments of `generate` and `chat`; a dict of them can be kept and
    passed with `**`.
    """

    temperature: float | None
    """Divides the logits; 0 takes the likeliest token each time. Server's default: 1."""
    top_p: float | None
    """Keeps the smallest set of tokens whose probability reaches it, in (0, 1]. Default: 1."""
    top_k: int | None
    """Keeps the likeliest tokens; 0 keeps all. Default: 0."""
    min_p: float | None
    """Keeps tokens at least this many times as likely as the likeliest. Default: 0."""
    presence_penalty: float | None
    """Taken once from the logit of each token already in the completion. Default: 0."""
    frequency_penalty: float | None
    """Taken for each occurrence of a token in the completion. Default: 0."""
    repetition_penalty: float | None
    """Makes tokens of prompt and completion less likely where above 1. Default: 1."""
    logit_bias: Mapping[int, float] | None
    """Added to the logit of a token id."""
    seed: int | None
    """The same seed draws the same tokens. Default: the server chooses and tells one."""
    max_tokens: int | None
    """The most tokens to complete. Default: as many as the context leaves room for."""
    min_tokens: int | None
    """Before this many tokens no stop applies. Default: 0."""
    stop: str | Sequence[str] | None
    """The completion ends before the first of these strings."""
    stop_token_ids: Sequence[int] | None
    """The completion ends with the first of these tokens, beside the model's own."""
    ignore_eos: bool | None
    """The model's own end-of-sequence tokens do not end the completion. Default: false."""
    num_top_logprobs: int | None
    """Log probabilities of each token and of this many alternatives. Default: none."""
    skip_special_tokens: bool | None
    """Leaves special tokens out of the text. Default: true."""
    priority: int | None
    """Those with a larger one go first among the caller's own, in [-100, 100]. Default: 0."""


_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
)
_STOPPING = ("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos")
_OUTPUT = ("num_top_logprobs", "skip_special_tokens")
_QUEUE = ("priority",)

_MAPS = ("logit_bias",)
_LISTS = ("ids", "stop_strings", "stop_token_ids")


def text_request(prompt: Prompt, options: Options) -> pb.GenerateRequest:
    """Returns the request to complete a prompt.

    Raises TypeError for an unknown option or a value of another type, and
    ValueError for a number that its field cannot hold.
    """
    request = pb.GenerateRequest()
    if isinstance(prompt, str):
        request.text = prompt
    else:
        # An empty prompt must still say that it is one of tokens.
        request.tokens.SetInParent()
        _set(request.tokens, "ids", prompt, name="prompt")
    return _with_options(request, options)


def chat_request(messages: ChatMessages, options: Options) -> pb.GenerateRequest:
    """Returns the request to answer a chat. Raises as `text_request` does."""
    return _with_options(pb.GenerateRequest(chat=encode_chat(messages)), options)


def encode_chat(messages: ChatMessages) -> pb.Chat:
    """Returns the message for turns of a chat. Raises TypeError."""
    if isinstance(messages, str | Mapping | Message):
        raise TypeError(
            "messages is a list of turns, such as [{'role': 'user', 'content': 'Hello'}]; "
            "`generate` takes plain text"
        )
    return pb.Chat(messages=[_encode_turn(index, turn) for index, turn in enumerate(messages)])


def _encode_turn(index: int, turn: Message | Mapping[str, str]) -> pb.ChatMessage:
    if isinstance(turn, Message):
        return pb.ChatMessage(role=turn.role, content=turn.content)
    if set(turn) != {"role", "content"}:
        raise TypeError(
            f"messages[{index}] has the keys {sorted(turn)}; it must have `role` and `content`"
        )
    for name, value in turn.items():
        if not isinstance(value, str):
            raise TypeError(f"messages[{index}] has a {type(value).__name__} as {name}; it is text")
    return pb.ChatMessage(role=turn["role"], content=turn["content"])


def _with_options(request: pb.GenerateRequest, options: Options) -> pb.GenerateRequest:
    for name, value in options.items():
        if name in _SAMPLING:
            part: pb.Sampling | pb.Stopping | pb.Output | pb.GenerateRequest = request.sampling
        elif name in _STOPPING:
            part = request.stopping
        elif name in _OUTPUT:
            part = request.output
        elif name in _QUEUE:
            part = request
        else:
            known = ", ".join((*_SAMPLING, *_STOPPING, *_OUTPUT, *_QUEUE))
            raise TypeError(f"unknown option {name!r}; there are {known}")
        if value is None:
            continue
        if name == "stop":
            _set(part, "stop_strings", [value] if isinstance(value, str) else value, name=name)
        else:
            _set(part, name, value, name=name)
    return request


def _set(
    part: pb.Sampling | pb.Stopping | pb.Output | pb.TokenIds | pb.GenerateRequest,
    field: str,
    value: object,
    *,
    name: str,
) -> None:
    try:
        if field in _MAPS:
            getattr(part, field).update(value)
        elif field in _LISTS:
            getattr(part, field).extend(value)
        else:
            setattr(part, field, value)
    except ValueError as error:
        # protobuf does not say which field it was.
        raise ValueError(f"{name}: {error}") from error
    except (AttributeError, TypeError) as error:
        raise TypeError(f"{name}: {error}") from error
