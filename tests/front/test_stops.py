from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tokenloom.scheduler.front.stops import StopScanner, stop_strings

LETTERS = st.text("ab ", min_size=1, max_size=4)
STOPS = st.lists(LETTERS, min_size=1, max_size=4)
PIECES = st.lists(st.text("ab ", max_size=4), max_size=12)


def run(
    stops: Sequence[str], pieces: Sequence[str], min_pieces: int = 0
) -> tuple[str, str | None, int]:
    """Returns (text, match, number of pieces taken) of a whole stream."""
    scanner = StopScanner(stop_strings(tuple(stops)))
    text = ""
    for num_pieces, piece in enumerate(pieces, 1):
        final, match = scanner.feed(piece, may_stop=num_pieces >= min_pieces)
        text += final
        if match is not None:
            return text, match, num_pieces
    return text + scanner.flush(), None, len(pieces)


def naive(
    stops: Sequence[str], pieces: Sequence[str], min_pieces: int = 0
) -> tuple[str, str | None, int]:
    """The same by looking at every end of the text so far."""
    whole = "".join(pieces)
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    for num_pieces, (start, stop) in enumerate(pairwise(ends), 1):
        if num_pieces < min_pieces:
            continue
        for end in range(start + 1, stop + 1):
            matches = [string for string in stops if whole[:end].endswith(string)]
            if matches:
                longest = max(matches, key=len)
                return whole[: end - len(longest)], longest, num_pieces
    return whole, None, len(pieces)


@given(stops=STOPS, pieces=PIECES, min_pieces=st.integers(0, 6))
@example(stops=["aa"], pieces=["aa", "a", "b"], min_pieces=2)
@example(stops=["abab", "ba"], pieces=["a", "b", "a", "b"], min_pieces=0)
def test_scanner_equals_the_naive_model(
    stops: list[str], pieces: list[str], min_pieces: int
) -> None:
    assert run(stops, pieces, min_pieces) == naive(stops, pieces, min_pieces)


@given(stops=STOPS, text=st.text("ab ", max_size=24), data=st.data())
def test_result_does_not_depend_on_the_cuts(
    stops: list[str], text: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:stop] for start, stop in pairwise([0, *cuts, len(text)])]
    assert run(stops, pieces)[:2] == run(stops, [text])[:2]


@given(stops=STOPS, pieces=PIECES)
def test_no_part_of_a_stop_string_is_ever_released(stops: list[str], pieces: list[str]) -> None:
    scanner = StopScanner(stop_strings(tuple(stops)))
    released = seen = ""
    for piece in pieces:
        final, match = scanner.feed(piece)
        released, seen = released + final, seen + piece
        if match is not None:
            break
        held = seen.removeprefix(released)
        longest = max(
            (
                size
                for string in stops
                for size in range(1, len(string))
                if seen.endswith(string[:size])
            ),
            default=0,
        )
        assert len(held) == longest  # no less, and no more: text is not held back in vain


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "match"),
    [
        (["END"], ["the E", "N", "D of"], "the ", "END"),
        (["END"], ["the E", "N", "E"], "the ENE", None),
        (["bc", "abcd"], ["abcd"], "a", "bc"),  # the one that completes first
        (["b", "ab"], ["xab"], "x", "ab"),  # the longest of those that complete together
        (["日本"], ["これは日", "本語"], "これは", "日本"),
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb", "\n\n"),
    ],
)
def test_examples(stops: list[str], pieces: list[str], text: str, match: str | None) -> None:
    assert run(stops, pieces)[:2] == (text, match)
