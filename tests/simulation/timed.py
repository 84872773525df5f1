"""The core under virtual time, with steps that take as long as those of a model on a GPU.

What a budget does to throughput, first tokens and stalls shows here in seconds and without a
GPU; `python -m tests.simulation.timed` prints a table.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import msgspec
import numpy as np

from tests.core.processes import submit
from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.core import admission, applying, planning
from tokenloom.scheduler.core.loop import MAX_STEPS_IN_FLIGHT
from tokenloom.scheduler.core.planning import StepPlan
from tokenloom.scheduler.core.state import Limits, ModelSpec, State
from tokenloom.scheduler.tenants import Tenant
from tokenloom.wire.messages import StepDone

LINK_S = 200e-6
"""From the end of a step to the core's knowing it."""
UNIFORM = (100, 1024)
"""Lengths of prompts and outputs."""

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
    """Seconds that a step takes, fitted to steps measured on an H200."""

    fixed_s: float
    """Sampling, launches that nothing hides."""
    weights_s: float
    """Reading all weights once: the matmuls of a step with few tokens."""
    row_s: float
    """What one more token adds to that."""
    token_s: float
    """A token of a step with so many that matmuls are bound by arithmetic."""
    context_s: float
    """Reading one position of a request's KV."""
    launch_s: float = 1e-3
    """Of the host, which launches a step with prompts kernel by kernel, one step at a time."""

    def on_device(self, lengths: np.ndarray, ends: np.ndarray) -> float:
        """Returns the device's seconds for spans of `lengths` that reach to `ends`."""
        num_tokens = float(lengths.sum())
        matmuls_s = max(self.weights_s + num_tokens * self.row_s, num_tokens * self.token_s)
        return self.fixed_s + matmuls_s + float(ends[lengths == 1].sum()) * self.context_s


LLAMA_8B = Costs(fixed_s=0.5e-3, weights_s=3.5e-3, row_s=6e-6, token_s=1 / 44_000, context_s=37e-9)
QWEN_06B = Costs(fixed_s=0.4e-3, weights_s=0.4e-3, row_s=1e-6, token_s=2.3e-6, context_s=30e-9)

SEVENTY_PERCENT = {LLAMA_8B: 15.0, QWEN_06B: 37.0}
"""Requests a second with UNIFORM lengths: 70 % of what a worker with such steps carries."""


