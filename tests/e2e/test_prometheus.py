"""A real Prometheus scrapes two replicas under load, and sees what their clients saw."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.prometheus import Prometheus
from tests.e2e.server import Server, wait_until
from tests.front.checkpoints import byte_level_tokenizer, write_checkpoint
from tokenloom.client import Client, InvalidRequest, Result
from tokenloom.scheduler.metrics import METRICS, Kind
from tokenloom.scheduler.tenants import digest_of_token

NUM_STREAMS = 8
NUM_ROUNDS = 3
PROMPT = [5] * 40
MAX_TOKENS = 60
PRICE = 3.6
"""Of an hour: a GPU-second is a tenth of a cent."""
MAX_UNPAID_S = 0.05
TIMEOUT_S = 60.0
STEP_MS = 4
TENANTS = ("batch", "search")
TOKEN = "f" * 43
TENANTS_FILE = f"""
anonymous = "batch"
[tenants.batch]
cache_group = "both"
[tenants.search]
cache_group = "both"
token_sha256 = ["{digest_of_token(TOKEN)}"]
"""


class Replica:
    """A server, and what its callers got."""

    def __init__(self, checkpoint: Path, tenants: Path) -> None:
        self.server = Server.of_fakes(
            checkpoint,
            f"--tenants={tenants}",
            *("--served-name=pocket", "--metrics-listen=127.0.0.1:0"),
            *("--max-num-requests=6", f"--gpu-hour-price={PRICE}"),
            # Six need 42 blocks, so that some are preempted.
            worker=(f"--step-ms={STEP_MS}", "--vocab-size=300", "--num-blocks=36"),
        )
        self.results: dict[str, list[Result]] = {tenant: [] for tenant in TENANTS}

    def load(self) -> None:
        """Streams in rounds, some of them refused, and a worker that dies in the second."""
        with ExitStack() as stack:
            callers = stack.enter_context(ThreadPoolExecutor(NUM_STREAMS))
            clients = [
                stack.enter_context(self.server.client()),
                stack.enter_context(self.server.client(token=TOKEN)),
            ]
            for number in range(NUM_ROUNDS):
                running = [
                    callers.submit(generate, clients[seed % 2], seed) for seed in range(NUM_STREAMS)
                ]
                if number == 1:
                    wait_until(lambda: self.server.inspect().num_running > 2, TIMEOUT_S)
                    self.server.workers()[0].kill()
                for client in clients:
                    with pytest.raises(InvalidRequest):
                        client.generate("hello", max_tokens=10**6).result()
                for seed, each in enumerate(running):
                    self.results[TENANTS[seed % 2]].append(each.result())

    def all_results(self) -> list[Result]:
        """Returns those of all tenants."""
        return [result for results in self.results.values() for result in results]

    @property
    def labels(self) -> str:
        """What its series have, as an expression selects them."""
        return f'model_name="pocket",instance="{self.server.metrics_address}"'


def generate(client: Client, seed: int) -> Result:
    prompt = [*PROMPT, seed + 3]
    return client.generate(prompt, seed=seed, max_tokens=MAX_TOKENS, ignore_eos=True).result()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Replica]]:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), byte_level_tokenizer())
    tenants = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    tenants.write_text(TENANTS_FILE)
    with ExitStack() as stack:
        replicas = [Replica(checkpoint, tenants) for _ in range(2)]
        for replica in replicas:
            stack.enter_context(replica.server)
        yield replicas


@pytest.fixture(scope="module")
def prometheus(replicas: list[Replica]) -> Iterator[Prometheus]:
    """Prometheus, with all the load behind it."""
    with Prometheus([each.server.metrics_address for each in replicas]) as prometheus:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Replica.load, replicas))
        prometheus.settle()
        yield prometheus


def per_replica(prometheus: Prometheus, replicas: list[Replica], expression: str) -> list[float]:
    """Returns the value of an expression for each replica, `$` in it standing for its labels."""
    return [prometheus.number(expression.replace("$", each.labels)) for each in replicas]


def test_every_metric_is_there_with_its_type_and_labels(prometheus: Prometheus) -> None:
    types = prometheus.types()
    for metric in METRICS:
        name = f"{metric.name}_total" if metric.kind is Kind.COUNTER else metric.name
        sample = f"{name}_count" if metric.kind is Kind.HISTOGRAM else name
        assert types[metric.name] == metric.kind.name.lower(), metric
        found = prometheus.query(sample)
        assert {series.labels["instance"] for series in found} == set(prometheus.targets), metric
        for series in found:
            expected = {"__name__", "instance", "job", "model_name", *metric.labels}
            assert set(series.labels) == expected, metric


def test_counts_are_those_of_the_clients(prometheus: Prometheus, replicas: list[Replica]) -> None:
    num_calls = NUM_STREAMS * NUM_ROUNDS
    results = [replica.all_results() for replica in replicas]
    costs = [[result.cost for result in each if result.cost is not None] for each in results]
    drawn = [sum(len(result.token_ids) for result in each) for each in results]
    prompts = [sum(result.usage.num_prompt_tokens for result in each) for each in results]
    cached = [sum(result.usage.num_cached_tokens for result in each) for each in results]
    assert drawn == [num_calls * MAX_TOKENS] * 2

    def told(expression: str) -> list[float]:
        return per_replica(prometheus, replicas, expression)

    assert told("tokenloom_generation_tokens_total{$}") == drawn
    assert told("tokenloom_prompt_tokens_total{$}") == prompts
    assert told("tokenloom_prefix_cache_queries_total{$}") == prompts
    assert told("tokenloom_prefix_cache_hits_total{$}") == cached
    assert told('tokenloom_requests_finished_total{$,reason="length"}') == [num_calls] * 2
    assert told("sum(tokenloom_requests_finished_total{$})") == [num_calls] * 2
    refused = [2 * NUM_ROUNDS] * 2
    assert told('tokenloom_requests_refused_total{$,reason="PROMPT_TOO_LONG"}') == refused
    assert told("sum(tokenloom_requests_refused_total{$})") == refused
    assert told("tokenloom_recoveries_total{$}") == [1, 1]
    assert told("tokenloom_recovery_time_seconds_count{$}") == [1, 1]
    preempted = [sum(cost.num_preemptions for cost in each) for each in costs]
    assert told("tokenloom_preemptions_total{$}") == preempted
    assert min(preempted) > 0
    recomputed = [sum(cost.num_recomputed_tokens for cost in each) for each in costs]
    assert told("tokenloom_recomputed_tokens_total{$}") == recomputed
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert told(f"tokenloom_{name}_seconds_count{{$}}") == [num_calls] * 2
    assert told("tokenloom_request_prefill_time_seconds_count{$}") == [num_calls] * 2
    # Between n tokens there are n - 1 gaps.
    gaps = [count - num_calls for count in drawn]
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
        assert all(0 < used <= 1 for used in per_replica(prometheus, replicas, highest))
    assert per_replica(prometheus, replicas, "tokenloom_ready{$}") == [1, 1]


def test_each_tenant_is_told_what_its_callers_were(
    prometheus: Prometheus, replicas: list[Replica]
) -> None:
    for replica in replicas:
        for tenant, results in replica.results.items():
            costs = [result.cost for result in results if result.cost is not None]
            labels = f'{{{replica.labels},tenant="{tenant}"}}'

            def told(name: str, labels: str = labels) -> float:
                return prometheus.number(f"tokenloom_tenant_{name}{labels}")

            gpu_s = told("gpu_seconds_total")
            assert gpu_s == pytest.approx(sum(cost.gpu_s for cost in costs))
            block_s = told("kv_block_seconds_total")
            assert block_s == pytest.approx(sum(cost.kv_block_s for cost in costs))
            price = sum(cost.price or 0.0 for cost in costs)
            assert told("price_total") == pytest.approx(price) == pytest.approx(gpu_s * 0.001)
            assert told("generation_tokens_total") == MAX_TOKENS * len(results)
            assert told("time_to_first_token_seconds_count") == len(results)
            assert told("requests_refused_total") == NUM_ROUNDS


def test_costs_add_up_to_what_the_gpus_did(prometheus: Prometheus, replicas: list[Replica]) -> None:
    busy = per_replica(prometheus, replicas, "tokenloom_gpu_busy_seconds_total{$}")
    steps = per_replica(prometheus, replicas, "tokenloom_steps_total{$}")
    assert busy == pytest.approx([count * STEP_MS / 1000 for count in steps])
    for replica, busy_s in zip(replicas, busy, strict=True):
        told_s = sum(result.cost.gpu_s for result in replica.all_results() if result.cost)
        # Who is preempted does not pay for the steps that were under way.
        assert busy_s - MAX_UNPAID_S < told_s < busy_s + 1e-6
