"""Frames: what was encoded comes back, anything else is a FrameError and nothing worse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.wire import codec
from tokenloom.wire.messages import (
    Admit,
    Failed,
    Hello,
    Progress,
    SamplingParams,
    Shutdown,
    Step,
    StepDone,
    ToCore,
    TokenLogprobs,
    ToWorker,
)

SAMPLING = SamplingParams(
    temperature=0.5,
    top_p=0.9,
    top_k=3,
    min_p=0.1,
    presence_penalty=0.0,
    frequency_penalty=-1.0,
    repetition_penalty=1.0,
    seed=2**64 - 1,
    min_tokens=2,
    stop_token_ids=(1, 2),
    logit_bias=((7, -1.5),),
    num_top_logprobs=None,
)
STEP = Step(
    epoch=3,
    step_id=9,
    released=b"\1\0\0\0",
    admitted=(
        Admit(slot=1, tokens=bytes(8), num_prompt_tokens=2, num_computed=0, sampling=SAMPLING),
    ),
    block_slots=b"\1\0\0\0",
    block_indices=bytes(4),
    block_ids=b"\5\0\0\0",
    span_slots=b"\1\0\0\0",
    span_starts=bytes(4),
    span_lengths=b"\2\0\0\0",
    span_samples=b"\1",
)
DONE = StepDone(
    epoch=3,
    step_id=9,
    tokens=b"\7\0\0\0",
    logprobs=(TokenLogprobs(row=0, logprob=-0.5, top_ids=bytes(4), top_logprobs=bytes(4)),),
    faulty_rows=b"",
    compute_s=0.01,
)
TO_WORKER: list[ToWorker] = [STEP, Shutdown()]
TO_CORE: list[ToCore] = [
    DONE,
    Hello(protocol_version=1, rank=0, pid=7, device="cpu", address=""),
    Progress(epoch=1, phase="loading", fraction=0.5),
    Failed(epoch=1, error="why"),
]


@pytest.mark.parametrize("message", TO_WORKER)
def test_what_the_core_says_comes_back(message: ToWorker) -> None:
    assert codec.decode_to_worker(codec.encode(message)) == message


@pytest.mark.parametrize("message", TO_CORE)
def test_what_a_worker_says_comes_back(message: ToCore) -> None:
    assert codec.decode_to_core(codec.encode(message)) == message


@pytest.mark.parametrize("message", TO_CORE)
def test_messages_of_the_other_direction_are_refused(message: ToCore) -> None:
    with pytest.raises(codec.FrameError):
        codec.decode_to_worker(codec.encode(message))


def test_every_truncation_is_refused() -> None:
    frame = codec.encode(STEP)
    for length in range(len(frame)):
        with pytest.raises(codec.FrameError):
            codec.decode_to_worker(frame[:length])


def test_a_tail_is_refused() -> None:
    with pytest.raises(codec.FrameError):
        codec.decode_to_core(codec.encode(DONE) + b"\0")


def test_an_oversized_frame_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = codec.encode(DONE)
    monkeypatch.setattr(codec, "MAX_FRAME_BYTES", len(frame) - 1)
    with pytest.raises(codec.FrameError, match=f"{len(frame)} bytes"):
        codec.decode_to_core(frame)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(codec.FrameError):
        codec.decode_to_core(b"\x91" * 100_000)


@given(st.binary(max_size=200))
def test_random_bytes_are_a_frame_error_or_a_message(frame: bytes) -> None:
    for decode in (codec.decode_to_core, codec.decode_to_worker):
        try:
            decode(frame)
        except codec.FrameError:
            continue


@given(st.data())
def test_a_frame_with_a_flipped_byte_is_a_frame_error_or_a_message(data: st.DataObject) -> None:
    frame = bytearray(codec.encode(STEP))
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        codec.decode_to_worker(bytes(frame))
    except codec.FrameError:
        return
