"""The picture of a report: latency and throughput against the load."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tokenloom.client.bench.report import Report

MISSING = "--plot needs matplotlib: pip install 'tokenloom-client[plot]'"

_AXIS = {
    "at_once": "requests at once",
    "concurrency": "streams kept busy",
    "rate": "requests/s (Poisson)",
}


def check_installed() -> None:
    """Raises ModuleNotFoundError, with what to do about it, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(MISSING)


def plot(report: Report, path: Path) -> None:
    """Writes the picture; its format is that of the name's ending. Raises OSError, ValueError."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra; only --plot needs it

    picture = Figure(figsize=(11, 4.5), layout="constrained")
    latency, throughput = picture.subplots(1, 2)
    points = sorted(report.points, key=lambda point: point.value)
    loads = [point.value for point in points]
    seen = [point.figures for point in points]
    for name, color, spreads in (
        ("first token", "tab:blue", [each.ttft_ms for each in seen]),
        ("inter-token", "tab:orange", [each.itl_ms for each in seen]),
    ):
        for percentile, style in (("p50", "-"), ("p99", "--")):
            pairs = [
                (load, getattr(spread, percentile))
                for load, spread in zip(loads, spreads, strict=True)
                if spread is not None
            ]
            if pairs:
                latency.plot(
                    [load for load, _ in pairs],
                    [value for _, value in pairs],
                    style,
                    color=color,
                    marker="o",
                    label=f"{name} {percentile}",
                )
    latency.set_yscale("log")
    latency.set_ylabel("ms")
    throughput.plot(
        loads, [each.output_tokens_per_s for each in seen], marker="o", label="output tok/s"
    )
    if any(each.goodput is not None for each in seen):
        good = [each.goodput.output_tokens_per_s if each.goodput else 0.0 for each in seen]
        throughput.plot(loads, good, marker="o", label="of good requests")
    throughput.set_ylabel("tok/s")
    throughput.set_ylim(bottom=0)
    for axes in (latency, throughput):
        axes.set_xlabel(_AXIS[points[0].kind])
        axes.grid(visible=True, alpha=0.3)
        if axes.lines:
            axes.legend()
    picture.suptitle(f"{report.model} at {report.target}: {report.workload}")
    picture.savefig(path, dpi=150)
