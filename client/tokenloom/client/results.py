"""What a server says, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tokenloom.v1 import inference_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class Admission:
    """The request holds a place in the model."""

    request_id: str
    seed: int
    """The seed in use, given or chosen by the server: the same one draws the same tokens."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens that the server found in its prefix cache."""
    max_tokens: int | None = None
    """The most tokens to complete, given or what the context leaves room for; None: the server did
    not say."""
    fingerprint: str = ""
    """Names the model and the prompt's tokens; empty: the server resumes no streams."""


@dataclass(frozen=True, kw_only=True)
class TopLogprob:
    """One of the likeliest tokens at a position."""

    token_id: int
    logprob: float


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """The natural logarithm of a token's probability, and the likeliest tokens in its place."""

    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A piece of the completion: the tokens that came since the last one."""

    first_index: int
    """Index in the completion of the first of `token_ids`."""
    token_ids: tuple[int, ...]
    text: str
    """Text that became final with these tokens; whole characters, possibly none."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `token_ids` if they were asked for, else empty."""


class PauseReason(StrEnum):
    """Why no token comes for a while."""

    RECOVERING = "recovering"
    """The server lost a worker, and loads the model again."""
    OTHER = "other"
    """A reason that this version of the client does not know."""


@dataclass(frozen=True, kw_only=True)
class Pause:
    """No token comes for a while; the stream goes on by itself, at the next index."""

    reason: PauseReason


class FinishReason(StrEnum):
    """Why a completion ended."""

    LENGTH = "length"
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    CANCELLED = "cancelled"
    """The server's operator ended it."""
    OTHER = "other"
    """A reason that this version of the client does not know."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a request took."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    queue_s: float | None = None
    """From arrival to the first planned step; None: the server did not say, as below."""
    prefill_s: float | None = None
    """From the first planned step to the first token."""
    decode_s: float | None = None
    """From the first token to the last."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a request took of the server that ended it."""

    gpu_s: float
    """Its share of each step that it was in, in seconds of one GPU."""
    kv_block_s: float
    """Blocks of the KV cache times how long it held them; of a shared one, its part."""
    num_recomputed_tokens: int = 0
    """Computed again after a preemption or the loss of a worker."""
    num_preemptions: int = 0
    price: float | None = None
    """In the currency of the server's operator; None: the server knows no price."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A whole completion."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    """One for each of `token_ids` if they were asked for, else empty."""
    finish_reason: FinishReason
    stop_token_id: int | None
    """The stop token that ended the completion, if one did."""
    stop_string: str | None
    """The stop string that ended the completion, if one did; it is not part of `text`."""
    usage: Usage
    request_id: str
    seed: int
    cost: Cost | None = None
    """None: the server did not say."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The served model and the limits of its server."""

    name: str
    architecture: str
    """As in the checkpoint's config, such as `LlamaForCausalLM`."""
    vocab_size: int
    """Valid token ids lie below it."""
    max_model_tokens: int
    """The most tokens that prompt and completion may have together."""
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    server_version: str
    fingerprint: str = ""
    """Equal on servers that resume each other's streams; empty: it resumes none."""


FINISH_REASONS = {
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_STOP_TOKEN: FinishReason.STOP_TOKEN,
    pb.FINISH_REASON_STOP_STRING: FinishReason.STOP_STRING,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}


PAUSE_REASONS = {pb.PAUSE_REASON_RECOVERING: PauseReason.RECOVERING}


def read_admission(message: pb.Admission) -> Admission:
    """Returns the dataclass of a message."""
    return Admission(
        request_id=message.request_id,
        seed=message.seed,
        num_prompt_tokens=message.num_prompt_tokens,
        num_cached_tokens=message.num_cached_tokens,
        max_tokens=message.max_tokens or None,
        fingerprint=message.fingerprint,
    )


def read_delta(message: pb.Delta) -> Delta:
    """Returns the dataclass of a message."""
    return Delta(
        first_index=message.first_index,
        token_ids=tuple(message.token_ids),
        text=message.text,
        logprobs=tuple(
            TokenLogprob(
                logprob=entry.logprob,
                top=tuple(
                    TopLogprob(token_id=top.token_id, logprob=top.logprob) for top in entry.top
                ),
            )
            for entry in message.logprobs
        ),
    )


def read_pause(message: pb.Pause) -> Pause:
    """Returns the dataclass of a message."""
    return Pause(reason=PAUSE_REASONS.get(message.reason, PauseReason.OTHER))


def read_usage(message: pb.Usage) -> Usage:
    """Returns the dataclass of a message; a field that is absent becomes None."""
    return Usage(
        num_prompt_tokens=message.num_prompt_tokens,
        num_cached_tokens=message.num_cached_tokens,
        num_completion_tokens=message.num_completion_tokens,
        queue_s=message.queue_s if message.HasField("queue_s") else None,
        prefill_s=message.prefill_s if message.HasField("prefill_s") else None,
        decode_s=message.decode_s if message.HasField("decode_s") else None,
    )


def read_cost(message: pb.Cost) -> Cost:
    """Returns the dataclass of a message."""
    return Cost(
        gpu_s=message.gpu_s,
        kv_block_s=message.kv_block_s,
        num_recomputed_tokens=message.num_recomputed_tokens,
        num_preemptions=message.num_preemptions,
        price=message.price if message.HasField("price") else None,
    )


def read_model(message: pb.GetModelResponse) -> Model:
    """Returns the dataclass of a message."""
    return Model(
        name=message.name,
        architecture=message.architecture,
        vocab_size=message.vocab_size,
        max_model_tokens=message.max_model_tokens,
        eos_token_ids=tuple(message.eos_token_ids),
        has_chat_template=message.has_chat_template,
        server_version=message.server_version,
        fingerprint=message.fingerprint,
    )
