"""A real Prometheus scrapes two replicas under load, and sees what their clients saw."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from tests.core.processes import FrontSocket, submit
from tests.e2e.prometheus import Prometheus
from tests.e2e.server import Server, wait_until
from tests.front.checkpoints import byte_level_tokenizer, write_checkpoint
from tokenloom.client import InvalidRequest, Result
from tokenloom.scheduler.messages import Submit
from tokenloom.scheduler.metrics import METRICS, Kind

NUM_STREAMS = 8
NUM_ROUNDS = 3
PROMPT = [5] * 40
MAX_TOKENS = 60
PRICE = 3.6
"""Of an hour: a GPU-second is a tenth of a cent."""
MAX_UNPAID_S = 0.05
TIMEOUT_S = 60.0
STEP_MS = 4
BY_TENANT = {metric.name for metric in METRICS if metric.name.startswith("tokenloom_tenant_")}


class Replica:
    """A server, and what its callers got."""

    def __init__(self, checkpoint: Path) -> None:
        self.server = Server.of_fakes(
            checkpoint,
            *("--served-name=pocket", "--metrics-listen=127.0.0.1:0"),
            *("--max-num-requests=6", f"--gpu-hour-price={PRICE}"),
            # Six need 42 blocks, so that some are preempted.
            worker=(f"--step-ms={STEP_MS}", "--vocab-size=300", "--num-blocks=36"),
        )
        self.results: list[Result] = []
        self.num_invalid = 0

    def load(self) -> None:
        """Streams in rounds, some of them refused, and a worker that dies in the second."""
        with self.server.client() as client, ThreadPoolExecutor(NUM_STREAMS) as callers:
            for number in range(NUM_ROUNDS):
                running = [
                    callers.submit(
                        lambda seed: client.generate(
                            [*PROMPT, seed + 3], seed=seed, max_tokens=MAX_TOKENS, ignore_eos=True
                        ).result(),
                        seed,
                    )
                    for seed in range(NUM_STREAMS)
                ]
                if number == 1:
                    wait_until(lambda: self.server.inspect().num_running > 2, TIMEOUT_S)
                    self.server.workers()[0].kill()
                with pytest.raises(InvalidRequest):
                    client.generate("hello", max_tokens=10**6).result()
                self.num_invalid += 1
                self.results += [each.result() for each in running]

    def serve_tenant(self) -> None:
        """A request of a tenant, as a front has it from authentication."""
        front = FrontSocket(self.server.context, f"ipc://{self.server.run_dir}/core.sock")
        front.send(submit_of("search"))
        front.until(lambda: 1 in front.finished)
        front.socket.close()


def submit_of(tenant: str) -> Submit:
    return msgspec.structs.replace(submit(1, [9] * 20, 10), tenant=tenant)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Replica]]:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), byte_level_tokenizer())
    with ExitStack() as stack:
        replicas = [Replica(checkpoint) for _ in range(2)]
        for replica in replicas:
            stack.enter_context(replica.server)
        yield replicas


@pytest.fixture(scope="module")
def prometheus(replicas: list[Replica]) -> Iterator[Prometheus]:
    """Prometheus, with all the load behind it."""
    with Prometheus([each.server.metrics_address for each in replicas]) as prometheus:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Replica.load, replicas))
        for replica in replicas:
            replica.serve_tenant()
        prometheus.settle()
        yield prometheus


def per_replica(
    prometheus: Prometheus, replicas: list[Replica], expression: str
) -> list[float | None]:
    """Returns the value of an expression for each replica, `$` in it standing for its labels."""
    return [
        prometheus.value(
            expression.replace("$", f'model_name="pocket",instance="{each.server.metrics_address}"')
        )
        for each in replicas
    ]


def test_every_metric_is_there_with_its_type_and_labels(prometheus: Prometheus) -> None:
    types = prometheus.types()
    for metric in METRICS:
        name = f"{metric.name}_total" if metric.kind is Kind.COUNTER else metric.name
        sample = f"{name}_count" if metric.kind is Kind.HISTOGRAM else name
        if metric.name in BY_TENANT - BY_TENANT_IN_CORE:
            continue  # told by fronts that authenticate
        assert types[metric.name] == metric.kind.name.lower(), metric
        found = prometheus.query(sample)
        assert {series.labels["instance"] for series in found} == set(prometheus.targets), metric
        for series in found:
            expected = {"__name__", "instance", "job", "model_name", *metric.labels}
            assert set(series.labels) == expected, metric


BY_TENANT_IN_CORE = {
    *("tokenloom_tenant_gpu_seconds", "tokenloom_tenant_kv_block_seconds"),
    *("tokenloom_tenant_generation_tokens", "tokenloom_tenant_price"),
}


def test_counts_are_those_of_the_clients(prometheus: Prometheus, replicas: list[Replica]) -> None:
    num_calls = NUM_STREAMS * NUM_ROUNDS
    num_finished = num_calls + 1  # the tenant's
    drawn = [sum(len(result.token_ids) for result in each.results) + 10 for each in replicas]
    prompts = [
        sum(result.usage.num_prompt_tokens for result in each.results) + 20 for each in replicas
    ]
    cached = [sum(result.usage.num_cached_tokens for result in each.results) for each in replicas]
    assert drawn == [num_calls * MAX_TOKENS + 10] * 2

    def told(expression: str) -> list[float | None]:
        return per_replica(prometheus, replicas, expression)

    assert told("tokenloom_generation_tokens_total{$}") == drawn
    assert told("tokenloom_prompt_tokens_total{$}") == prompts
    assert told("tokenloom_prefix_cache_queries_total{$}") == prompts
    assert told("tokenloom_prefix_cache_hits_total{$}") == cached
    assert told('tokenloom_requests_finished_total{$,reason="length"}') == [num_finished] * 2
    assert told("sum(tokenloom_requests_finished_total{$})") == [num_finished] * 2
    assert told('tokenloom_requests_refused_total{$,reason="PROMPT_TOO_LONG"}') == [NUM_ROUNDS] * 2
    assert told("sum(tokenloom_requests_refused_total{$})") == [NUM_ROUNDS] * 2
    assert told("tokenloom_recoveries_total{$}") == [1, 1]
    assert told("tokenloom_recovery_time_seconds_count{$}") == [1, 1]
    assert told("tokenloom_preemptions_total{$}") == [
        sum(result.cost.num_preemptions for result in each.results if result.cost)
        for each in replicas
    ]
    assert told("tokenloom_recomputed_tokens_total{$}") == [
        sum(result.cost.num_recomputed_tokens for result in each.results if result.cost)
        for each in replicas
    ]
    assert all(count and count > 0 for count in told("tokenloom_preemptions_total{$}"))
    assert told("tokenloom_time_to_first_token_seconds_count{$}") == [num_calls] * 2
    assert told("tokenloom_e2e_request_latency_seconds_count{$}") == [num_calls] * 2
    assert told("tokenloom_request_queue_time_seconds_count{$}") == [num_finished] * 2
    assert told("tokenloom_request_prefill_time_seconds_count{$}") == [num_finished] * 2
    # Between n tokens there are n - 1 gaps.
    gaps = [count - num_finished for count in drawn]
    assert told("tokenloom_inter_token_latency_seconds_count{$}") == gaps
    assert told("tokenloom_step_time_seconds_count{$}") == told("tokenloom_steps_total{$}")


def test_an_idle_server_has_nothing_running_and_is_ready(
    prometheus: Prometheus, replicas: list[Replica]
) -> None:
    for name in ("num_requests_running", "num_requests_waiting", "num_tokens_waiting"):
        assert per_replica(prometheus, replicas, f"tokenloom_{name}{{$}}") == [0, 0]
    for name in ("kv_cache_usage_ratio", "queue_usage_ratio"):
        assert per_replica(prometheus, replicas, f"tokenloom_{name}{{$}}") == [0, 0]
        highest = f"max_over_time(tokenloom_{name}{{$}}[5m])"
        assert all(0 < (used or 0) <= 1 for used in per_replica(prometheus, replicas, highest))
    assert per_replica(prometheus, replicas, "tokenloom_ready{$}") == [1, 1]


def test_costs_add_up_to_what_the_gpus_did(prometheus: Prometheus, replicas: list[Replica]) -> None:
    for replica in replicas:
        costs = [result.cost for result in replica.results if result.cost is not None]
        labels = f'instance="{replica.server.metrics_address}"'
        busy_s = prometheus.value(f"tokenloom_gpu_busy_seconds_total{{{labels}}}")
        tenant_s = prometheus.value(f"tokenloom_tenant_gpu_seconds_total{{{labels}}}")
        steps = prometheus.value(f"tokenloom_steps_total{{{labels}}}")
        assert None not in {busy_s, tenant_s, steps}
        assert busy_s == pytest.approx(steps * STEP_MS / 1000)
        told_s = sum(cost.gpu_s for cost in costs) + tenant_s
        # Who is preempted does not pay for the steps that were under way.
        assert busy_s - MAX_UNPAID_S < told_s < busy_s + 1e-6
        for cost in costs:
            assert cost.price == pytest.approx(cost.gpu_s * 0.001)
            assert cost.kv_block_s > 0
        price = prometheus.value(f'tokenloom_tenant_price_total{{{labels},tenant="search"}}')
        assert price == pytest.approx(tenant_s * 0.001)
