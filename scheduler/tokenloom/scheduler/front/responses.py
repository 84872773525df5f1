"""The messages of a Generate stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenloom.scheduler.front.streams import End, Piece
from tokenloom.scheduler.messages import FinishReason
from tokenloom.v1 import inference_pb2 as pb
from tokenloom.wire.messages import TokenLogprobs

_REASONS = {
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}
"""The others are none of them: such a stream ends with a status."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """What is told of a Generate call beside its completion."""

    request_id: str
    seed: int
    num_prompt_tokens: int
    max_tokens: int
    fingerprint: str
    """Of the model and the prompt's tokens."""


def admission_response(call: Call, *, num_cached_tokens: int) -> pb.GenerateResponse:
    """Returns the first message of a stream."""
    return pb.GenerateResponse(
        admission=pb.Admission(
            request_id=call.request_id,
            seed=call.seed,
            num_prompt_tokens=call.num_prompt_tokens,
            num_cached_tokens=num_cached_tokens,
            fingerprint=call.fingerprint,
            max_tokens=call.max_tokens,
        )
    )


def delta_response(piece: Piece) -> pb.GenerateResponse:
    """Returns a piece of the completion."""
    response = pb.GenerateResponse()
    delta = response.delta
    delta.first_index = piece.first_index
    delta.token_ids.extend(piece.token_ids)
    delta.text = piece.text
    if piece.logprobs:
        delta.logprobs.extend(_logprob(entry) for entry in piece.logprobs)
    return response


def pause_response() -> pb.GenerateResponse:
    """Returns the word that nothing comes until the model is loaded again."""
    return pb.GenerateResponse(pause=pb.Pause(reason=pb.PAUSE_REASON_RECOVERING))


def finish_response(
    call: Call, end: End, *, num_cached_tokens: int, gpu_hour_price: float | None
) -> pb.GenerateResponse:
    """Returns the last message of a stream; what the core does not know is left out."""
    finished = end.finished
    return pb.GenerateResponse(
        finish=pb.Finish(
            reason=_REASONS[finished.reason],
            usage=pb.Usage(
                num_prompt_tokens=call.num_prompt_tokens,
                num_cached_tokens=num_cached_tokens,
                num_completion_tokens=finished.num_completion_tokens,
                queue_s=finished.queue_s,
                prefill_s=finished.prefill_s,
                decode_s=finished.decode_s,
            ),
            stop_token_id=finished.stop_token_id,
            stop_string=end.stop_string,
            cost=pb.Cost(
                gpu_s=finished.gpu_s,
                kv_block_s=finished.kv_block_s,
                num_recomputed_tokens=finished.num_recomputed_tokens,
                num_preemptions=finished.num_preemptions,
                price=finished.price(gpu_hour_price),
            ),
        )
    )


def _logprob(entry: TokenLogprobs) -> pb.TokenLogprob:
    ids = np.frombuffer(entry.top_ids, "<i4").tolist()
    logprobs = np.frombuffer(entry.top_logprobs, "<f4").tolist()
    return pb.TokenLogprob(
        logprob=entry.logprob,
        top=[
            pb.TopLogprob(token_id=token_id, logprob=logprob)
            for token_id, logprob in zip(ids, logprobs, strict=True)
        ],
    )
