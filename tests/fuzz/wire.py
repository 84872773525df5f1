"""Frames of every socket: refused as frames, or messages that their readers can judge."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from tests.fuzz.target import Target
from tokenloom.scheduler import messages
from tokenloom.scheduler.core import admission, applying, planning
from tokenloom.scheduler.core.state import Limits, ModelSpec, State
from tokenloom.wire import codec
from tokenloom.wire.messages import (
    PROTOCOL_VERSION,
    Admit,
    Configure,
    Failed,
    Hello,
    Profile,
    Progress,
    Ready,
    SamplingParams,
    Shutdown,
    Step,
    StepDone,
    TokenLogprobs,
    Trace,
)
from tokenloom.worker.errors import ProtocolError
from tokenloom.worker.steps.slots import Limits as SlotLimits
from tokenloom.worker.steps.slots import Slots

SPEC = ModelSpec(
    epoch=1, vocab_size=64, max_model_tokens=64, max_step_tokens=64, block_size=16, num_blocks=8
)
SAMPLING = SamplingParams(
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    repetition_penalty=1.0,
    seed=7,
    min_tokens=0,
    stop_token_ids=(3,),
    logit_bias=((5, 1.0),),
    num_top_logprobs=1,
)
SUBMIT = messages.Submit(
    stream=1,
    tokens=np.arange(5, dtype=np.int32).tobytes(),
    max_tokens=8,
    sampling=SAMPLING,
    salt="",
)


def run(data: bytes) -> None:
    """The first byte chooses the reader."""
    kind, *_ = data[:1] or b"\0"
    _READERS[kind % len(_READERS)](data[1:])


def _at_worker(frame: bytes) -> None:
    try:
        message = codec.decode_to_worker(frame)
    except codec.FrameError:
        return
    assert codec.decode_to_worker(codec.encode(message)) == message or _has_nan(message)
    if isinstance(message, Step):
        slots = Slots(
            SlotLimits(
                num_slots=2,
                num_blocks=SPEC.num_blocks,
                block_size=SPEC.block_size,
                vocab_size=SPEC.vocab_size,
                max_model_tokens=SPEC.max_model_tokens,
                max_step_tokens=SPEC.max_step_tokens,
            )
        )
        try:
            slots.apply(message)
        except ProtocolError:
            return


def _at_core(frame: bytes) -> None:
    try:
        message = codec.decode_to_core(frame)
    except codec.FrameError:
        return
    assert codec.decode_to_core(codec.encode(message)) == message or _has_nan(message)
    if isinstance(message, StepDone):
        state = _state()
        admission.submit(state, 0, SUBMIT, 0.0)
        plan = planning.plan(state, 1.0)
        assert plan is not None
        done = msgspec.structs.replace(message, step_id=state.in_flight[0].step_id)
        try:
            applying.apply(state, done, 2.0)
        except applying.ResultError:
            return
        assert state.check() == []


def _from_front(frame: bytes) -> None:
    try:
        message = messages.decode_from_front(frame)
    except msgspec.DecodeError:
        return
    assert messages.decode_from_front(messages.encode(message)) == message or _has_nan(message)
    if isinstance(message, messages.Commands):
        state = _state()
        for command in message.commands:
            match command:
                case messages.Submit():
                    admission.submit(state, 0, command, 0.0)
                case messages.Abort():
                    admission.abort(state, 0, command)
                case messages.Stop():
                    admission.stop(state, 0, command)
                case _:
                    pass
            assert state.check() == []


def _to_front(frame: bytes) -> None:
    try:
        message = messages.decode_to_front(frame)
    except msgspec.DecodeError:
        return
    assert messages.decode_to_front(messages.encode(message)) == message or _has_nan(message)


def _has_nan(message: object) -> bool:
    return "nan" in repr(message)


def _state() -> State:
    state = State(
        Limits(
            max_num_requests=2,
            max_mixed_prompt_tokens=None,
            max_waiting_requests=4,
            max_waiting_tokens=1000,
        )
    )
    admission.begin_epoch(state, SPEC)
    return state


_READERS: tuple[Callable[[bytes], None], ...] = (_at_worker, _at_core, _from_front, _to_front)


def _column(*numbers: int) -> bytes:
    return np.array(numbers, np.int32).tobytes()


_STEP = Step(
    epoch=1,
    step_id=1,
    released=b"",
    admitted=(
        Admit(
            slot=0,
            tokens=_column(1, 2, 3),
            num_prompt_tokens=3,
            num_computed=0,
            sampling=SAMPLING,
        ),
    ),
    block_slots=_column(0),
    block_indices=_column(0),
    block_ids=_column(1),
    span_slots=_column(0),
    span_starts=_column(0),
    span_lengths=_column(3),
    span_samples=b"\1",
)
_CONFIGURE = Configure(
    epoch=1,
    rank=0,
    world_size=1,
    rendezvous="",
    model="m",
    dtype="auto",
    quantize="none",
    quantize_lm_head=False,
    int8_threshold=0.0,
    kv_cache="auto",
    max_model_tokens=None,
    max_num_requests=2,
    max_step_tokens=None,
)
_DONE = StepDone(
    epoch=1,
    step_id=1,
    tokens=_column(9),
    logprobs=(TokenLogprobs(row=0, logprob=-1.0, top_ids=_column(9), top_logprobs=b"\0" * 4),),
    faulty_rows=b"",
    compute_s=0.5,
)
_READY = Ready(
    epoch=1,
    num_blocks=8,
    block_size=16,
    vocab_size=64,
    max_model_tokens=64,
    max_step_tokens=64,
    weights_bytes=0,
    kv_bytes=0,
    phases=(("imports", 0.5),),
)
_OUTPUTS = messages.Outputs(
    refused=(
        messages.Refused(
            stream=3,
            reason=messages.RefusalReason.QUEUE_FULL,
            detail="full",
            retry_after_s=1.0,
        ),
    ),
    admitted=(messages.Admitted(stream=1, num_cached_tokens=0),),
    streams=np.array([1], np.int64).tobytes(),
    tokens=_column(9),
    logprobs=(),
    finished=(
        messages.Finished(
            stream=1,
            reason=messages.FinishReason.LENGTH,
            stop_token_id=None,
            num_completion_tokens=1,
            queue_s=None,
            prefill_s=None,
            decode_s=None,
        ),
    ),
)
TARGET = Target(
    run=run,
    seeds=[
        *(
            b"\0" + codec.encode(message)
            for message in (_STEP, _CONFIGURE, Shutdown(), Profile(epoch=1, number=1, num_steps=3))
        ),
        *(
            b"\1" + codec.encode(message)
            for message in (
                _DONE,
                _READY,
                Hello(protocol_version=PROTOCOL_VERSION, pid=1, device="cpu", address=""),
                Progress(epoch=1, phase="weights", fraction=0.5),
                Failed(epoch=1, error="lost"),
                Trace(epoch=1, number=1, data=b"x", is_last=True),
            )
        ),
        *(
            b"\2" + messages.encode(message)
            for message in (
                messages.Attach(pid=1),
                messages.Commands(
                    commands=(
                        SUBMIT,
                        messages.Stop(stream=1, num_tokens=2),
                        messages.Abort(stream=1),
                        messages.Inspect(),
                        messages.Ping(),
                    )
                ),
                messages.Drain(ends=False),
                messages.AbortNamed(request_id="r"),
                messages.Profile(number=1, num_steps=3),
            )
        ),
        *(
            b"\3" + messages.encode(message)
            for message in (_OUTPUTS, messages.ModelLost(reason="x"), messages.Pulse(stalled_s=0.0))
        ),
    ],
)
