"""What one tenant's flood does to another one's first tokens, under virtual time.

The steady tenant sends requests at random times, a third of what the worker carries. The other
one sends nothing, or as much, or a hundred times as much.

    python -m tests.simulation.fairness [--stretch 1.2] [--seeds 3]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tests.simulation.timed import (
    LLAMA_8B,
    QWEN_06B,
    SEVENTY_PERCENT,
    UNIFORM,
    Arrival,
    Costs,
    Range,
    limits,
    run,
)
from tokenloom.scheduler.core.state import State
from tokenloom.scheduler.tenants import Tenant

STEADY, FLOOD = "steady", "flood"
TENANTS = (Tenant(name=STEADY), Tenant(name=FLOOD))
LOAD = 0.35
"""Of the steady tenant, as a part of what the worker carries."""
SECONDS = 12.0
WARM_S = 2.0
"""Until costs are known and the flood is under way; requests before that are not counted."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the requests of a flood are like."""

    prompts: Range
    outputs: Range


KINDS = {
    "as the steady ones": Kind(prompts=UNIFORM, outputs=UNIFORM),
    "long completions": Kind(prompts=(100, 200), outputs=(2000, 4000)),
    "long prompts": Kind(prompts=(4000, 8000), outputs=(1, 4)),
}


def arrivals(tenant: str, rate: float, kind: Kind, *, seed: int) -> list[Arrival]:
    """Returns a tenant's requests, `rate` a second at random times."""
    random = np.random.default_rng((seed, len(tenant)))
    times_s = np.cumsum(random.exponential(1 / rate, int(2 * rate * SECONDS) + 10))
    times_s = times_s[times_s < SECONDS]
    return [
        Arrival(
            at_s=float(at_s),
            num_prompt=int(random.integers(kind.prompts[0], kind.prompts[1] + 1)),
            num_output=int(random.integers(kind.outputs[0], kind.outputs[1] + 1)),
            tenant=tenant,
        )
        for at_s in times_s
    ]


def first_tokens(
    shape: Costs,
    kind: Kind,
    factor: float,
    *,
    seed: int,
    stretch: float | None = None,
    watch: Callable[[State], None] = lambda _: None,
) -> tuple[np.ndarray, float]:
    """Returns the steady tenant's times to the first token, and all tokens a second.

    The other tenant sends `factor` times as many requests.
    """
    rate = LOAD * SEVENTY_PERCENT[shape] / 0.7
    both = arrivals(STEADY, rate, KINDS["as the steady ones"], seed=seed)
    if factor:
        # More than a queue holds need not be drawn.
        flood = arrivals(FLOOD, factor * rate, kind, seed=seed)[:10_000]
        both = sorted(both + flood, key=lambda arrival: arrival.at_s)
    bounds = limits()
    if stretch is not None:
        bounds = replace(bounds, tenant_stretch=stretch)
    figures = run(bounds, shape, both, tenants=TENANTS, until_s=SECONDS, watch=watch)
    counted = [
        ttft_s
        for ttft_s, arrival in zip(figures.ttft_s, both, strict=True)
        if arrival.tenant == STEADY and WARM_S < arrival.at_s < SECONDS - WARM_S
    ]
    # Who had none when the run ended waited for at least as long as was left.
    return np.nan_to_num(np.array(counted), nan=WARM_S), figures.tokens_per_s


def main() -> None:
    """Prints the steady tenant's times to the first token for each flood."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stretch", type=float)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    sys.stdout.write(
        "                                  first tokens of the steady tenant, ms: p50, p99      "
        "  tokens/s of both\n"
        "worker  flood                     without it      as many      100 × as many"
        "      with 100 ×\n"
    )
    for name, shape in (("8B", LLAMA_8B), ("0.6B", QWEN_06B)):
        for label, kind in KINDS.items():
            row = f"{name:7s} {label:20s}"
            for factor in (0, 1, 100):
                runs = [
                    first_tokens(shape, kind, factor, seed=seed, stretch=options.stretch)
                    for seed in range(options.seeds)
                ]
                ttft_ms = 1000 * np.concatenate([ttft_s for ttft_s, _ in runs])
                row += f"  {np.percentile(ttft_ms, 50):7.1f}{np.percentile(ttft_ms, 99):8.1f}"
            rate = np.mean([rate for _, rate in runs])
            sys.stdout.write(f"{row}{rate:12.0f}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
