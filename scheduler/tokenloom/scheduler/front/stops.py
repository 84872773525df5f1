"""Stop strings: found wherever they span tokens, and never leaked.

    stop strings   "END", "NO"
    pieces         "the E"   "N"    "D of"
    released       "the "    ""     match "END": nothing of it was released
    held           "E"       "EN"

The match that *completes* first wins, of several that complete at one
character the longest: so the result does not depend on how the text was cut
into pieces.
"""

from __future__ import annotations

from functools import lru_cache


class StopStrings:
    """Stop strings with what Knuth, Morris and Pratt need of each; shared and never changed.

    string    a b a b c         after 4 characters "abab" the longest prefix
    borders   0 0 0 1 2 0       that "abab" also ends with has 2: "ab"
    """

    __slots__ = ("borders", "firsts", "strings")

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.strings = strings
        self.borders = tuple(_borders(string) for string in strings)
        """By string and number of characters matched: how many still are if the next differs."""
        self.firsts = frozenset(string[0] for string in strings)


@lru_cache(maxsize=256)
def stop_strings(strings: tuple[str, ...]) -> StopStrings:
    """Returns the prepared strings; services send the same ones again and again."""
    return StopStrings(strings)


class StopScanner:
    """The text of one stream on its way through its stop strings."""

    __slots__ = ("_held", "_matched", "_stops")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._matched = [0] * len(stops.strings)
        """By string: how many of its characters the text so far ends with."""
        self._held = ""
        """The end of the text that may still become a stop string."""

    def feed(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Takes the next piece; returns the text that became final and the match, if any.

        With a match, the text ends right before it and what follows is
        dropped. A stop string that completes while `may_stop` is false is
        ordinary text.
        """
        if not self._held and self._stops.firsts.isdisjoint(text):
            return text, None
        num_held = len(self._held)
        buffer = self._held + text
        for end, char in enumerate(text, num_held + 1):
            match = self._step(char)
            if match is not None and may_stop:
                self._held = ""
                return buffer[: end - len(match)], match
        cut = len(buffer) - max(self._matched)
        self._held = buffer[cut:]
        return buffer[:cut], None

    def flush(self) -> str:
        """Returns what is held: no more text comes that could complete it."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> str | None:
        """Takes one character; returns the longest string that it completes."""
        match: str | None = None
        for place, string in enumerate(self._stops.strings):
            borders = self._stops.borders[place]
            matched = self._matched[place]
            while matched and string[matched] != char:
                matched = borders[matched]
            if string[matched] == char:
                matched += 1
            if matched == len(string):
                matched = borders[matched]  # from here on it may only overlap
                if match is None or len(string) > len(match):
                    match = string
            self._matched[place] = matched
        return match


def _borders(string: str) -> list[int]:
    """Returns, for each length of a prefix, the longest proper prefix that it also ends with."""
    borders = [0] * (len(string) + 1)
    matched = 0
    for length in range(2, len(string) + 1):
        char = string[length - 1]
        while matched and string[matched] != char:
            matched = borders[matched]
        if string[matched] == char:
            matched += 1
        borders[length] = matched
    return borders
