"""Token ids to text while they come: whole characters only, equal to a full decode.

Two ways, chosen by the tokenizer's decoder:

- byte-level BPE (Llama 3, Qwen, GPT-2): a table of each token's bytes and an
  incremental UTF-8 decoder; 0.2-0.7 us a token.
- anything else (SentencePiece with byte fallback, WordPiece): a window of ids
  around the end of the text is decoded again at each step. The library's own
  `DecodeStream` is not used: it raises on a run of byte tokens that turns out
  to be no valid UTF-8, because the full decode then takes back characters
  that the run had shown before.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Detokenizer(Protocol):
    """The text side of one stream."""

    def feed(self, ids: Sequence[int]) -> str:
        """Takes the next ids; returns the text that became final."""

    def flush(self) -> str:
        """Returns the rest: an incomplete character becomes U+FFFD, as in a full decode."""


class DetokenizerFactory:
    """Makes detokenizers of one tokenizer; its tables are built once.

    `factory.new(skip_special_tokens=…)` then joined over all ids equals
    `tokenizer.decode(ids, skip_special_tokens=…)`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[bool, dict[int, bytes]] = {}
        self._windows: dict[bool, _WindowRules] = {}
        decoder = json.loads(tokenizer.to_str())["decoder"]
        for skip_special_tokens in (False, True):
            visible = _visible_tokens(tokenizer, skip_special_tokens=skip_special_tokens)
            if decoder is not None and decoder["type"] == "ByteLevel":
                self._pieces[skip_special_tokens] = {
                    token_id: _byte_level_bytes(token) for token_id, token in visible.items()
                }
            else:
                self._windows[skip_special_tokens] = _WindowRules(
                    visible, decoder, skip_special_tokens=skip_special_tokens
                )

    def new(self, *, skip_special_tokens: bool) -> Detokenizer:
        """Returns the detokenizer of one stream."""
        if self._pieces:
            return ByteLevelDetokenizer(self._pieces[skip_special_tokens])
        return WindowDetokenizer(self._tokenizer, self._windows[skip_special_tokens])


class ByteLevelDetokenizer:
    """Joins the bytes of tokens and decodes what is complete."""

    __slots__ = ("_decode", "_pieces")

    def __init__(self, pieces: dict[int, bytes]) -> None:
        self._pieces = pieces
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def feed(self, ids: Sequence[int]) -> str:
        """Takes the next ids; returns the text that became final."""
        get = self._pieces.get
        return self._decode(b"".join([get(token_id, b"") for token_id in ids]))

    def flush(self) -> str:
        """Returns the rest."""
        return self._decode(b"", True)


class _WindowRules:
    """Which tokens a window must hold back or can ignore."""

    def __init__(
        self,
        visible: dict[int, str],
        decoder: dict[str, object] | None,
        *,
        skip_special_tokens: bool,
    ) -> None:
        kinds = json.dumps(decoder)
        self.skip_special_tokens = skip_special_tokens
        self.visible = frozenset(visible)
        self.byte_tokens = frozenset(
            token_id
            for token_id, token in visible.items()
            if '"ByteFallback"' in kinds and _BYTE_TOKEN.fullmatch(token)
        )
        self.may_end_inside_character = '"ByteLevel"' in kinds
        """Only such a decoder shows half a character as a trailing U+FFFD."""


class WindowDetokenizer:
    """Decodes a window of ids again and returns what it grew by.

        ids      … a b c │ d e f        window: the ids behind the last text that was
        text     ……………… │ final        returned (context: a decoder treats the first
                   shown │ new          token of a text differently) and all ids since

    A run of byte tokens is held until it ends: the full decode shows each of
    its bytes as U+FFFD if the run as a whole is not valid UTF-8.
    """

    __slots__ = ("_new", "_rules", "_shown", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer, rules: _WindowRules) -> None:
        self._tokenizer = tokenizer
        self._rules = rules
        self._window: list[int] = []
        self._shown = ""
        self._new: list[int] = []

    def feed(self, ids: Sequence[int]) -> str:
        """Takes the next ids; returns the text that became final."""
        visible = self._rules.visible
        self._new += [token_id for token_id in ids if token_id in visible]
        if not self._new or self._new[-1] in self._rules.byte_tokens:
            return ""
        text = self._decode(self._window + self._new)
        if self._rules.may_end_inside_character and text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """Returns the rest."""
        return self._advance(self._decode(self._window + self._new)) if self._new else ""

    def _advance(self, text: str) -> str:
        piece = text[len(self._shown) :]
        context = self._decode(self._new)
        if context:
            self._window, self._shown = self._new, context
        else:  # too little to stand for what came before
            self._window, self._shown = self._window + self._new, text
        self._new = []
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._rules.skip_special_tokens)


def _visible_tokens(tokenizer: Tokenizer, *, skip_special_tokens: bool) -> dict[int, str]:
    """Returns the tokens that a decode considers, by id."""
    visible = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        visible[token_id] = token.content
        if token.special and skip_special_tokens:
            del visible[token_id]
    return visible


def _byte_alphabet() -> dict[str, int]:
    """Returns GPT-2's printable stand-in of each byte.

    Bytes that print in Latin-1 stand for themselves; the others take the code
    points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_ALPHABET[char] for char in token])
    except KeyError:  # an added token with a character outside the alphabet stands for itself
        return token.encode()
