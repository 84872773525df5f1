"""Deadlines under load, in virtual time: what is done in time, and what is computed in vain.

Requests come at random at a multiple of the rate that saturates the worker, each with a deadline of
`PATIENCE` times what it takes alone. `python -m tests.simulation.deadlines` prints a table, with
deadline admission and without.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from itertools import product
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from tests.core.processes import submit
from tests.simulation.timed import (
    LINK_S,
    LLAMA_8B,
    QWEN_06B,
    SPEC,
    UNIFORM,
    Arrival,
    Costs,
    Worker,
    limits,
    poisson,
    result,
)
from tokenloom.scheduler.core import admission, applying, planning, timeliness
from tokenloom.scheduler.core.loop import MAX_STEPS_IN_FLIGHT
from tokenloom.scheduler.core.planning import StepPlan
from tokenloom.scheduler.core.state import Limits, State
from tokenloom.wire.messages import StepDone

BoolArray: TypeAlias = npt.NDArray[np.bool_]

PATIENCE = 3.0
"""A deadline, as a multiple of what the request takes alone."""
EOS_ID = 9
SECONDS = 60.0
WARM_S = 20.0
"""At the beginning of a run; requests of then are not counted."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's costs and the load that saturates it."""

    name: str
    costs: Costs
    saturation: float
    """UNIFORM requests a second: what it does of many that come at once."""


SHAPES = (
    Shape(name="8B", costs=LLAMA_8B, saturation=22.5),
    Shape(name="0.6B", costs=QWEN_06B, saturation=53.0),
)


class Requests:
    """What became of the requests of a run; a row each, in order of arrival."""

    def __init__(self, arrivals: Sequence[Arrival], patience_s: Sequence[float]) -> None:
        self.at_s = np.array([each.at_s for each in arrivals])
        self.num_prompt = np.array([each.num_prompt for each in arrivals])
        self.num_output = np.array([each.num_output for each in arrivals])
        self.deadline_s = self.at_s + np.array(patience_s)
        self.num_tokens = np.zeros(len(arrivals), np.int64)
        self.last_s = np.zeros(len(arrivals))
        self.is_admitted = np.zeros(len(arrivals), bool)
        self.is_refused = np.zeros(len(arrivals), bool)

    @property
    def in_time(self) -> BoolArray:
        """Whether all of it came before the deadline."""
        is_whole = self.num_tokens == self.num_output
        is_done: BoolArray = is_whole & (self.last_s <= self.deadline_s)
        return is_done


@dataclass(frozen=True, kw_only=True)
class Tally:
    """The figures of a run, without its warm-up."""

    goodput: float
    """Requests a second that were done in time."""
    in_time: float
    refused: float
    late: float
    """Parts of all requests: those that ran and were not done in time are late."""
    wasted: float
    """Part of all tokens: drawn for those who were late."""
    num_past: int
    """Tokens of steps that were planned past the deadline of their request."""
    num_begun_past: int
    """Tokens of steps that began past it."""


def alone_s(costs: Costs, arrival: Arrival) -> float:
    """Returns what a request takes of a worker that has nothing else to do."""
    prompt = np.array([arrival.num_prompt])
    prefill_s = max(costs.launch_s, costs.on_device(prompt, prompt))
    ends = arrival.num_prompt + np.arange(1, arrival.num_output)
    token_s = costs.on_device(np.array([1]), np.array([0]))
    return prefill_s + len(ends) * token_s + float(ends.sum()) * costs.context_s + LINK_S