class Worker:
    """The times of a worker: it launches steps one after the other, and so its device runs them."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._host_free_s = 0.0
        self._device_free_s = 0.0

    def step(self, plan: StepPlan, now: float) -> tuple[float, float]:
        """Returns when a step that comes `now` is done, and its seconds on the device."""
        launch_s = 0.0 if (plan.span_lengths == 1).all() else self._costs.launch_s
        launched_s = max(now, self._host_free_s)
        self._host_free_s = launched_s + launch_s
        begin_s = max(launched_s, self._device_free_s)
        ends = plan.span_starts + plan.span_lengths
        device_s = self._costs.on_device(plan.span_lengths, ends)
        self._device_free_s = max(begin_s + device_s, self._host_free_s)
        return self._device_free_s, self._device_free_s - begin_s


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request that comes."""

    at_s: float
    num_prompt: int
    num_output: int
    tenant: str = ""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the clients of a run saw."""

    ttft_s: list[float]
    """In order of arrival; not a number: it had no token when the run ended, or was refused."""
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
    limits: Limits,
    costs: Costs,
    arrivals: Sequence[Arrival],
    *,
    spec: ModelSpec = SPEC,
    tenants: Sequence[Tenant] = (),
    until_s: float = math.inf,
    watch: Callable[[State], None] = lambda _: None,
) -> Figures:
    """Returns what becomes of requests, in order of arrival, that run to their full length.

    The run ends with the last of them, or before. `watch` sees the state after each step's plan.
    """
    state = State(limits)
    state.set_tenants({tenant.name: tenant for tenant in tenants}, 0.0)
    admission.begin_epoch(state, spec)
    coming = deque(enumerate(arrivals))
    results: deque[tuple[float, StepDone]] = deque()
    came_s: list[list[float]] = [[] for _ in arrivals]
    num_steps = 0
    now = 0.0
    worker = Worker(costs)
    while (coming or results) and now < until_s:
        if coming and (not results or coming[0][1].at_s < results[0][0]):
            stream, arrival = coming.popleft()
            now = arrival.at_s
            message = submit(stream, [5] * arrival.num_prompt, arrival.num_output)
            message = msgspec.structs.replace(message, tenant=arrival.tenant)
            admission.submit(state, 0, message, now)
        else:
            now, done = results.popleft()
            applying.apply(state, done, now)
        while len(state.in_flight) < MAX_STEPS_IN_FLIGHT:
            plan = planning.plan(state, now)
            if plan is None:
                break
            num_steps += 1
            done_s, compute_s = worker.step(plan, now)
            results.append((done_s + LINK_S, result(plan, compute_s)))
            watch(state)
        for outputs in state.take_outputs().values():
            for streams in outputs.streams:
                for stream in streams.tolist():
                    came_s[stream].append(now)
    if until_s == math.inf:
        assert [len(each) for each in came_s] == [arrival.num_output for arrival in arrivals]
    return Figures(
        ttft_s=[
            (each[0] if each else math.nan) - arrival.at_s
            for each, arrival in zip(came_s, arrivals, strict=True)
        ],
        gaps_s=[np.diff(each) for each in came_s],
        num_tokens=sum(map(len, came_s)),
        num_steps=num_steps,
        end_s=now,
    )


def result(plan: StepPlan, compute_s: float) -> StepDone:
    """Returns what a worker answers whose requests all draw the same token."""
    return StepDone(
        epoch=1,
        step_id=plan.step_id,
        tokens=np.full(int(plan.span_samples.sum()), 7, np.int32).tobytes(),
        logprobs=(),
        faulty_rows=b"",
        compute_s=compute_s,
    )


def limits(*, max_mixed_prompt_tokens: int | None = None) -> Limits:
    """Returns the default bounds, with that budget; equal prompts share no blocks."""
    defaults = SchedulerConfig(model="", run_dir="")
    return Limits(
        max_num_requests=defaults.max_num_requests,
        max_mixed_prompt_tokens=max_mixed_prompt_tokens,
        max_waiting_requests=defaults.max_waiting_requests,
        max_waiting_tokens=defaults.max_waiting_tokens,
        prefix_cache=False,
    )


def at_once(count: int, prompts: Range, outputs: Range) -> list[Arrival]:
    """Returns requests that come together, with lengths uniform in a range."""
    random = np.random.default_rng(0)
    return [_arrival(0.0, random, prompts, outputs) for _ in range(count)]


def poisson(
    rate: float, seconds: float, prompts: Range, outputs: Range, *, seed: int = 1
) -> list[Arrival]:
    """Returns `rate` requests a second at random times."""
    random = np.random.default_rng(seed)
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


BURSTS = {
    "b32": at_once(32, (1024, 1024), (256, 256)),
    "b128": at_once(128, (512, 512), (256, 256)),
    "mixed256": at_once(256, UNIFORM, UNIFORM),
}
"""The cases of `tokenloom bench` that begin with all requests at once."""


def main() -> None:
    """Prints what several budgets bring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=int, default=SPEC.max_step_tokens)
    parser.add_argument("--mixed", type=int, nargs="*", default=[512, 2048], help="fixed budgets")
    parser.add_argument("--launch-ms", type=float, default=1.0, help="of a step with prompts")
    options = parser.parse_args()
    spec = replace(SPEC, max_step_tokens=options.step)
    sys.stdout.write(
        "                 all at once: tok/s, last first token ms   "
        "     | random arrivals, ms: TTFT     between tokens\n"
        "shape     mixed         b32         b128       mixed256    "
        "     |    rate   tok/s   p50   p99   p50   p99  stall\n"
    )
    for name, shape in (("8B", LLAMA_8B), ("0.6B", QWEN_06B)):
        costs = replace(shape, launch_s=options.launch_ms / 1000)
        rate = SEVENTY_PERCENT[shape]
        for mixed in (*options.mixed, None):
            row = f"{name:6s} {mixed or 'by cost':>8}"
            for burst in BURSTS.values():
                figures = run(limits(max_mixed_prompt_tokens=mixed), costs, burst, spec=spec)
                row += f"{figures.tokens_per_s:8.0f} {figures.ttft_ms(100):6.0f}"
            arrivals = poisson(rate, 60.0, UNIFORM, UNIFORM)
            load = run(limits(max_mixed_prompt_tokens=mixed), costs, arrivals, spec=spec)
            sys.stdout.write(
                f"{row}     | {rate:7.1f}{load.tokens_per_s:8.0f}"
                f"{load.ttft_ms(50):6.1f}{load.ttft_ms(99):6.1f}"
                f"{load.gap_ms(50):6.1f}{load.gap_ms(99):6.1f}{load.worst_stall:7.1f}\n"
            )


if __name__ == "__main__":
    main()
