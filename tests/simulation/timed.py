"""The core under virtual time, with steps that take as long as those of a model on a GPU.

What a budget does to throughput, first tokens and stalls shows here in seconds and without a
GPU; `python -m tests.simulation.timed` prints a table.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from tests.core.processes import submit
from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.core import admission, applying, planning
from tokenloom.scheduler.core.loop import MAX_STEPS_IN_FLIGHT
from tokenloom.scheduler.core.planning import StepPlan
from tokenloom.scheduler.core.state import Limits, ModelSpec, State
from tokenloom.wire.messages import StepDone

LINK_S = 200e-6
"""From the end of a step to the core's knowing it."""
UNIFORM = (100, 1024)
"""Lengths of prompts and outputs."""
SEVENTY_PERCENT = 13.0
"""Requests a second with UNIFORM lengths: 70 % of what these steps can carry."""

SPEC = ModelSpec(
    epoch=1,
    vocab_size=128,
    max_model_tokens=40_000,
    max_step_tokens=8192,
    block_size=128,
    num_blocks=8_000,
)

Range: TypeAlias = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds that a step takes. The defaults are a Llama-3.1-8B in bf16 on an H200."""

    fixed_s: float = 0.5e-3
    """Sampling, launches that nothing hides."""
    weights_s: float = 4.4e-3
    """Reading all weights once: the matmuls of a step with few tokens."""
    row_s: float = 6e-6
    """What one more token adds to that."""
    token_s: float = 1 / 38_000
    """A token of a step with so many that matmuls are bound by arithmetic."""
    context_s: float = 131_072 / 3.5e12
    """Reading one position of a request's KV."""

    def of(self, lengths: np.ndarray, ends: np.ndarray) -> float:
        """Returns the seconds of a step with spans of `lengths` that reach to `ends`."""
        num_tokens = float(lengths.sum())
        matmuls_s = max(self.weights_s + num_tokens * self.row_s, num_tokens * self.token_s)
        return self.fixed_s + matmuls_s + float(ends[lengths == 1].sum()) * self.context_s


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request that comes."""

    at_s: float
    num_prompt: int
    num_output: int


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the clients of a run saw."""

    ttft_s: list[float]
    gaps_s: list[np.ndarray]
    """[num_output - 1] of each stream"""
    num_tokens: int
    num_steps: int
    end_s: float

    @property
    def tokens_per_s(self) -> float:
        """Of all streams together, from the start to the end of the last."""
        return self.num_tokens / self.end_s

    @property
    def worst_stall(self) -> float:
        """The longest gap of a stream as a multiple of the same stream's median, of all streams."""
        return max(float(gaps.max() / np.median(gaps)) for gaps in self.gaps_s if len(gaps))

    def ttft_ms(self, percent: float) -> float:
        """Returns a percentile of the times to the first token."""
        return 1000 * float(np.percentile(self.ttft_s, percent))

    def gap_ms(self, percent: float) -> float:
        """Returns a percentile of the times between two tokens of a stream."""
        return 1000 * float(np.percentile(np.concatenate(self.gaps_s), percent))


def run(
    limits: Limits, costs: Costs, arrivals: Sequence[Arrival], *, spec: ModelSpec = SPEC
) -> Figures:
    """Returns what becomes of requests, in order of arrival, that run to their full length."""
    state = State(limits)
    admission.begin_epoch(state, spec)
    coming = deque(enumerate(arrivals))
    results: deque[tuple[float, StepDone]] = deque()
    came_s: list[list[float]] = [[] for _ in arrivals]
    num_steps = 0
    now = worker_free_s = 0.0
    while coming or results:
        if coming and (not results or coming[0][1].at_s < results[0][0]):
            stream, arrival = coming.popleft()
            now = arrival.at_s
            message = submit(stream, [5] * arrival.num_prompt, arrival.num_output)
            admission.submit(state, 0, message, now)
        else:
            now, done = results.popleft()
            applying.apply(state, done, now)
        while len(state.in_flight) < MAX_STEPS_IN_FLIGHT:
            plan = planning.plan(state, now)
            if plan is None:
                break
            num_steps += 1
            ends = plan.span_starts + plan.span_lengths
            worker_free_s = max(worker_free_s, now) + costs.of(plan.span_lengths, ends)
            results.append((worker_free_s + LINK_S, _result(plan)))
        for outputs in state.take_outputs().values():
            for streams in outputs.streams:
                for stream in streams.tolist():
                    came_s[stream].append(now)
    assert [len(each) for each in came_s] == [arrival.num_output for arrival in arrivals]
    return Figures(
        ttft_s=[each[0] - arrival.at_s for each, arrival in zip(came_s, arrivals, strict=True)],
        gaps_s=[np.diff(each) for each in came_s],
        num_tokens=sum(map(len, came_s)),
        num_steps=num_steps,
        end_s=now,
    )


