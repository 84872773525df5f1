"""What one tenant's flood does to another one's first tokens, through gRPC.

    python bench/fairness.py [--seconds 20] [--rate 2] [--factor 100] [SERVE OPTIONS]

Starts `tokenloom serve models/pocket` with two tenants, known by bearer tokens. The steady one
sends a request at a time, `--rate` a second; the other one sends nothing, then `--factor` times as
many. Prints the steady tenant's times to the first token for both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.e2e.server import Server
from tokenloom.client import AsyncClient, TokenloomError
from tokenloom.scheduler.bearer import new_token
from tokenloom.scheduler.tenants import digest_of_token

MODEL = Path(__file__).parents[1] / "models" / "pocket"
NUM_PROMPT, NUM_OUTPUT = 64, 48


async def send(client: AsyncClient, seed: int, times_s: list[float]) -> None:
    """Sends a request; enters its time to the first token, if it is taken."""
    begin_s, prompt = time.perf_counter(), random.Random(seed).choices(range(20, 200), k=NUM_PROMPT)
    try:
        stream = client.generate(prompt, max_tokens=NUM_OUTPUT, ignore_eos=True)
        async for _ in stream:
            times_s.append(time.perf_counter() - begin_s)
            break
        async for _ in stream:
            pass
    except TokenloomError:
        return


async def load(address: str, token: str, rate: float, seconds: float) -> list[float]:
    """Sends `rate` requests a second at random times; returns times to first tokens."""
    chance, times_s, tasks = random.Random(int(rate * 10)), list[float](), set[asyncio.Task[None]]()
    async with AsyncClient(address, token=token) as client:
        end_s, number = time.perf_counter() + seconds, 0
        while time.perf_counter() < end_s:
            await asyncio.sleep(chance.expovariate(rate))
            number += 1
            tasks.add(asyncio.create_task(send(client, number, times_s)))
        if rate < 10:
            await asyncio.gather(*tasks)
        for task in tasks:
            task.cancel()
    return times_s


async def compare(address: str, tokens: dict[str, str], options: argparse.Namespace) -> None:
    """Measures without and with the flood."""
    rate, seconds = options.rate, options.seconds
    await load(address, tokens["steady"], rate, 3.0)
    results = {}
    for label, factor in (("alone", 0), ("as many", 1), ("flood", options.factor)):
        flood = asyncio.create_task(asyncio.sleep(0))
        if factor:
            flood = asyncio.create_task(
                load(address, tokens["flood"], factor * rate, seconds + 6)  # type: ignore[arg-type]
            )
            await asyncio.sleep(3)
        times_ms = 1000 * np.array(await load(address, tokens["steady"], rate, seconds))
        await flood
        results[label] = {
            "requests": len(times_ms),
            "p50_ms": round(float(np.percentile(times_ms, 50)), 1),
            "p95_ms": round(float(np.percentile(times_ms, 95)), 1),
        }
        print(label, json.dumps(results[label]), flush=True)


def main() -> None:
    """Serves the pocket model and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=2.0)
    parser.add_argument("--factor", type=float, default=100.0)
    options, rest = parser.parse_known_args()
    tokens = {name: new_token() for name in ("steady", "flood")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tenants.toml"
        path.write_text(
            "\n".join(
                f'[tenants.{name}]\ntoken_sha256 = ["{digest_of_token(token)}"]'
                for name, token in tokens.items()
            )
        )
        with Server.of_model(MODEL, f"--tenants={path}", *rest) as server:
            server.client(token=tokens["steady"]).close()
            asyncio.run(compare(server.address, tokens, options))


if __name__ == "__main__":
    main()
