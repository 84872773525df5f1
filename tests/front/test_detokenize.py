from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from tests.front.checkpoints import byte_fallback_tokenizer, byte_level_tokenizer
from tokenloom.scheduler.front.detokenize import (
    ByteLevelDetokenizer,
    DetokenizerFactory,
    WindowDetokenizer,
)

KINDS = ("byte_level", "llama2", "gemma", "metaspace", "byte_level_in_sequence", "none")


@cache
def make(kind: str) -> tuple[Tokenizer, DetokenizerFactory]:
    match kind:
        case "byte_level":
            tokenizer = byte_level_tokenizer()
        case "llama2":
            tokenizer = byte_fallback_tokenizer()
        case "gemma":
            parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            tokenizer = byte_fallback_tokenizer(decoders.Sequence(parts))
        case "metaspace":
            tokenizer = byte_fallback_tokenizer(decoders.Metaspace())
        case "byte_level_in_sequence":
            tokenizer = byte_level_tokenizer()
            tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
        case _:
            tokenizer = byte_fallback_tokenizer()
            tokenizer.decoder = None
    return tokenizer, DetokenizerFactory(tokenizer)


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Random ids, a few ids again and again, real text; some ids are unknown to the tokenizer."""
    size = tokenizer.get_vocab_size()
    any_id = st.integers(0, size + 2)
    few_ids = st.lists(any_id, min_size=1, max_size=4).flatmap(
        lambda pool: st.lists(st.sampled_from(pool), max_size=24)
    )
    text = st.text("abé日🎉 \n", max_size=12).map(lambda text: tokenizer.encode(text).ids)
    return st.one_of(st.lists(any_id, max_size=24), few_ids, text)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip_special_tokens=st.booleans())
def test_pieces_join_to_the_full_decode(
    kind: str, data: st.DataObject, skip_special_tokens: bool
) -> None:
    tokenizer, factory = make(kind)
    ids = data.draw(ids_of(tokenizer))
    detokenizer = factory.new(skip_special_tokens=skip_special_tokens)
    whole = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    text, place = "", 0
    while place < len(ids):
        size = data.draw(st.integers(1, 4))
        text += detokenizer.feed(ids[place : place + size])
        place += size
        assert whole.startswith(text)  # nothing is taken back later
    assert text + detokenizer.flush() == whole


@pytest.mark.parametrize("kind", ["byte_level", "llama2"])
def test_half_a_character_is_never_emitted(kind: str) -> None:
    tokenizer, factory = make(kind)
    if kind == "byte_level":
        ids = tokenizer.encode("🎈").ids
    else:
        ids = [tokenizer.get_vocab()[f"<0x{byte:02X}>"] for byte in "🎈".encode()]
    assert len(ids) > 1
    detokenizer = factory.new(skip_special_tokens=True)
    pieces = [detokenizer.feed([token_id]) for token_id in ids]
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == "🎈"
    assert [piece for piece in pieces if piece] == ["🎈"]


def test_an_incomplete_character_at_the_end_is_a_replacement_character() -> None:
    tokenizer, factory = make("byte_level")
    ids = tokenizer.encode("🎈").ids[:-1]
    detokenizer = factory.new(skip_special_tokens=True)
    assert detokenizer.feed(ids) == ""
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}" == tokenizer.decode(ids)


def test_byte_level_tokenizers_take_the_table() -> None:
    for kind, expected in (("byte_level", ByteLevelDetokenizer), ("llama2", WindowDetokenizer)):
        _, factory = make(kind)
        assert isinstance(factory.new(skip_special_tokens=False), expected)
