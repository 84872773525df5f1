"""Shares calls among servers of unlike size, and compares the shares with what each could take.

    python bench/balancing.py [--blocks 150 300 450] [--callers 24] [--seconds 60]

Starts a scheduler with a fake worker for each size of the KV pool, and calls all of them through
one client of the SDK. What is compared is what the servers report themselves: their share of the
requests finished, and of the requests that would fill them.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc.aio

from tokenloom.client import AsyncClient
from tokenloom.v1 import load_pb2

POCKET = Path(__file__).parent.parent / "models" / "pocket"
REPORTS = "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics"
VOCAB_SIZE = 300
START_TIMEOUT_S = 120.0


def main() -> None:
    """Measures once and prints a line a server."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[150, 300, 450], help="of pools")
    parser.add_argument("--callers", type=int, default=24, help="that call one after the other")
    parser.add_argument("--seconds", type=float, default=60.0, help="of calls")
    options = parser.parse_args()
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(num_blocks)) for num_blocks in options.blocks]
        reports = asyncio.run(measure(servers, options.callers, options.seconds))
    rates = [report.rps_fractional for report in reports]
    capacities = [each.rps_fractional / each.application_utilization for each in reports]
    print(f"{'blocks':>8} {'requests/s':>11} {'utilization':>12} {'share':>7} {'of capacity':>12}")
    for num_blocks, report, capacity in zip(options.blocks, reports, capacities, strict=True):
        rate = report.rps_fractional
        print(
            f"{num_blocks:8} {rate:11.2f} {report.application_utilization:12.3f} "
            f"{rate / sum(rates):7.3f} {capacity / sum(capacities):12.3f}"
        )


@contextmanager
def serving(num_blocks: int) -> Iterator[Path]:
    """Runs a scheduler and a fake worker; yields their folder, which tells the address."""
    with tempfile.TemporaryDirectory(prefix="loom-") as name, ExitStack() as stack:
        folder = Path(name)
        scheduler = (f"--model={POCKET}", f"--run-dir={folder}", "--listen=127.0.0.1:0")
        worker = (f"--connect=ipc://{folder}/worker.sock", f"--num-blocks={num_blocks}")
        for arguments in (
            ("tokenloom.scheduler", "scheduler", *scheduler, "--no-prefix-cache"),
            ("tokenloom.worker.fake", *worker, f"--vocab-size={VOCAB_SIZE}", "--step-ms=10"),
        ):
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments], stdout=subprocess.DEVNULL
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
        yield folder


async def measure(
    servers: list[Path], num_callers: int, seconds: float
) -> list[load_pb2.OrcaLoadReport]:
    """Calls the servers through one client; returns what each reports in the end."""
    addresses = [await address_of(folder) for folder in servers]
    end_s = time.monotonic() + seconds
    async with AsyncClient(addresses) as client:

        async def call(caller: int) -> None:
            draw = random.Random(caller)
            while time.monotonic() < end_s:
                prompt = [draw.randrange(4, VOCAB_SIZE) for _ in range(40)]
                await client.generate(prompt, max_tokens=60, ignore_eos=True).result()

        await asyncio.gather(*(call(caller) for caller in range(num_callers)))
    return [await report_of(address) for address in addresses]


async def address_of(folder: Path) -> str:
    """Returns where a server listens, once it is ready."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while not (folder / "address").exists():  # noqa: ASYNC110 - another process's
            await asyncio.sleep(0.1)
    address = (folder / "address").read_text()
    async with AsyncClient(address) as client:
        await client.wait_ready(timeout_s=START_TIMEOUT_S)
    return address


async def report_of(address: str) -> load_pb2.OrcaLoadReport:
    """Asks a server for one load report."""
    async with grpc.aio.insecure_channel(address) as channel:
        listen = channel.unary_stream(
            REPORTS, request_serializer=bytes, response_deserializer=bytes
        )
        call = listen(b"")
        report = await call.read()
        call.cancel()
    assert isinstance(report, bytes)
    return load_pb2.OrcaLoadReport.FromString(report)


if __name__ == "__main__":
    main()
