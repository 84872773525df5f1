"""A look at a request's bytes before they become a message.

Two bytes on the wire become an object of a hundred: 40 MiB of empty chat messages would take
1.4 GiB and stop the event loop for 2 s, only to be refused then. So the parts of a large message
are measured first, without building anything. A small one is not worth the look.

    GenerateRequest   text │ tokens │ chat: at most 1024 messages │ resume_from │ all else: 64 KiB
"""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import Message

from tokenloom.scheduler.front.errors import InvalidRequest, Violation
from tokenloom.scheduler.front.validate import MAX_CHAT_MESSAGES, Limits

SMALL_BYTES = 64 * 1024
"""What such a message can become is harmless; what all small fields may have together."""
_MAX_PARTS = 4096
"""Fields at the top of a large message; generated code writes each once, packed."""
_TOKEN_BYTES = 6
"""A token id takes no more, packed or not."""

_FIELDS = {
    "tokens": "tokens.ids",
    "resume_from": "resume_from.token_ids",
    "token_ids": "token_ids",
}
"""What is large in them."""
_FIXED_BYTES = {1: 8, 5: 4}
"""By wire type. Source: https://protobuf.dev/programming-guides/encoding/"""


def screen(request_type: type[Message], data: bytes, limits: Limits) -> None:
    """Refuses what would be too large once it is parsed. Raises InvalidRequest."""
    if len(data) <= SMALL_BYTES:
        return
    tokens_bytes = SMALL_BYTES + _TOKEN_BYTES * limits.max_model_tokens
    names = {number: each.name for number, each in request_type.DESCRIPTOR.fields_by_number.items()}
    rest_bytes = num_messages = num_parts = 0
    try:
        for number, start, end in _parts(data, 0, len(data)):
            num_parts += 1
            _refuse_above(_MAX_PARTS, num_parts, "request", "parts")
            match names.get(number, "unknown fields"):
                case "text":
                    pass  # becomes what it is
                case "tokens" | "resume_from" | "token_ids" as name:
                    _refuse_above(tokens_bytes, end - start, _FIELDS[name], "bytes")
                case "chat":
                    for _ in _parts(data, start, end):
                        num_messages += 1
                        _refuse_above(MAX_CHAT_MESSAGES, num_messages, "chat.messages", "messages")
                case name:
                    rest_bytes += end - start
                    _refuse_above(SMALL_BYTES, rest_bytes, name, "bytes")
    except IndexError:
        name = request_type.DESCRIPTOR.full_name
        violation = Violation(field="request", description=f"is not readable as {name}")
        raise InvalidRequest([violation], "MALFORMED") from None


def _refuse_above(most: int, there: int, field: str, what: str) -> None:
    if there > most:
        description = f"has {there} {what} or more; this server accepts {most}"
        raise InvalidRequest([Violation(field=field, description=description)])


def _parts(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields (field number, where its content begins, where it ends).

    Raises IndexError for what is no message.
    """
    while start < end:
        tag, start = _varint(data, start, end)
        match tag & 7:
            case 0:
                _, stop = _varint(data, start, end)
            case 2:
                length, start = _varint(data, start, end)
                stop = start + length
            case kind if kind in _FIXED_BYTES:
                stop = start + _FIXED_BYTES[kind]
            case kind:
                raise IndexError(f"wire type {kind}")
        if stop > end:
            raise IndexError(f"a field ends at {stop} of {end}")
        yield tag >> 3, start, stop
        start = stop


def _varint(data: bytes, start: int, end: int) -> tuple[int, int]:
    """Returns a number and where it ends. Raises IndexError."""
    number = 0
    for place in range(10):
        if start + place >= end:
            break
        byte = data[start + place]
        number |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return number, start + place + 1
    raise IndexError("a number without an end")
