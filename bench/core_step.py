"""Microseconds of core time a step in steady decode: plan, encode, decode, apply, pack.

    python bench/core_step.py [--requests 64 256 1024 4096] [--block-size 16]

Requests stand at random positions, so in each step 1 in block-size of them
needs a block and 1 in block-size fills one. No sockets: what a step costs the
deciding core itself. Prints a table, JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from tokenloom.scheduler.core import admission, applying, planning
from tokenloom.scheduler.core.state import Limits, ModelSpec, State
from tokenloom.scheduler.messages import Submit, encode
from tokenloom.wire import codec
from tokenloom.wire.messages import SamplingParams, StepDone

PARTS = ("plan", "send", "receive", "apply", "hand on")
WARMUP_STEPS = 20


def running_state(num_requests: int, block_size: int) -> State:
    """Returns a core with `num_requests` submitted, each of a random length."""
    state = State(
        Limits(
            max_num_requests=num_requests,
            max_mixed_prompt_tokens=8192,
            max_waiting_requests=num_requests,
            max_waiting_tokens=10**9,
        )
    )
    spec = ModelSpec(
        epoch=1,
        vocab_size=32000,
        max_model_tokens=4096,
        max_step_tokens=max(8192, 2 * num_requests),
        block_size=block_size,
        num_blocks=num_requests * (1536 // block_size),
    )
    admission.begin_epoch(state, spec)
    rng = np.random.default_rng(0)
    sampling = SamplingParams(
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        seed=1,
        min_tokens=0,
        stop_token_ids=(2, 3),
        logit_bias=(),
        num_top_logprobs=None,
    )
    for stream in range(num_requests):
        tokens = rng.integers(4, 32000, rng.integers(64, 192)).astype(np.int32)
        message = Submit(
            stream=stream, tokens=tokens.tobytes(), max_tokens=1024, sampling=sampling, salt=""
        )
        admission.submit(state, 0, message, 0.0)
    return state


def measure(num_requests: int, num_steps: int, block_size: int) -> dict[str, float]:
    """Returns microseconds by part (medians) and of the whole (median, mean, p99)."""
    state = running_state(num_requests, block_size)
    rng = np.random.default_rng(1)
    frames: list[bytes] = []
    rows: list[list[float]] = []
    clock = time.perf_counter
    steady = 0
    while len(rows) < num_steps:
        t0 = clock()
        plan = planning.plan(state, t0)
        t1 = clock()
        assert plan is not None
        codec.encode(plan.to_wire(1))
        t2 = clock()
        num_sampled = int(plan.span_samples.sum())
        tokens = rng.integers(4, 32000, num_sampled).astype(np.int32)
        done = StepDone(
            epoch=1,
            step_id=plan.step_id,
            tokens=tokens.tobytes(),
            logprobs=(),
            faulty_rows=b"",
            compute_s=0.0,
        )
        frames.append(codec.encode(done))
        if len(frames) < 2:
            continue
        t3 = clock()
        message = codec.decode_to_core(frames.pop(0))
        t4 = clock()
        assert isinstance(message, StepDone)
        applying.apply(state, message, t4)
        t5 = clock()
        for outputs in state.take_outputs().values():
            encode(outputs.packed())
        t6 = clock()
        if len(plan.span_slots) == num_requests and not plan.admitted:
            steady += 1
        if steady > WARMUP_STEPS:
            rows.append([1e6 * t for t in (t1 - t0, t2 - t1, t4 - t3, t5 - t4, t6 - t5)])
    assert not state.check()
    times = np.array(rows)
    whole = times.sum(axis=1)
    parts = dict(zip(PARTS, np.median(times, axis=0).tolist(), strict=True))
    return parts | {
        "median": float(np.median(whole)),
        "mean": float(whole.mean()),
        "p99": float(np.percentile(whole, 99)),
    }


def main() -> None:
    """Measures each size and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = {
        count: measure(count, options.steps, options.block_size) for count in options.requests
    }
    if options.json:
        print(json.dumps(results))
        return
    columns = (*PARTS, "median", "mean", "p99")
    print("requests " + " ".join(f"{name:>8}" for name in columns) + "   (µs a step)")
    for count, result in results.items():
        print(f"{count:8d} " + " ".join(f"{result[name]:8.1f}" for name in columns))


if __name__ == "__main__":
    main()
