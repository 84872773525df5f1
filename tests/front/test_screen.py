"""What is too much to parse is refused unparsed; what is not comes through as it is."""

from __future__ import annotations

import tracemalloc
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from tests.front.harness import Front, refusal_of
from tokenloom.scheduler.front.errors import InvalidRequest
from tokenloom.scheduler.front.screen import SMALL_BYTES, screen
from tokenloom.scheduler.front.validate import Limits
from tokenloom.v1 import inference_pb2 as pb

LIMITS = Limits(
    vocab_size=1000,
    max_model_tokens=100_000,
    longest_token_bytes=10,
    eos_token_ids=(),
    has_chat_template=True,
)
MIB = 1024 * 1024


def varint(number: int) -> bytes:
    digits = []
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*digits, number])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


BOMBS = {
    "empty messages": (field(3, field(1, b"") * MIB), "chat.messages"),
    "empty stop strings": (field(5, field(3, b"") * MIB), "stopping"),
    "biases": (field(4, field(8, b"\x08\x05\x15\0\0\0\0") * MIB), "sampling"),
    "stop token ids": (field(5, b"\x20\x05" * MIB), "stopping"),
    "token ids, each by itself": (field(2, b"\x08\x05" * MIB), "tokens.ids"),
    "token ids": (field(2, field(1, b"\x05" * MIB)), "tokens.ids"),
    "a beginning": (field(7, field(2, b"\x05" * MIB)), "resume_from.token_ids"),
    "unknown fields": (field(1000, b"x" * MIB), "unknown fields"),
    "outputs": (field(6, b"") * MIB, "request"),
    "numbers": (b"\x40\x01" * MIB, "request"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_is_parsed(name: str) -> None:
    data, violated = BOMBS[name]
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest) as refusal:
            screen(pb.GenerateRequest, data, LIMITS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [violation.field for violation in refusal.value.violations] == [violated]
    assert peak < SMALL_BYTES


def test_messages_of_several_chats_count_together() -> None:
    half = field(3, field(1, b"\x12\x40" + b"x" * 64) * 600)
    screen(pb.GenerateRequest, half + field(1, b"x" * SMALL_BYTES), LIMITS)
    with pytest.raises(InvalidRequest, match="1025 messages or more"):
        screen(pb.GenerateRequest, half + half + field(1, b"x" * SMALL_BYTES), LIMITS)


@given(
    st.sampled_from(
        [b"\x0b", b"\x0e", b"\x0a\xff\xff\xff\xff\x7f", b"\xff" * 11, b"\x09\0", b"\x08"]
    )
)
def test_what_is_no_message_is_refused_as_the_parser_refuses_it(tail: bytes) -> None:
    data = field(1, b"x" * SMALL_BYTES) + tail
    with pytest.raises(InvalidRequest) as refusal:
        screen(pb.GenerateRequest, data, LIMITS)
    assert refusal.value.reason == "MALFORMED"
    with pytest.raises(DecodeError):
        pb.GenerateRequest.FromString(data)


def test_the_largest_requests_that_are_right_come_through() -> None:
    most = LIMITS.max_model_tokens
    requests = [
        pb.GenerateRequest(text="x" * 4 * MIB),
        pb.GenerateRequest(tokens=pb.TokenIds(ids=[2**32 - 1] * most)),
        pb.GenerateRequest(
            chat=pb.Chat(
                messages=[pb.ChatMessage(role="user" * 16, content="x" * 1000)] * 1024,
            ),
            sampling=pb.Sampling(logit_bias=dict.fromkeys(range(10**6, 10**6 + 1024), 1.0)),
            stopping=pb.Stopping(stop_strings=["x" * 256] * 16, stop_token_ids=[2**32 - 1] * 32),
            resume_from=pb.ResumeFrom(token_ids=[2**32 - 1] * most),
        ),
    ]
    for request in requests:
        screen(pb.GenerateRequest, request.SerializeToString(), LIMITS)
    detokenize = pb.DetokenizeRequest(token_ids=[2**32 - 1] * most)
    screen(pb.DetokenizeRequest, detokenize.SerializeToString(), LIMITS)


async def test_streams_go_on_while_bombs_come(front: Front) -> None:
    call: Any = front.channel.unary_stream("/tokenloom.v1.Inference/Generate")
    for data, violated in BOMBS.values():
        found = await refusal_of(call(data))
        assert found.code is grpc.StatusCode.INVALID_ARGUMENT
        assert found.fields == [violated]
    assert (await front.generate(max_tokens=3)).finish is not None
    assert len(front.core.submits) == 1