class Run:
    """One run of the core, to its end."""

    def __init__(
        self,
        limits: Limits,
        costs: Costs,
        arrivals: Sequence[Arrival],
        *,
        max_tokens: int | None = None,
        patience: float = PATIENCE,
    ) -> None:
        """With `max_tokens` each request may have so many, and ends by a stop token.

        Then nobody knows how long it will be, and all have the deadline of the mean one.
        """
        mean = Arrival(at_s=0.0, num_prompt=sum(UNIFORM) // 2, num_output=sum(UNIFORM) // 2)
        patience_s = [patience * alone_s(costs, mean if max_tokens else each) for each in arrivals]
        self.requests = Requests(arrivals, patience_s)
        self.num_past = self.num_begun_past = 0
        self.state = State(limits)
        self.now = 0.0
        self._max_tokens = max_tokens
        self._worker = Worker(costs)
        self._results: deque[tuple[float, StepDone]] = deque()
        admission.begin_epoch(self.state, SPEC)
        coming = deque(range(len(arrivals)))
        while coming or self._results:
            at_s = arrivals[coming[0]].at_s if coming else np.inf
            if not self._results or at_s < self._results[0][0]:
                self.now = at_s
                self._submit(coming.popleft())
            else:
                self.now, done = self._results.popleft()
                applying.apply(self.state, done, self.now)
            self._advance()

    def _submit(self, stream: int) -> None:
        requests = self.requests
        num_output = int(requests.num_output[stream])
        message = submit(
            stream,
            [5] * int(requests.num_prompt[stream]),
            self._max_tokens or num_output,
            stop_token_ids=(EOS_ID,),
        )
        timeout_s = float(requests.deadline_s[stream]) - self.now
        message = msgspec.structs.replace(message, timeout_s=timeout_s)
        admission.submit(self.state, 0, message, self.now)

    def _advance(self) -> None:
        timeliness.expire(self.state, self.now)
        while len(self.state.in_flight) < MAX_STEPS_IN_FLIGHT:
            plan = planning.plan(self.state, self.now)
            if plan is None:
                break
            done_s, device_s = self._worker.step(plan, self.now)
            self._results.append((done_s + LINK_S, self._computed(plan, done_s, device_s)))
        self._read()

    def _computed(self, plan: StepPlan, done_s: float, device_s: float) -> StepDone:
        """Returns the step's result, and counts what it computed in vain."""
        slots, requests = self.state.slots, self.requests
        assert slots is not None
        streams = slots.stream[plan.span_slots]
        num_tokens = plan.span_lengths[requests.deadline_s[streams] < self.now]
        self.num_past += int(num_tokens.sum())
        num_tokens = plan.span_lengths[requests.deadline_s[streams] < done_s - device_s]
        self.num_begun_past += int(num_tokens.sum())
        ends = plan.span_starts + plan.span_lengths
        is_last = ends + 1 == requests.num_prompt[streams] + requests.num_output[streams]
        tokens = np.where(is_last & (self._max_tokens is not None), EOS_ID, 7)
        tokens = tokens[plan.span_samples].astype(np.int32)
        return msgspec.structs.replace(result(plan, device_s), tokens=tokens.tobytes())

    def _read(self) -> None:
        requests = self.requests
        for outputs in self.state.take_outputs().values():
            requests.is_admitted[[admitted.stream for admitted in outputs.admitted]] = True
            requests.is_refused[[refused.stream for refused in outputs.refused]] = True
            for streams in outputs.streams:
                requests.num_tokens[streams] += 1
                requests.last_s[streams] = self.now

    def tally(self) -> Tally:
        """Returns the figures of the requests that came after the warm-up."""
        requests = self.requests
        counted = requests.at_s >= WARM_S
        in_time = requests.in_time & counted
        late = requests.is_admitted & ~requests.in_time & counted
        num_tokens, num_requests = requests.num_tokens[counted].sum(), counted.sum()
        return Tally(
            goodput=float(in_time.sum() / (SECONDS - WARM_S)),
            in_time=float(in_time.sum() / num_requests),
            refused=float((requests.is_refused & counted).sum() / num_requests),
            late=float(late.sum() / num_requests),
            wasted=float(requests.num_tokens[late].sum() / num_tokens),
            num_past=self.num_past,
            num_begun_past=self.num_begun_past,
        )


def at_load(
    shape: Shape, load: float, seed: int, *, deadline_admission: bool, **options: object
) -> Run:
    """Returns a run at a multiple of saturation."""
    arrivals = poisson(load * shape.saturation, SECONDS, UNIFORM, UNIFORM, seed=seed)
    bounds = replace(limits(), deadline_admission=deadline_admission)
    return Run(bounds, shape.costs, arrivals, **options)  # type: ignore[arg-type]


def mean(tallies: Sequence[Tally]) -> Tally:
    """Returns the means of several runs; counts of vain tokens are summed."""
    rows = [astuple(tally) for tally in tallies]
    means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    counts = [sum(column) for column in zip(*(row[-2:] for row in rows), strict=True)]
    return Tally(**dict(zip(Tally.__annotations__, (*means[:-2], *counts), strict=True)))


def main() -> None:
    """Prints what becomes of requests at several loads."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 0.9, 1.0, 2.0])
    parser.add_argument("--patience", type=float, default=PATIENCE)
    parser.add_argument("--max-tokens", type=int, help="for all; they end by a stop token")
    options = parser.parse_args()
    sys.stdout.write(
        "| model | load | admission | in time /s | in time | refused | late "
        "| tokens in vain | planned, begun past the deadline |\n" + "| --- " * 9 + "|\n"
    )
    more = {"patience": options.patience, "max_tokens": options.max_tokens}
    for shape, load, admits in product(SHAPES, options.loads, (True, False)):
        seeds = range(options.seeds)
        runs = [at_load(shape, load, seed, deadline_admission=admits, **more) for seed in seeds]
        tally = mean([run.tally() for run in runs])
        parts = (tally.in_time, tally.refused, tally.late, tally.wasted)
        cells = (
            *(shape.name, f"{load:g}", "yes" if admits else "no", f"{tally.goodput:.1f}"),
            *(f"{part:.1%}" for part in parts),
            f"{tally.num_past}, {tally.num_begun_past}",
        )
        sys.stdout.write("| " + " | ".join(cells) + " |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
