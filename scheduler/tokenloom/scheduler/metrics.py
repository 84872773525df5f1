"""What is measured: every metric with its type, labels and buckets.

Labels have few values by construction: reasons are those of `FinishReason` and of `RequestError`s,
tenants those of the tenants file. Nothing that a client sends becomes one.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import numpy.typing as npt


class Kind(Enum):
    """What Prometheus calls a metric's type."""

    GAUGE = auto()
    COUNTER = auto()
    HISTOGRAM = auto()


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One name, as docs/operations.md explains it."""

    name: str
    """As Prometheus shows it; counters without their `_total`."""
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    """Beside `model_name`, which all have."""
    bounds: tuple[float, ...] = ()
    """Of a histogram: the upper ones of its buckets, but for the last, which is infinite."""


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(name=f"tokenloom_{name}", kind=Kind.GAUGE, text=text, labels=labels)


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(name=f"tokenloom_{name}", kind=Kind.COUNTER, text=text, labels=labels)


def _histogram(name: str, text: str, bounds: tuple[float, ...], *labels: str) -> Metric:
    full = f"tokenloom_{name}"
    return Metric(name=full, kind=Kind.HISTOGRAM, text=text, labels=labels, bounds=bounds)


_STEP_S = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075)
_STEP_BOUNDS = (*_STEP_S, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_WAIT_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
_WHOLE_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_SIZE_BOUNDS = tuple(float(2**power) for power in range(13))
_RECOVERY_BOUNDS = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 300.0, 600.0)

NUM_REQUESTS_RUNNING = _gauge("num_requests_running", "Requests that hold a slot.")
NUM_REQUESTS_WAITING = _gauge("num_requests_waiting", "Requests in the queue.")
NUM_TOKENS_WAITING = _gauge("num_tokens_waiting", "Tokens of the requests in the queue.")
KV_CACHE_USAGE_RATIO = _gauge(
    "kv_cache_usage_ratio", "Blocks of the KV cache that requests hold, of all."
)
QUEUE_USAGE_RATIO = _gauge("queue_usage_ratio", "The fullest of the queue's bounds.")
MEMORY_BYTES = _gauge("memory_bytes", "What a rank has set aside on its GPU.", "rank", "kind")
READY = _gauge("ready", "1: the model is there, and every front that runs takes requests.")
PROMPT_TOKENS = _counter("prompt_tokens", "Tokens of the prompts that got a slot.")
GENERATION_TOKENS = _counter("generation_tokens", "Tokens drawn.")
PREFIX_CACHE_QUERIES = _counter(
    "prefix_cache_queries", "Prompt tokens that were looked for in the prefix cache."
)
PREFIX_CACHE_HITS = _counter("prefix_cache_hits", "Prompt tokens that were found there.")
PREEMPTIONS = _counter("preemptions", "Requests that gave way for lack of blocks.")
RECOMPUTED_TOKENS = _counter(
    "recomputed_tokens", "Positions computed again after a preemption or the loss of a worker."
)
RECOVERIES = _counter("recoveries", "Groups of workers that took over from one that was lost.")
GPU_BUSY_SECONDS = _counter("gpu_busy_seconds", "Seconds of steps on the GPUs, of all together.")
STEPS = _counter("steps", "Steps done.")
REQUESTS_FINISHED = _counter("requests_finished", "Requests taken that ended.", "reason")
REQUESTS_REFUSED = _counter("requests_refused", "Generate calls that got no slot.", "reason")
TIME_TO_FIRST_TOKEN = _histogram(
    "time_to_first_token_seconds", "From the call to the front's first token.", _WAIT_BOUNDS
)
INTER_TOKEN_LATENCY = _histogram(
    "inter_token_latency_seconds", "Between a request's tokens, as steps bring them.", _STEP_BOUNDS
)
E2E_REQUEST_LATENCY = _histogram(
    "e2e_request_latency_seconds", "From a call that ended well to its end.", _WHOLE_BOUNDS
)
REQUEST_QUEUE_TIME = _histogram(
    "request_queue_time_seconds", "From a request's arrival to its first step.", _WAIT_BOUNDS
)
REQUEST_PREFILL_TIME = _histogram(
    "request_prefill_time_seconds", "From a request's first step to its first token.", _WAIT_BOUNDS
)
STEP_TIME = _histogram("step_time_seconds", "A step, from the result before it.", _STEP_BOUNDS)
STEP_NUM_REQUESTS = _histogram("step_num_requests", "Requests in a step.", _SIZE_BOUNDS)
RECOVERY_TIME = _histogram(
    "recovery_time_seconds", "From the loss of workers until others serve.", _RECOVERY_BOUNDS
)
TENANT_GPU_SECONDS = _counter("tenant_gpu_seconds", "Shares of steps, by tenant.", "tenant")
TENANT_KV_BLOCK_SECONDS = _counter(
    "tenant_kv_block_seconds", "Blocks of the KV cache times how long they were held.", "tenant"
)
TENANT_GENERATION_TOKENS = _counter("tenant_generation_tokens", "Completions.", "tenant")
TENANT_REQUESTS_REFUSED = _counter(
    "tenant_requests_refused", "As tokenloom_requests_refused_total.", "tenant", "reason"
)
TENANT_PRICE = _counter("tenant_price", "GPU-seconds at --gpu-hour-price.", "tenant")
TENANT_TIME_TO_FIRST_TOKEN = _histogram(
    "tenant_time_to_first_token_seconds", "By tenant.", _WAIT_BOUNDS, "tenant"
)

METRICS = tuple(value for value in vars().values() if isinstance(value, Metric))


REFUSALS = (
    *("QUEUE_FULL", "DEADLINE_UNREACHABLE", "DEADLINE_PASSED", "TENANT_LIMIT", "DRAINING"),
    *("NOT_READY", "MODEL_LOST", "CORE_LOST", "NO_IDENTITY", "BAD_TOKEN", "UNKNOWN_TENANT"),
    *("INVALID_REQUEST", "PROMPT_TOO_LONG", "MALFORMED", "OTHER_MODEL", "ENDED_BY_OPERATOR"),
    *("CLIENT_TOO_SLOW", "INTERNAL", "OTHER"),
)
"""The values of `reason` of what is refused; each is there from the start, with 0."""

METRICS_BY_NAME = {metric.name: metric for metric in METRICS}


class Histogram:
    """How often values of a metric came, by bucket."""

    __slots__ = ("_bounds", "_bounds_array", "counts", "metric", "total")

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self._bounds = metric.bounds
        self._bounds_array = np.array(metric.bounds)
        self.counts = np.zeros(len(metric.bounds) + 1, np.int64)
        """[num_buckets] of those alone; a value that equals a bound is below it."""
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Enters a value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def observe_all(self, values: npt.NDArray[np.float64]) -> None:
        """Enters many values."""
        buckets = np.searchsorted(self._bounds_array, values)
        self.counts += np.bincount(buckets, minlength=len(self.counts))
        self.total += float(values.sum())
