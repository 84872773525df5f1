"""Steps without meaning that load kernels and set up libraries before requests come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tokenloom.wire.messages import Admit, SamplingParams, Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tokenloom.worker.steps.slots import Limits


def warm_up_steps(epoch: int, limits: Limits) -> Iterator[Step]:
    """Yields a prompt and a decode of a short request, and of one that fills a step.

    The short one asks for log probabilities: what draws such rows is compiled apart from
    what draws others. So is, without flash-attn, what attends in spans of a few tokens.
    """
    room = min(limits.max_model_tokens, limits.num_blocks * limits.block_size)
    longest = max(1, room - 2)  # two tokens are sampled behind the prompt, if there is room
    step_id = 0
    for length, num_top_logprobs in ((2, 1), (longest, None)):
        num_tokens = min(length, longest)
        num_new = min(num_tokens, limits.max_step_tokens)
        num_blocks = num_tokens // limits.block_size + 1
        num_computed = num_tokens - num_new  # as if they lay in cached blocks
        released = b"" if step_id == 0 else _int32([0])
        spans = [(num_computed, num_new), (num_tokens, 1)]
        for start, num_span in spans[: room - num_tokens]:
            admitted = start == num_computed
            yield Step(
                epoch=epoch,
                step_id=step_id,
                released=released if admitted else b"",
                admitted=(
                    (_admit(num_tokens, num_computed, num_top_logprobs),) if admitted else ()
                ),
                block_slots=_int32([0] * num_blocks) if admitted else b"",
                block_indices=_int32(range(num_blocks)) if admitted else b"",
                block_ids=_int32(range(num_blocks)) if admitted else b"",
                span_slots=_int32([0]),
                span_starts=_int32([start]),
                span_lengths=_int32([num_span]),
                span_samples=b"\1",
            )
            step_id += 1


def _admit(num_tokens: int, num_computed: int, num_top_logprobs: int | None) -> Admit:
    """Returns a request of zeros for slot 0."""
    sampling = SamplingParams(
        temperature=1.0,
        top_p=0.9,
        top_k=0,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        seed=0,
        min_tokens=0,
        stop_token_ids=(),
        logit_bias=(),
        num_top_logprobs=num_top_logprobs,
    )
    return Admit(
        slot=0,
        tokens=bytes(4 * num_tokens),
        num_prompt_tokens=num_tokens,
        num_computed=num_computed,
        sampling=sampling,
    )


def _int32(numbers: Iterable[int]) -> bytes:
    """Returns a column of a Step."""
    return np.fromiter(numbers, dtype="<i4").tobytes()
