"""Bytes → request → validation → what the core is given: refused by name, or right for the core."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from google.protobuf.message import DecodeError, Message

from tests.fuzz.target import Target
from tokenloom.scheduler.core import admission
from tokenloom.scheduler.core.state import Limits as CoreLimits
from tokenloom.scheduler.core.state import ModelSpec, State
from tokenloom.scheduler.front.errors import InvalidRequest
from tokenloom.scheduler.front.screen import _parts
from tokenloom.scheduler.front.validate import (
    GenerateSpec,
    Limits,
    TokenPrompt,
    fit,
    validate_detokenize,
    validate_generate,
    validate_tokenize,
)
from tokenloom.scheduler.messages import Commands, Submit, decode_from_front, encode
from tokenloom.v1 import inference_pb2 as pb

LIMITS = Limits(
    vocab_size=300,
    max_model_tokens=64,
    longest_token_bytes=8,
    eos_token_ids=(2,),
    has_chat_template=True,
)
SPEC = ModelSpec(
    epoch=1,
    vocab_size=LIMITS.vocab_size,
    max_model_tokens=LIMITS.max_model_tokens,
    max_step_tokens=64,
    block_size=16,
    num_blocks=4,
)


def run(data: bytes) -> None:
    """The first byte chooses the message."""
    kind, *_ = data[:1] or b"\0"
    validate: Callable[[Message], object]
    request_type, validate = _KINDS[kind % len(_KINDS)]
    body = data[1:]
    try:
        request = request_type.FromString(body)
    except DecodeError:
        return
    _look(body)
    try:
        valid = validate(request)
    except InvalidRequest as error:
        assert error.violations
        assert all(violation.field for violation in error.violations)
        return
    if isinstance(valid, GenerateSpec):
        _submit(valid)


def _look(body: bytes) -> None:
    """What can be parsed can be looked through, but for groups, which nobody sends."""
    try:
        ends = [end for _, _, end in _parts(body, 0, len(body))]
    except IndexError as error:
        assert "wire type" in str(error)
    else:
        assert not ends or ends[-1] == len(body)


def _submit(spec: GenerateSpec) -> None:
    """The core takes what the front let through."""
    tokens = spec.prompt.ids if isinstance(spec.prompt, TokenPrompt) else np.zeros(5, np.int32)
    try:
        max_tokens = fit(spec, len(tokens), LIMITS)
    except InvalidRequest:
        return
    num_completion_tokens = 0
    if spec.beginning is not None:
        num_completion_tokens = len(spec.beginning.token_ids)
        if num_completion_tokens >= max_tokens:
            return  # nothing is left to draw: the front ends it
        tokens = np.concatenate((tokens, spec.beginning.token_ids))
    submit = Submit(
        stream=1,
        tokens=tokens.tobytes(),
        max_tokens=max_tokens,
        sampling=spec.sampling,
        salt="",
        num_completion_tokens=num_completion_tokens,
    )
    state = State(
        CoreLimits(
            max_num_requests=2,
            max_mixed_prompt_tokens=None,
            max_waiting_requests=2,
            max_waiting_tokens=1000,
        )
    )
    admission.begin_epoch(state, SPEC)
    admission.submit(state, 0, submit, 0.0)
    assert not state.outputs_of(0).refused, state.outputs_of(0).refused
    assert state.check() == []
    commands = Commands(commands=(submit,))
    assert decode_from_front(encode(commands)) == commands


def _generate(request: Message) -> object:
    assert isinstance(request, pb.GenerateRequest)
    return validate_generate(request, LIMITS, fallback_seed=7)


def _tokenize(request: Message) -> object:
    assert isinstance(request, pb.TokenizeRequest)
    return validate_tokenize(request, LIMITS)


def _detokenize(request: Message) -> object:
    assert isinstance(request, pb.DetokenizeRequest)
    return validate_detokenize(request, LIMITS)


_KINDS: tuple[tuple[type[Message], Callable[[Message], object]], ...] = (
    (pb.GenerateRequest, _generate),
    (pb.TokenizeRequest, _tokenize),
    (pb.DetokenizeRequest, _detokenize),
)

_SAMPLING = pb.Sampling(
    temperature=0.5,
    top_p=0.9,
    top_k=5,
    min_p=0.1,
    presence_penalty=1,
    frequency_penalty=-1,
    repetition_penalty=1.1,
    logit_bias={3: 1.0, 299: -5.0},
    seed=2**64 - 1,
)
_STOPPING = pb.Stopping(
    max_tokens=20, min_tokens=2, stop_strings=["END", "é"], stop_token_ids=[4, 299]
)
TARGET = Target(
    run=run,
    seeds=[
        b"\0"
        + pb.GenerateRequest(
            tokens=pb.TokenIds(ids=[1, 2, 299]),
            sampling=_SAMPLING,
            stopping=_STOPPING,
            output=pb.Output(num_top_logprobs=20, skip_special_tokens=False),
            resume_from=pb.ResumeFrom(fingerprint="f", token_ids=[5, 6], num_text_bytes=3),
        ).SerializeToString(),
        b"\0" + pb.GenerateRequest(text="Hello", stopping=_STOPPING).SerializeToString(),
        b"\0"
        + pb.GenerateRequest(
            chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")]), sampling=_SAMPLING
        ).SerializeToString(),
        b"\1" + pb.TokenizeRequest(text="Hello").SerializeToString(),
        b"\2" + pb.DetokenizeRequest(token_ids=[1, 2, 3]).SerializeToString(),
    ],
)
