"""What fronts and the core say to each other: one packed message a step each way.

    front                                core
      │ ── Attach ──────────────────────▶ │
      │ ◀──────────────── ModelReady ──── │   at once if ready, again after each epoch
      │ ── Commands[Submit, Abort …] ───▶ │   all that came up since the last one
      │ ◀──────────────────── Outputs ─── │   all that a step brought this front
      │ ◀────────────────── ModelLost ─── │   no worker; requests wait for the next
      │ ── Commands[Ping] ──────────────▶ │   now and then
      │ ◀────────────────────── Pulse ─── │
      │ ◀─────────────────────── Load ─── │   when it changes, and each second

    operators' process                   core
      │ ── Attach ──────────────────────▶ │   hears of model and load as a front does
      │ ── Drain ───────────────────────▶ │   all fronts hear Draining
      │ ◀──────────────────── Drained ─── │   once no request is left
      │ ── AbortNamed ──────────────────▶ │
      │ ◀──────────────────── Aborted ─── │
      │ ── Profile ─────────────────────▶ │   each rank records its next steps
      │ ◀────────────────── TraceData ─── │   from each rank, in pieces

A front names its streams by integers of its own choice, unique in its life.
For every Submit the core answers with exactly one of: Refused; or Admitted,
any number of tokens, then Finished (a request that ends while it waits is
Finished without being Admitted). After it sent Abort or Stop, the front may
still receive tokens and a Finished that were under way; Abort of an unknown
or finished stream is ignored.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias, TypeVar

import msgspec

from tokenloom.wire.messages import SamplingParams, TokenLogprobs


class _Message(
    msgspec.Struct, frozen=True, array_like=True, tag=True, kw_only=True, forbid_unknown_fields=True
):
    """Base of all messages between fronts and core.

    Each repeats `frozen`, which type checkers do not inherit.
    """


class FinishReason(StrEnum):
    """Why a request reached its end."""

    LENGTH = "length"
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    """The front saw a stop string and sent Stop."""
    CANCELLED = "cancelled"
    """The front sent Abort."""
    FAULT = "fault"
    """The model's numbers for this request were not finite."""
    CRASH = "crash"
    """The request broke its worker again and again, the last time while it ran alone."""
    NO_ROOM = "no_room"
    """The worker was lost, and the next one's KV pool is too small for the request."""
    DEADLINE = "deadline"
    """Its deadline passed."""


class RefusalReason(StrEnum):
    """Why the core did not take a request."""

    QUEUE_FULL = "queue_full"
    """As many requests or prompt tokens wait as may."""
    INVALID = "invalid"
    """The front let something through that it should not: an internal error."""
    TOO_LONG = "too_long"
    """Prompt + max_tokens exceed the context or the whole KV pool."""
    NOT_READY = "not_ready"
    """No worker has loaded the model yet."""
    DUPLICATE = "duplicate"
    """The front uses this stream number already."""
    DEADLINE_UNREACHABLE = "deadline_unreachable"
    """By the time that it would have something useful its deadline will have passed."""
    TENANT_LIMIT = "tenant_limit"
    """The tenant has as many requests, or had as many tokens, as it may."""
    DRAINING = "draining"
    """An operator lets the running requests finish and takes no others."""


class Attach(_Message, frozen=True):
    """A front begins to speak. Its ZeroMQ identity names it."""

    pid: int


class Submit(_Message, frozen=True):
    """A validated request wants to run."""

    stream: int
    tokens: bytes
    """int32 [num_tokens], prompt and beginning of the completion, all below the vocabulary's size;
    of the prompt at least one"""
    max_tokens: int
    """Of the whole completion, at least 1; prompt + max_tokens fit the context."""
    sampling: SamplingParams
    salt: str
    """Requests share cached blocks only with requests of the same salt."""
    num_completion_tokens: int = 0
    """How many of `tokens` are completion, which goes on behind them; fewer than max_tokens."""
    tenant: str = ""
    """Whose request it is, as authentication has it; empty: nobody's in particular."""
    priority: int = 0
    """Among the requests of its tenant: those with a larger one go first."""
    timeout_s: float | None = None
    """What was left of the caller's deadline when the front sent this."""
    request_id: str = ""
    """What the caller and operators name it by: Admission.request_id."""


class Abort(_Message, frozen=True):
    """The client left: the request ends now."""

    stream: int


class Stop(_Message, frozen=True):
    """The text of a stream held a stop string: the request ends after `num_tokens` tokens."""

    stream: int
    num_tokens: int


class Inspect(_Message, frozen=True):
    """Asks for an Inspection (tests and operators)."""


class Ping(_Message, frozen=True):
    """Asks for a Pulse."""


class Commands(_Message, frozen=True):
    """All that came up in a front since its last message."""

    commands: tuple[Submit | Abort | Stop | Inspect | Ping, ...]


class Drain(_Message, frozen=True):
    """An operator wants no new requests from now on, and to hear when none is left."""

    ends: bool
    """Whether those that are left are not waited for."""


class AbortNamed(_Message, frozen=True):
    """An operator ends a request, whoever's it is."""

    request_id: str


class Profile(_Message, frozen=True):
    """An operator wants the next steps recorded; 0 forgets a recording under way."""

    number: int
    """Names the recording."""
    num_steps: int


class ModelReady(_Message, frozen=True):
    """A group serves the model."""

    epoch: int
    vocab_size: int
    max_model_tokens: int
    """Longest prompt + completion, the KV pool's size considered."""
    block_size: int
    num_blocks: int
    phases: tuple[tuple[str, float], ...] = ()
    """What it took the slowest rank to get ready, in seconds."""
    fingerprint: str = ""
    """Names the weights and how they are computed with."""


