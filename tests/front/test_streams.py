from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.front.checkpoints import byte_level_tokenizer
from tokenloom.scheduler.front.detokenize import DetokenizerFactory
from tokenloom.scheduler.front.errors import (
    Absence,
    ClientTooSlow,
    EndedByOperator,
    RequestError,
    ServerFault,
    Unavailable,
)
from tokenloom.scheduler.front.stops import StopScanner, stop_strings
from tokenloom.scheduler.front.streams import Piece, Stream
from tokenloom.scheduler.messages import Finished, FinishReason

TOKENIZER = byte_level_tokenizer()
FACTORY = DetokenizerFactory(TOKENIZER)
STOP_TOKEN = TOKENIZER.get_vocab()["<|im_end|>"]


def make(
    *stops: str, min_tokens: int = 0, max_buffer_tokens: int = 100, told: list[int] | None = None
) -> Stream:
    return Stream(
        number=1,
        detokenizer=FACTORY.new(skip_special_tokens=False),
        scanner=StopScanner(stop_strings(stops)) if stops else None,
        min_tokens=min_tokens,
        stop_token_ids=frozenset({STOP_TOKEN}),
        max_buffer_tokens=max_buffer_tokens,
        on_stop=lambda _, num_tokens: None if told is None else told.append(num_tokens),
    )


def finished(num_tokens: int, reason: FinishReason = FinishReason.LENGTH) -> Finished:
    return Finished(
        stream=1,
        reason=reason,
        stop_token_id=STOP_TOKEN if reason is FinishReason.STOP_TOKEN else None,
        num_completion_tokens=num_tokens,
        queue_s=0.0,
        prefill_s=None,
        decode_s=None,
    )


def feed(stream: Stream, ids: Sequence[int]) -> None:
    for token_id in ids:
        stream.push(token_id, None)


async def take(stream: Stream) -> Piece:
    await stream.ready()
    return stream.take()


async def rest(stream: Stream) -> list[Piece]:
    pieces = [await take(stream)]
    while pieces[-1].end is None:
        pieces.append(await take(stream))
    return pieces


@given(
    ids=st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=40),
    reads=st.lists(st.integers(1, 6), max_size=40),
    stops=st.sampled_from([(), ("\x00\x00never",)]),
)
async def test_indices_are_contiguous_and_text_is_whole_however_writes_fall(
    ids: list[int], reads: list[int], stops: tuple[str, ...]
) -> None:
    ids = [token_id for token_id in ids if token_id != STOP_TOKEN]
    stream = make(*stops)
    stream.admit(0)
    pieces, place = [], 0
    for size in reads:
        if place < len(ids):
            feed(stream, ids[place : place + size])
            place += size
            pieces.append(await take(stream))
    feed(stream, ids[place:])
    stream.finish(finished(len(ids)))
    pieces += await rest(stream)
    seen: list[int] = []
    for piece in pieces:
        assert piece.first_index == len(seen)
        seen += piece.token_ids
    assert seen == ids
    assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(
        ids, skip_special_tokens=False
    )


async def test_all_that_gathered_during_a_write_goes_out_with_the_next() -> None:
    stream = make()
    stream.admit(5)
    assert await stream.admitted() == 5
    ids = TOKENIZER.encode("The quick brown fox").ids
    feed(stream, ids)
    piece = await take(stream)
    assert (piece.first_index, piece.token_ids, piece.text) == (0, ids, "The quick brown fox")
    feed(stream, ids)
    piece = await take(stream)
    assert (piece.first_index, piece.token_ids) == (len(ids), ids)
    assert piece.end is None


async def test_a_pause_follows_what_came_before_it_and_is_told_once() -> None:
    stream = make()
    stream.admit(0)
    feed(stream, [1, 2])
    stream.pause()
    piece = await take(stream)
    assert (piece.token_ids, piece.pauses) == ([1, 2], True)
    feed(stream, [3])
    assert not (await take(stream)).pauses


async def test_a_pause_that_is_over_before_the_client_reads_is_not_told() -> None:
    stream = make()
    stream.admit(0)
    feed(stream, [1])
    stream.pause()
    feed(stream, [2])
    assert not (await take(stream)).pauses
    stream.pause()
    stream.finish(finished(2))
    assert not (await take(stream)).pauses


@pytest.mark.parametrize("stops", [(), ("stop",)])
async def test_text_of_the_stop_token_is_not_delivered_but_its_id(stops: tuple[str, ...]) -> None:
    stream = make(*stops)
    stream.admit(0)
    ids = [*TOKENIZER.encode("The fox").ids, STOP_TOKEN]
    feed(stream, ids)
    stream.finish(finished(len(ids), FinishReason.STOP_TOKEN))
    (piece,) = await rest(stream)
    assert (piece.token_ids, piece.text) == (ids, "The fox")
    assert piece.end is not None
    assert piece.end.finished.stop_token_id == STOP_TOKEN


