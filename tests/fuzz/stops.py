"""Stop strings, against a matcher that looks at the whole text each time."""

from __future__ import annotations

from tests.fuzz.target import Target
from tokenloom.scheduler.front.stops import StopScanner, StopStrings

_NUM_LETTERS = 3
"""Few, so that strings overlap with themselves and each other."""


def run(data: bytes) -> None:
    """Reads bytes as strings and pieces of text, each ended by 255, behind a byte of numbers."""
    pieces = [_letters(part) for part in data[1:].split(b"\xff")]
    num_strings = 1 + (data[0] % 4 if data else 0)
    num_deaf = data[0] // 4 % 4 if data else 0
    strings = tuple(dict.fromkeys(each for each in pieces[:num_strings] if each))
    if strings:
        check(strings, pieces[num_strings:], num_deaf)


def check(strings: tuple[str, ...], pieces: list[str], num_deaf: int) -> None:
    """Feeds pieces, of which the first so many may not stop, and compares after each."""
    scanner = StopScanner(StopStrings(strings))
    text = final = ""
    for place, piece in enumerate(pieces):
        released, match = scanner.feed(piece, may_stop=place >= num_deaf)
        final += released
        found = _first_match(strings, text, piece) if place >= num_deaf else None
        text += piece
        if found is not None:
            end, string = found
            assert match == string, (match, string)
            assert final == text[: end - len(string)]
            return
        assert match is None, match
        assert final == text[: len(text) - _num_held(strings, text)]
    assert final + scanner.flush() == text


def _first_match(strings: tuple[str, ...], text: str, piece: str) -> tuple[int, str] | None:
    """Returns where the first string that completes in the piece ends, the longest of them."""
    whole = text + piece
    for end in range(len(text) + 1, len(whole) + 1):
        ending = [string for string in strings if whole[:end].endswith(string)]
        if ending:
            return end, max(ending, key=len)
    return None


def _num_held(strings: tuple[str, ...], text: str) -> int:
    """Returns how much of the end may still become a string."""
    return max(
        length
        for string in strings
        for length in range(len(string))
        if text.endswith(string[:length])
    )


def _letters(part: bytes) -> str:
    return "".join(chr(ord("a") + byte % _NUM_LETTERS) for byte in part)


TARGET = Target(
    run=run,
    seeds=[
        b"\x02ab\xffaba\xffbab\xffaabab\xffa\xffb",
        b"\x05aaa\xffaa\xffa\xffaaaa\xffaaa",
        b"\x00abcabd\xffabcab\xffcabd",
    ],
    max_bytes=256,
)