def _result(plan: StepPlan) -> StepDone:
    return StepDone(
        epoch=1,
        step_id=plan.step_id,
        tokens=np.full(int(plan.span_samples.sum()), 7, np.int32).tobytes(),
        logprobs=(),
        faulty_rows=b"",
        compute_s=0.0,
    )


def limits(**changes: int) -> Limits:
    """Returns the default budgets, some changed; equal prompts share no blocks."""
    defaults = SchedulerConfig(model="", run_dir="")
    values = {
        "max_num_requests": defaults.max_num_requests,
        "max_mixed_prompt_tokens": defaults.max_mixed_prompt_tokens,
        "max_waiting_requests": defaults.max_waiting_requests,
        "max_waiting_tokens": defaults.max_waiting_tokens,
    }
    return Limits(**(values | changes), prefix_cache=False)


def at_once(count: int, prompts: Range, outputs: Range) -> list[Arrival]:
    """Returns requests that come together, with lengths uniform in a range."""
    random = np.random.default_rng(0)
    return [_arrival(0.0, random, prompts, outputs) for _ in range(count)]


def poisson(rate: float, seconds: float, prompts: Range, outputs: Range) -> list[Arrival]:
    """Returns `rate` requests a second at random times."""
    random = np.random.default_rng(1)
    arrivals, at_s = [], 0.0
    while (at_s := at_s + float(random.exponential(1 / rate))) < seconds:
        arrivals.append(_arrival(at_s, random, prompts, outputs))
    return arrivals


def _arrival(at_s: float, random: np.random.Generator, prompts: Range, outputs: Range) -> Arrival:
    return Arrival(
        at_s=at_s,
        num_prompt=int(random.integers(prompts[0], prompts[1] + 1)),
        num_output=int(random.integers(outputs[0], outputs[1] + 1)),
    )


def main() -> None:
    """Prints what several budgets bring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--mixed", type=int, nargs="+", default=[256, 512, 768, 1024, 2048])
    parser.add_argument("--rate", type=float, default=SEVENTY_PERCENT, help="requests a second")
    options = parser.parse_args()
    sys.stdout.write(
        "step  mixed   tok/s all at once, 256  32 (1024/256)   "
        f"at {options.rate} a second: TTFT p50  p99  between tokens p50  p99 ms  worst stall\n"
    )
    for step in options.step:
        spec = replace(SPEC, max_step_tokens=step)
        for mixed in options.mixed:
            chosen = limits(max_mixed_prompt_tokens=mixed)
            many = run(chosen, Costs(), at_once(256, UNIFORM, UNIFORM), spec=spec)
            few = run(chosen, Costs(), at_once(32, (1024, 1024), (256, 256)), spec=spec)
            load = run(chosen, Costs(), poisson(options.rate, 60.0, UNIFORM, UNIFORM), spec=spec)
            sys.stdout.write(
                f"{step:4d} {mixed:6d} {many.tokens_per_s:27.0f} {few.tokens_per_s:14.0f}"
                f"{load.ttft_ms(50):31.1f} {load.ttft_ms(99):4.1f}"
                f"{load.gap_ms(50):20.1f} {load.gap_ms(99):4.1f} {load.worst_stall:16.1f}\n"
            )


if __name__ == "__main__":
    main()
