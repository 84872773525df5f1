"""From what a step sampled on the device to the StepDone that tells the core."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tokenloom.wire.messages import Step, StepDone, TokenLogprobs
from tokenloom.worker.sampling import Logprobs, Sampled
from tokenloom.worker.transfer import download


def download_sampled(sampled: Sampled) -> Sampled:
    """Returns host tensors, filled once the device reached this point."""
    logprobs = sampled.logprobs
    if logprobs is not None:
        logprobs = replace(
            logprobs,
            drawn=download(logprobs.drawn),
            top_ids=download(logprobs.top_ids),
            top=download(logprobs.top),
        )
    return Sampled(
        tokens=download(sampled.tokens), faulty=download(sampled.faulty), logprobs=logprobs
    )


def step_done(step: Step, sampled: Sampled | None, compute_s: float) -> StepDone:
    """Returns the message for host tensors; None is a step that sampled nothing."""
    if sampled is None:
        tokens, faulty = b"", np.empty(0, dtype=np.int64)
        logprobs: tuple[TokenLogprobs, ...] = ()
    else:
        tokens = sampled.tokens.numpy().astype("<i4").tobytes()
        faulty = np.flatnonzero(sampled.faulty.numpy())
        logprobs = _token_logprobs(sampled.logprobs, set(faulty.tolist()))
    return StepDone(
        epoch=step.epoch,
        step_id=step.step_id,
        tokens=tokens,
        logprobs=logprobs,
        faulty_rows=faulty.astype("<i4").tobytes(),
        compute_s=compute_s,
    )


def _token_logprobs(logprobs: Logprobs | None, faulty_rows: set[int]) -> tuple[TokenLogprobs, ...]:
    if logprobs is None:
        return ()
    top_ids, top = logprobs.top_ids.numpy(), logprobs.top.numpy()
    return tuple(
        TokenLogprobs(
            row=row,
            logprob=float(logprobs.drawn[index]),
            top_ids=top_ids[index, :num_top].astype("<i4").tobytes(),
            top_logprobs=top[index, :num_top].astype("<f4").tobytes(),
        )
        for index, (row, num_top) in enumerate(
            zip(logprobs.rows.tolist(), logprobs.num_top.tolist(), strict=True)
        )
        if row not in faulty_rows
    )
