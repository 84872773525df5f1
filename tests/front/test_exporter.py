"""The files in which processes tell what they measured, and what the exporter makes of them."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.architecture.repository import ROOT
from tokenloom.scheduler import metrics
from tokenloom.scheduler.exporter import STALE_S, ServerCollector, summed
from tokenloom.scheduler.metrics import METRICS, Histogram, Kind
from tokenloom.scheduler.sample_files import SampleFile, read_all
from tokenloom.scheduler.samples import (
    Sample,
    Samples,
    added,
    distribution,
    number,
)

WRITE_AND_DIE = """
import sys
from pathlib import Path
from tokenloom.scheduler import metrics
from tokenloom.scheduler.sample_files import SampleFile
from tokenloom.scheduler.samples import number
file = SampleFile(Path(sys.argv[1]), "front")
file.take_over()
file.close([number(metrics.REQUESTS_REFUSED, 3, "QUEUE_FULL"), number(metrics.READY, 1)], 0.0)
"""


def front_that_dies(folder: Path) -> None:
    """Runs a process that counts 3 refusals."""
    subprocess.run([sys.executable, "-c", WRITE_AND_DIE, str(folder)], check=True)


def refused(folder: Path) -> float:
    found = summed(list(read_all(folder)), now=time.monotonic())
    (sample,) = (
        sample
        for sample in found
        if sample.name == metrics.REQUESTS_REFUSED.name and sample.labels == ("QUEUE_FULL",)
    )
    return sample.value


def values(samples: list[Sample], metric: metrics.Metric) -> list[float]:
    return [sample.value for sample in samples if sample.name == metric.name]


def test_counters_do_not_go_back_however_often_a_front_dies(tmp_path: Path) -> None:
    for count in range(1, 4):
        front_that_dies(tmp_path)
        assert refused(tmp_path) == 3 * count
    assert len(list(tmp_path.iterdir())) == 1
    live = SampleFile(tmp_path, "front")
    live.take_over()
    assert refused(tmp_path) == 9
    live.close([number(metrics.REQUESTS_REFUSED, 1, "QUEUE_FULL")], time.monotonic())
    assert refused(tmp_path) == 10
    assert len(list(tmp_path.iterdir())) == 1


def test_only_one_takes_the_place_of_each_that_died(tmp_path: Path) -> None:
    front_that_dies(tmp_path)
    core = SampleFile(tmp_path, "core")
    core.take_over()
    core.close([], time.monotonic())
    assert refused(tmp_path) == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_a_process_that_stands_still_has_counters_and_no_gauges() -> None:
    samples = (
        number(metrics.NUM_REQUESTS_RUNNING, 5),
        number(metrics.READY, 1),
        number(metrics.STEPS, 7),
    )
    process = Samples(100.0, samples)
    fresh = summed([process], now=100.0 + STALE_S / 2)
    assert values(fresh, metrics.NUM_REQUESTS_RUNNING) == [5]
    assert values(fresh, metrics.READY) == [1]
    stale = summed([process], now=100.0 + STALE_S)
    assert values(stale, metrics.NUM_REQUESTS_RUNNING) == []
    assert values(stale, metrics.READY) == [0]
    assert values(stale, metrics.STEPS) == [7]


def test_a_server_is_ready_when_all_its_fronts_are() -> None:
    def ready(*fronts: int) -> list[float]:
        processes = [Samples(1.0, (number(metrics.READY, each),)) for each in fronts]
        return values(summed(processes, now=1.0), metrics.READY)

    assert ready() == [0]
    assert ready(1, 1) == [1]
    assert ready(1, 0) == [0]


def test_what_never_happened_is_zero_from_the_start() -> None:
    found = summed([], now=0.0)
    for metric in METRICS:
        if metric.kind is not Kind.GAUGE and not metric.labels:
            assert values(found, metric) == [0], metric
    assert len(values(found, metrics.REQUESTS_REFUSED)) == len(metrics.REFUSALS)


def test_the_documentation_names_every_metric_with_its_type_and_labels() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    rows = re.findall(r"^\| `(tokenloom_\w+)` \| (\w+) \| ([^|]*) \|", text, re.MULTILINE)
    told = [(name, kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows]
    assert told == [
        (
            f"{metric.name}_total" if metric.kind is Kind.COUNTER else metric.name,
            metric.kind.name.lower(),
            metric.labels,
        )
        for metric in METRICS
    ]


def test_a_folder_that_is_gone_ends_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = SampleFile(tmp_path / "gone", "core")
    file.write([number(metrics.STEPS, 1)], 0.0)
    file.close([number(metrics.STEPS, 2)], 1.0)
    assert caplog.text.count("metrics cannot be written") == 1


def test_a_file_that_is_garbage_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "front-1.samples").write_bytes(b"\x93garbage")
    (tmp_path / "front-2.samples").write_bytes(b"")
    assert list(read_all(tmp_path)) == []


def test_histograms_of_one_value_and_of_many_agree() -> None:
    one, many = Histogram(metrics.STEP_TIME), Histogram(metrics.STEP_TIME)
    bounds = metrics.STEP_TIME.bounds
    drawn = np.array([*bounds, 0.0, 1e9, *np.random.default_rng(3).exponential(0.05, 500)])
    for value in drawn.tolist():
        one.observe(value)
    many.observe_all(drawn)
    many.observe_all(np.empty(0))
    assert one.counts.tolist() == many.counts.tolist()
    assert one.total == pytest.approx(many.total)
    for index, bound in enumerate(bounds):
        assert one.counts[: index + 1].sum() == (drawn <= bound).sum()


def test_the_sum_of_samples_keeps_labels_apart() -> None:
    histogram = Histogram(metrics.TENANT_TIME_TO_FIRST_TOKEN)
    histogram.observe(0.3)
    parts = [
        distribution(histogram, "a"),
        distribution(histogram, "b"),
        distribution(histogram, "a"),
    ]
    sums = {sample.labels: sample for sample in added(parts)}
    assert sums[("a",)].value == pytest.approx(0.6)
    assert sum(sums[("a",)].counts) == 2
    assert sum(sums[("b",)].counts) == 1


def test_the_exposition_says_what_was_counted_and_the_price_of_it(tmp_path: Path) -> None:
    histogram = Histogram(metrics.STEP_NUM_REQUESTS)
    for value in (1, 2, 2, 5000):
        histogram.observe(value)
    SampleFile(tmp_path, "core").close(
        [
            distribution(histogram),
            number(metrics.TENANT_GPU_SECONDS, 1800, 'a"b\\c\nd'),
            number(metrics.MEMORY_BYTES, 5, "0", "weights"),
        ],
        time.monotonic(),
    )
    registry = CollectorRegistry()
    registry.register(ServerCollector(tmp_path, model_name="pocket", gpu_hour_price=3.0))
    families = {
        family.name: family
        for family in text_string_to_metric_families(generate_latest(registry).decode())
    }
    buckets = {
        sample.labels["le"]: sample.value
        for sample in families["tokenloom_step_num_requests"].samples
        if sample.name.endswith("_bucket")
    }
    assert (buckets["1.0"], buckets["2.0"], buckets["4096.0"], buckets["+Inf"]) == (1, 3, 3, 4)
    (price,) = families["tokenloom_tenant_price"].samples
    assert price.value == 1.5
    assert price.labels == {"model_name": "pocket", "tenant": 'a"b\\c\nd'}
    (memory,) = families["tokenloom_memory_bytes"].samples
    assert memory.labels == {"model_name": "pocket", "rank": "0", "kind": "weights"}
    assert all(":" not in name and name.startswith("tokenloom_") for name in families)