@pytest.mark.parametrize("num_late", [0, 1, 3])
@pytest.mark.parametrize("core_says", [FinishReason.STOP_STRING, FinishReason.LENGTH])
async def test_tokens_after_a_stop_string_are_dropped_and_not_counted(
    num_late: int, core_says: FinishReason
) -> None:
    told: list[int] = []
    stream = make("own f", told=told)
    stream.admit(0)
    ids = TOKENIZER.encode("The quick brown fox jumps").ids
    num_until_match = next(
        size for size in range(len(ids)) if "own f" in TOKENIZER.decode(ids[:size])
    )
    feed(stream, ids[: num_until_match + num_late])
    assert told == [num_until_match]
    stream.finish(finished(num_until_match + num_late, core_says))
    (piece,) = await rest(stream)
    assert piece.text == "The quick br"
    assert piece.token_ids == ids[:num_until_match]
    assert piece.end is not None
    assert piece.end.stop_string == "own f"
    assert piece.end.finished.reason is FinishReason.STOP_STRING
    assert piece.end.finished.num_completion_tokens == num_until_match


async def test_text_held_for_a_stop_string_comes_at_the_end() -> None:
    stream = make("fox jumps over")
    stream.admit(0)
    ids = TOKENIZER.encode("The fox jumps").ids
    feed(stream, ids)
    assert (await take(stream)).text == "The "
    stream.finish(finished(len(ids)))
    (piece,) = await rest(stream)
    assert (piece.first_index, piece.token_ids, piece.text) == (len(ids), [], "fox jumps")


async def test_a_stop_string_before_min_tokens_is_ordinary_text() -> None:
    told: list[int] = []
    ids = TOKENIZER.encode("fox fox fox fox").ids
    stream = make("fox", min_tokens=len(ids), told=told)
    stream.admit(0)
    feed(stream, ids[:-1])
    assert told == []
    feed(stream, ids[-1:])
    assert told == [len(ids)]
    stream.finish(finished(len(ids), FinishReason.STOP_STRING))
    assert "".join(piece.text for piece in await rest(stream)) == "fox fox fox "


async def test_a_stop_string_that_only_the_flush_completes_counts() -> None:
    stream = make("\N{REPLACEMENT CHARACTER}")
    stream.admit(0)
    ids = TOKENIZER.encode("a🎈").ids[:-1]
    feed(stream, ids)
    stream.finish(finished(len(ids)))
    (piece,) = await rest(stream)
    assert piece.text == "a"
    assert piece.end is not None
    assert piece.end.finished.reason is FinishReason.STOP_STRING


async def test_a_buffer_that_is_full_ends_the_stream() -> None:
    stream = make(max_buffer_tokens=10)
    stream.admit(0)
    feed(stream, [300] * 10)
    assert stream.error is None
    feed(stream, [300])
    with pytest.raises(ClientTooSlow, match="10 tokens"):
        await take(stream)


async def test_an_error_comes_out_of_a_write_that_the_client_blocks() -> None:
    stream = make()

    async def blocked() -> None:
        await asyncio.get_running_loop().create_future()

    async def deliver() -> None:
        await stream.write(blocked())

    task = asyncio.create_task(deliver())
    await asyncio.sleep(0)
    stream.fail(Unavailable(Absence(reason="DRAINING", message="over")))
    with pytest.raises(Unavailable, match="over"):
        await task
    assert task.cancelling() == 0


async def test_a_cancelled_client_is_not_taken_for_an_error_of_the_stream() -> None:
    stream = make()
    task = asyncio.create_task(
        stream.write(asyncio.get_running_loop().create_future())  # never done
    )
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def end_of(stream: Stream) -> RequestError:
    async def read() -> None:
        await stream.admitted()
        await rest(stream)

    with pytest.raises(RequestError) as caught:
        await read()
    return caught.value


async def test_lost_tokens_end_the_stream_with_a_status() -> None:
    stream = make()
    stream.admit(0)
    feed(stream, [300] * 3)
    stream.finish(finished(4))
    error = await end_of(stream)
    assert isinstance(error, ServerFault)
    assert error.reason == "TOKENS_LOST"


async def test_a_faulty_model_ends_the_stream_with_a_status() -> None:
    stream = make()
    stream.admit(0)
    stream.finish(finished(0, FinishReason.FAULT))
    assert (await end_of(stream)).reason == "MODEL_FAULT"


async def test_a_request_ended_in_the_queue_ends_with_a_status() -> None:
    stream = make()
    stream.finish(finished(0, FinishReason.CANCELLED))
    assert isinstance(await end_of(stream), EndedByOperator)


async def test_the_first_error_is_the_one_that_is_told() -> None:
    stream = make()
    stream.refuse(Unavailable(Absence(reason="CORE_LOST", message="gone")))
    stream.fail(ServerFault("INTERNAL"))
    stream.push(300, None)
    assert (await end_of(stream)).reason == "CORE_LOST"
    assert stream.is_over
