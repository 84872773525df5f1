"""From what a step sampled on the device to the StepDone that tells the core."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from tokenloom.wire.messages import Step, StepDone, TokenLogprobs
from tokenloom.worker.kernels import FAULTY
from tokenloom.worker.steps.sampling import Logprobs, Sampled
from tokenloom.worker.steps.transfer import download


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a step tells the host."""

    tokens: Tensor
    """int32 [num_rows], FAULTY where the logits were not finite"""
    logprobs: Logprobs | None

    @staticmethod
    def of(sampled: Sampled) -> Outcome:
        """Returns what came of rows that were sampled."""
        tokens = sampled.tokens.masked_fill(sampled.faulty, FAULTY)
        return Outcome(tokens=tokens, logprobs=sampled.logprobs)

    def download(self) -> Outcome:
        """Returns host tensors, filled once the device reached this point."""
        logprobs = self.logprobs
        if logprobs is not None:
            logprobs = replace(
                logprobs,
                drawn=download(logprobs.drawn),
                top_ids=download(logprobs.top_ids),
                top=download(logprobs.top),
            )
        return Outcome(tokens=download(self.tokens), logprobs=logprobs)


def step_done(step: Step, outcome: Outcome | None, compute_s: float) -> StepDone:
    """Returns the message for host tensors; None is a step that sampled nothing."""
    if outcome is None:
        tokens, faulty = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64)
        logprobs: tuple[TokenLogprobs, ...] = ()
    else:
        tokens = outcome.tokens.numpy()
        faulty = np.flatnonzero(tokens == FAULTY)
        logprobs = _token_logprobs(outcome.logprobs, set(faulty.tolist()))
    return StepDone(
        epoch=step.epoch,
        step_id=step.step_id,
        tokens=np.maximum(tokens, 0).astype("<i4").tobytes(),
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
