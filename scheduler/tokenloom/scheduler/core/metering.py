"""The core's part of the metrics, out of its state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokenloom.scheduler import metrics
from tokenloom.scheduler.core.load import load_of
from tokenloom.scheduler.core.state import State
from tokenloom.scheduler.samples import Sample, distribution, number
from tokenloom.wire.messages import Ready


def samples_of(state: State, ranks: Sequence[Ready]) -> Iterator[Sample]:
    """Yields all that the core measures; `ranks` is what the group's workers said of themselves."""
    load = load_of(state)
    yield number(metrics.NUM_REQUESTS_RUNNING, load.num_running)
    yield number(metrics.NUM_REQUESTS_WAITING, load.num_waiting)
    yield number(metrics.NUM_TOKENS_WAITING, load.num_waiting_tokens)
    yield number(metrics.KV_CACHE_USAGE_RATIO, load.num_used_blocks / max(1, load.num_blocks))
    yield number(metrics.QUEUE_USAGE_RATIO, load.queue_fraction)
    for rank, ready in enumerate(ranks):
        yield number(metrics.MEMORY_BYTES, ready.weights_bytes, str(rank), "weights")
        yield number(metrics.MEMORY_BYTES, ready.kv_bytes, str(rank), "kv_cache")
    yield from _totals(state)


def _totals(state: State) -> Iterator[Sample]:
    totals = state.totals
    yield number(metrics.PROMPT_TOKENS, totals.num_prompt_tokens)
    yield number(metrics.GENERATION_TOKENS, totals.num_generated_tokens)
    if state.limits.prefix_cache:
        yield number(metrics.PREFIX_CACHE_QUERIES, totals.num_prompt_tokens)
    yield number(metrics.PREFIX_CACHE_HITS, totals.num_cached_prompt_tokens)
    yield number(metrics.PREEMPTIONS, totals.num_preemptions)
    yield number(metrics.RECOMPUTED_TOKENS, totals.num_recomputed_tokens)
    yield number(metrics.RECOVERIES, totals.num_recoveries)
    yield number(metrics.GPU_BUSY_SECONDS, totals.gpu_s)
    yield number(metrics.STEPS, totals.num_steps)
    for reason, num_finished in totals.num_finished_by_reason.items():
        yield number(metrics.REQUESTS_FINISHED, num_finished, reason)
    for histogram in totals.histograms:
        yield distribution(histogram)
    for tenant, cost in totals.tenants.items():
        yield number(metrics.TENANT_GPU_SECONDS, cost.gpu_s, tenant)
        yield number(metrics.TENANT_KV_BLOCK_SECONDS, cost.kv_block_s, tenant)
        yield number(metrics.TENANT_GENERATION_TOKENS, cost.num_generated_tokens, tenant)