class ModelLost(_Message, frozen=True):
    """The group is gone; requests wait for the next epoch."""

    reason: str


class Refused(_Message, frozen=True):
    """A Submit was not taken."""

    stream: int
    reason: RefusalReason
    detail: str
    """For the client: quotes the numbers."""
    retry_after_s: float | None
    """When it makes sense to try again; None: never as it stands."""


class Admitted(_Message, frozen=True):
    """A request got its slot for the first time."""

    stream: int
    num_cached_tokens: int


class Finished(_Message, frozen=True):
    """A request reached its end; no token follows."""

    stream: int
    reason: FinishReason
    stop_token_id: int | None
    num_completion_tokens: int
    queue_s: float | None
    """None: it never left the queue."""
    prefill_s: float | None
    """None: no token came."""
    decode_s: float | None
    gpu_s: float = 0.0
    """Its share of the seconds of all GPUs of the group, summed over its steps."""
    kv_block_s: float = 0.0
    """Blocks that it held, times how long; a block shared by n requests counts 1/n for each."""
    num_recomputed_tokens: int = 0
    """Positions computed again after a preemption or the loss of a worker."""
    num_preemptions: int = 0

    def price(self, gpu_hour_price: float | None) -> float | None:
        """Returns what `gpu_s` costs, if an hour of a GPU has a price."""
        return None if gpu_hour_price is None else self.gpu_s / 3600 * gpu_hour_price


class Outputs(_Message, frozen=True):
    """What a step, or a batch of commands, brought the streams of one front.

    To be applied in the order of the fields. A stream occurs at most once in
    `streams`; the index of its token is the number of tokens it had before.
    """

    refused: tuple[Refused, ...]
    admitted: tuple[Admitted, ...]
    streams: bytes
    """int64 [num_tokens] stream that gets a token"""
    tokens: bytes
    """int32 [num_tokens]"""
    logprobs: tuple[TokenLogprobs, ...]
    """`row` is an index into `tokens`."""
    finished: tuple[Finished, ...]
    preempted: tuple[int, ...] = ()
    """Streams whose requests lost their slots and wait again."""


class Pulse(_Message, frozen=True):
    """The core lives."""

    stalled_s: float
    """For how long there have been requests and a model, and no step under way; 0 is right."""


class Load(_Message, frozen=True):
    """How busy the core is: comes after a change, at most ten times a second, and each second."""

    num_waiting: int
    num_waiting_tokens: int
    num_running: int
    max_num_requests: int
    num_blocks: int
    num_used_blocks: int
    """Blocks that requests hold; cached ones that nobody holds are free."""
    queue_fraction: float
    """The fullest of the bounds of the queue, 0 to 1."""
    num_steps: int
    """Since the core began; so are those below."""
    num_finished: int
    num_refused: int
    num_generated_tokens: int
    num_prompt_tokens: int
    num_cached_prompt_tokens: int
    num_preemptions: int
    num_recoveries: int
    busy_s: float
    """Seconds in which a step was under way."""
    step_s: float
    """A step's time, of late."""

    @property
    def utilization(self) -> float:
        """The larger of the KV pool's use and the queue's, 0 to 1."""
        return max(self.num_used_blocks / max(1, self.num_blocks), self.queue_fraction)


class Inspection(_Message, frozen=True):
    """The core's state in numbers, and whether its structures agree."""

    epoch: int
    pids: tuple[int, ...]
    """The group's processes, rank 0 first; while it is gathered, those that have come."""
    num_waiting: int
    num_running: int
    num_blocks: int
    num_free_blocks: int
    """Blocks that no request holds, cached ones among them."""
    num_cached_blocks: int
    num_steps: int
    num_dropped_frames: int
    """Garbage, truncated, oversized or stale frames from workers."""
    num_preemptions: int
    violations: tuple[str, ...]
    """What `check()` found wrong; empty is right."""


class Draining(_Message, frozen=True):
    """To fronts: take no new requests from now on."""

    ends: bool
    """Whether the streams that are left end now."""


class Drained(_Message, frozen=True):
    """To who asked for it: no request is left."""

    num_ended: int
    """How many were left when they were not waited for any longer."""


class Aborted(_Message, frozen=True):
    """The answer to AbortNamed."""

    request_id: str
    was_found: bool


class TraceData(_Message, frozen=True):
    """The next piece of what a rank recorded."""

    number: int
    """Profile's."""
    rank: int
    data: bytes
    is_last: bool
    error: str = ""
    """Why there is none; then the piece is empty and the last."""


FromFront: TypeAlias = Attach | Commands | Drain | AbortNamed | Profile
ToFront: TypeAlias = (
    ModelReady
    | ModelLost
    | Outputs
    | Pulse
    | Load
    | Inspection
    | Draining
    | Drained
    | Aborted
    | TraceData
)

_T = TypeVar("_T")

_encoder = msgspec.msgpack.Encoder()
_from_front: msgspec.msgpack.Decoder[FromFront] = msgspec.msgpack.Decoder(FromFront)
_to_front: msgspec.msgpack.Decoder[ToFront] = msgspec.msgpack.Decoder(ToFront)


def encode(message: FromFront | ToFront) -> bytes:
    """Returns the frame of a message."""
    return _encoder.encode(message)


def decode_from_front(frame: bytes) -> FromFront:
    """Returns what a front sent. Raises msgspec.DecodeError."""
    return _decoded(_from_front, frame)


def decode_to_front(frame: bytes) -> ToFront:
    """Returns what the core sent. Raises msgspec.DecodeError."""
    return _decoded(_to_front, frame)


def _decoded(decoder: msgspec.msgpack.Decoder[_T], frame: bytes) -> _T:
    try:
        return decoder.decode(frame)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error
