"""Asks a real server for more than it can do in time, with deadline admission and without.

    python -m bench.deadlines [MODEL] [--loads 0.5 0.8 1 2] [--seconds 15] [--rounds 3]

Each request's deadline is `--patience` times what it takes alone. What that is, and what load
saturates the server, is measured first; then requests come at random times at multiples of it.
Prints medians of several rounds; a request counts as in time if its stream came to its end.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.recovery import POCKET, START_TIMEOUT_S, serving
from tokenloom.client import AsyncClient, DeadlineExceeded, Overloaded

SERVE_ARGS = "--device cpu --kv-cache-bytes 256MiB --max-num-requests 32 --no-prefix-cache"
PROMPTS = (16, 128)
OUTPUTS = (16, 128)
"""Numbers of tokens, uniform."""
WARM_PART = 1 / 3
"""Of a run; requests of then are not counted."""
NUM_ALONE = 5
NUM_AT_ONCE = 64
VOCABULARY = range(300, 900)
"""Token ids that any model has."""


@dataclass(frozen=True, kw_only=True)
class Alone:
    """What a request takes that has the server for itself."""

    first_s: float
    token_s: float

    def whole_s(self, num_output: int) -> float:
        """Returns the seconds of a request with so many tokens."""
        return self.first_s + (num_output - 1) * self.token_s


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A run at one load."""

    in_time: float
    """Requests a second."""
    parts: Counter[str]
    """Of all requests that were counted."""


async def ask(
    client: AsyncClient,
    random_: random.Random,
    num_output: int,
    *,
    timeout_s: float | None = None,
    arrivals_s: list[float] | None = None,
) -> None:
    """Asks for a completion and reads it to its end; `arrivals_s` takes when each token came."""
    prompt = random_.choices(VOCABULARY, k=random_.randint(*PROMPTS))
    async with client.generate(
        prompt, max_tokens=num_output, ignore_eos=True, timeout_s=timeout_s
    ) as stream:
        async for delta in stream:
            if arrivals_s is not None:
                arrivals_s += [time.monotonic()] * len(delta.token_ids)


async def measured_alone(client: AsyncClient, random_: random.Random) -> Alone:
    """Returns medians of short and long requests, one after the other."""

    async def median_s(num_output: int) -> float:
        took = []
        for _ in range(NUM_ALONE):
            begun_s = time.monotonic()
            await ask(client, random_, num_output)
            took.append(time.monotonic() - begun_s)
        return statistics.median(took)

    await median_s(OUTPUTS[1])
    first_s, long_s = await median_s(1), await median_s(OUTPUTS[1])
    return Alone(first_s=first_s, token_s=(long_s - first_s) / (OUTPUTS[1] - 1))


async def measured_saturation(client: AsyncClient, random_: random.Random, seconds: float) -> float:
    """Returns how many requests a second are done if there are always enough, by their tokens."""
    begun_s = time.monotonic()
    arrivals_s: list[float] = []

    async def keep_asking() -> None:
        while time.monotonic() < begun_s + seconds:
            await ask(client, random_, random_.randint(*OUTPUTS), arrivals_s=arrivals_s)

    await asyncio.gather(*(keep_asking() for _ in range(NUM_AT_ONCE)))
    warm_s = WARM_PART * seconds
    num_tokens = sum(warm_s < each - begun_s < seconds for each in arrivals_s)
    return num_tokens / (seconds - warm_s) / statistics.fmean(OUTPUTS)


async def measured(
    client: AsyncClient, alone: Alone, *, rate: float, seconds: float, patience: float, seed: int
) -> Figures:
    """Returns what became of requests that came at random times."""
    random_ = random.Random(seed)
    parts: Counter[str] = Counter()
    begun_s = time.monotonic()

    async def one(*, counts: bool) -> None:
        num_output = random_.randint(*OUTPUTS)
        try:
            timeout_s = patience * alone.whole_s(num_output)
            await ask(client, random_, num_output, timeout_s=timeout_s)
            end = "in time"
        except Overloaded as error:
            end = error.reason
        except DeadlineExceeded:
            end = "late"
        parts[end] += counts

    tasks, at_s = [], 0.0
    while (at_s := at_s + random_.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, begun_s + at_s - time.monotonic()))
        tasks.append(asyncio.create_task(one(counts=at_s > WARM_PART * seconds)))
    await asyncio.gather(*tasks)
    return Figures(in_time=parts["in time"] / ((1 - WARM_PART) * seconds), parts=parts)


def row(load: float, name: str, rounds: Sequence[Figures]) -> str:
    """Returns a line of the table: medians."""

    def part(of: str) -> str:
        return f"{statistics.median(each.parts[of] / each.parts.total() for each in rounds):.0%}"

    refused = statistics.median(
        1 - (each.parts["in time"] + each.parts["late"]) / each.parts.total() for each in rounds
    )
    rates = sorted(each.in_time for each in rounds)
    spread = f"{rates[0]:.1f}–{rates[-1]:.1f}"
    cells = (f"{load:g}", name, f"{statistics.median(rates):.1f}", spread, part("in time"))
    return "| " + " | ".join((*cells, f"{refused:.0%}", part("late"))) + " |"


async def compare(addresses: dict[str, str], args: argparse.Namespace) -> None:
    """Measures both servers in turn, so that what disturbs the machine disturbs both."""
    clients = {name: AsyncClient(address, resume=None) for name, address in addresses.items()}
    for client in clients.values():
        await client.wait_ready(timeout_s=START_TIMEOUT_S)
    random_ = random.Random(0)
    first = next(iter(clients.values()))
    alone = await measured_alone(first, random_)
    saturation = await measured_saturation(first, random_, args.seconds)
    print(
        f"alone: first token {1000 * alone.first_s:.0f} ms, "
        f"then {1000 * alone.token_s:.1f} ms each; "
        f"saturated by {saturation:.1f} requests a second\n\n"
        "| load | admission | in time /s | least–most | in time | refused | late |\n"
        "| --- | --- | --- | --- | --- | --- | --- |",
        flush=True,
    )
    for load in args.loads:
        found: dict[str, list[Figures]] = {name: [] for name in clients}
        for seed in range(args.rounds):
            for name, client in clients.items():
                figures = await measured(
                    client,
                    alone,
                    rate=load * saturation,
                    seconds=args.seconds,
                    patience=args.patience,
                    seed=seed,
                )
                found[name].append(figures)
        for name, rounds in found.items():
            print(row(load, name, rounds), flush=True)
    for client in clients.values():
        await client.close()


def main(argv: Sequence[str]) -> int:
    """Prints a table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=POCKET)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 1.0, 2.0])
    parser.add_argument("--patience", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve-args", default=SERVE_ARGS, help="for `tokenloom serve`")
    args = parser.parse_args(argv)
    options = shlex.split(args.serve_args)
    with (
        serving(args.model, options, 1) as with_it,
        serving(args.model, [*options, "--no-deadline-admission"], 1) as without_it,
    ):
        asyncio.run(compare({"yes": with_it.address, "no": without_it.address}, args))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
