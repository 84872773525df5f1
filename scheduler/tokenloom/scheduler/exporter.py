"""The exporter's process: serves metrics to Prometheus, out of what the others wrote.

    python -m tokenloom.scheduler.exporter CONFIG_JSON

A process of its own, so that a scrape costs neither core nor front a moment.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import (
    Metric as Family,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from tokenloom.scheduler import metrics
from tokenloom.scheduler.config import ConfigError, SchedulerConfig
from tokenloom.scheduler.messages import FinishReason
from tokenloom.scheduler.metrics import METRICS, Histogram, Kind, Metric
from tokenloom.scheduler.sample_files import read_all
from tokenloom.scheduler.samples import (
    Sample,
    Samples,
    added,
    distribution,
    is_gauge,
    number,
)
from tokenloom.wire.logs import set_up_logs

STALE_S = 5.0
"""Who has not written for so long is gone or stands still: its gauges are not true any more."""
_HOUR_S = 3600.0

_log = logging.getLogger(__name__)


class ServerCollector(Collector):
    """Collects the metrics of one server at each scrape."""

    def __init__(self, folder: Path, *, model_name: str, gpu_hour_price: float | None) -> None:
        self._folder = folder
        self._model_name = model_name
        self._gpu_hour_price = gpu_hour_price

    def collect(self) -> Iterator[Family]:
        """Yields each metric that has a value."""
        found = summed(list(read_all(self._folder)), now=time.monotonic())
        if self._gpu_hour_price is not None:
            found += priced(found, self._gpu_hour_price)
        by_name: dict[str, list[Sample]] = defaultdict(list)
        for sample in found:
            by_name[sample.name].append(sample)
        for metric in METRICS:
            if samples := by_name.get(metric.name):
                yield self._family(metric, samples)

    def _family(self, metric: Metric, samples: Iterable[Sample]) -> Family:
        labels = ("model_name", *metric.labels)
        match metric.kind:
            case Kind.GAUGE:
                gauge = GaugeMetricFamily(metric.name, metric.text, labels=labels)
                for sample in samples:
                    gauge.add_metric((self._model_name, *sample.labels), sample.value)
                return gauge
            case Kind.COUNTER:
                counter = CounterMetricFamily(metric.name, metric.text, labels=labels)
                for sample in samples:
                    counter.add_metric((self._model_name, *sample.labels), sample.value)
                return counter
            case Kind.HISTOGRAM:
                histogram = HistogramMetricFamily(metric.name, metric.text, labels=labels)
                bounds = [*map(floatToGoString, metric.bounds), "+Inf"]
                for sample in samples:
                    buckets = list(zip(bounds, accumulate(sample.counts), strict=True))
                    histogram.add_metric((self._model_name, *sample.labels), buckets, sample.value)
                return histogram


def summed(processes: Sequence[Samples], *, now: float) -> list[Sample]:
    """Returns what the processes of a server tell together.

    Counters without labels, or with labels of few values, are there from the start: what never
    happened is 0, and a rate sees the first time that it does.
    """
    fresh = [each for each in processes if now - each.written_s < STALE_S]
    gauges = [sample for each in fresh for sample in each.samples if is_gauge(sample)]
    ready = [sample.value for sample in gauges if sample.name == metrics.READY.name]
    return added(
        (
            *_ZEROS,
            *(sample for each in processes for sample in each.samples if not is_gauge(sample)),
            *(sample for sample in gauges if sample.name != metrics.READY.name),
            number(metrics.READY, min(ready, default=0.0)),
        )
    )


def _zeros() -> Iterator[Sample]:
    for metric in METRICS:
        if metric.kind is Kind.COUNTER and not metric.labels:
            yield number(metric, 0)
        elif metric.kind is Kind.HISTOGRAM and not metric.labels:
            yield distribution(Histogram(metric))
    for reason in FinishReason:
        yield number(metrics.REQUESTS_FINISHED, 0, reason)
    for refusal in metrics.REFUSALS:
        yield number(metrics.REQUESTS_REFUSED, 0, refusal)


_ZEROS = tuple(_zeros())


def priced(samples: Iterable[Sample], gpu_hour_price: float) -> list[Sample]:
    """Returns what tenants' GPU-seconds cost."""
    return [
        number(metrics.TENANT_PRICE, sample.value / _HOUR_S * gpu_hour_price, *sample.labels)
        for sample in samples
        if sample.name == metrics.TENANT_GPU_SECONDS.name
    ]


def main(argv: Sequence[str]) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit code."""
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before there are threads
    try:
        (text,) = argv
        config = SchedulerConfig.from_json(text)
        set_up_logs("exporter", form=config.log_format, level=config.log_level)
        address = _serve(config)
    except (ConfigError, ValueError) as error:
        _log.critical("exporter cannot start: %s", error)
        return 2
    _log.info("metrics at http://%s/metrics", address)
    signal.sigwait(signals)
    return 0


def _serve(config: SchedulerConfig) -> str:
    """Serves in threads; returns the address with its real port. Raises ConfigError."""
    registry = CollectorRegistry()
    collector = ServerCollector(
        Path(config.metrics_dir),
        model_name=config.name,
        gpu_hour_price=config.gpu_hour_price,
    )
    registry.register(collector)
    host, _, port = config.metrics_listen.rpartition(":")
    try:
        server, _ = start_http_server(int(port), host.strip("[]"), registry)
    except (OSError, OverflowError) as error:  # the latter: no such port
        raise ConfigError(f"cannot listen on {config.metrics_listen}: {error}") from error
    address = f"{host}:{server.server_port}"
    draft = Path(config.metrics_dir) / "address.draft"
    draft.write_text(address)
    draft.replace(draft.with_suffix(""))
    return address


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
