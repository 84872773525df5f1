"""Every expression of alert rules and dashboards has a value while two replicas serve."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.architecture.repository import ROOT
from tests.deploy.test_alerts import RULES, alerts
from tests.e2e.prometheus import Prometheus
from tests.e2e.server import wait_until
from tests.e2e.test_prometheus import TENANTS_FILE, TIMEOUT_S, Replica
from tests.front.checkpoints import byte_level_tokenizer, write_checkpoint

DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
CHOSEN = {
    "${datasource}": "prometheus",
    "$model": "pocket",
    "$instance": ".*",
    "$__rate_interval": "1m",
    "$__range": "5m",
}
"""What somebody who looks has chosen."""
THRESHOLD = re.compile(r" (?:==|>|<) [\d.]+")


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Replica]]:
    folder = tmp_path_factory.mktemp("replicas")
    checkpoint = write_checkpoint(folder / "checkpoint", byte_level_tokenizer())
    tenants = folder / "tenants.toml"
    tenants.write_text(TENANTS_FILE)
    with ExitStack() as stack:
        replicas = [Replica(checkpoint, tenants) for _ in range(2)]
        for replica in replicas:
            stack.enter_context(replica.server)
        yield replicas


@pytest.fixture(scope="module")
def prometheus(replicas: list[Replica]) -> Iterator[Prometheus]:
    """Prometheus with the rules, and a load behind it that ended a moment ago."""
    addresses = [each.server.metrics_address for each in replicas]
    with (
        Prometheus(addresses, rule_files=[RULES]) as prometheus,
        ThreadPoolExecutor() as pool,
    ):
        list(pool.map(Replica.load, replicas))
        prometheus.settle()
        yield prometheus


@dataclass(frozen=True)
class Panel:
    """One expression that somebody looks at."""

    dashboard: str
    title: str
    expression: str


def panels() -> list[Panel]:
    """Returns the expressions of all dashboards, with what was chosen."""
    found = []
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"]
                for name, value in CHOSEN.items():
                    expression = expression.replace(name, value)
                found.append(Panel(path.stem, panel["title"], expression))
    return found


def test_every_panel_shows_something(prometheus: Prometheus) -> None:
    empty = []
    for panel in panels():
        values = [series.value for series in prometheus.query(panel.expression)]
        if not any(math.isfinite(value) for value in values):
            empty.append(panel)
    assert len(panels()) > len(DASHBOARDS) > 0
    assert empty == []


def test_every_alert_looks_at_what_is_there(prometheus: Prometheus) -> None:
    for rule in alerts():
        watched = THRESHOLD.sub("", rule["expr"])
        assert watched != rule["expr"], rule["alert"]
        values = [series.value for series in prometheus.query(watched)]
        assert any(math.isfinite(value) for value in values), rule["alert"]


def test_prometheus_evaluates_every_alert_and_a_dead_exporter_raises_one(
    prometheus: Prometheus, replicas: list[Replica]
) -> None:
    def states() -> dict[str, str]:
        return {rule["name"]: rule["state"] for rule in prometheus.rules()}

    assert {rule["health"] for rule in prometheus.rules()} == {"ok"}
    assert states()["TokenloomScrapeLost"] == "inactive"
    replicas[0].server.stop()
    wait_until(lambda: states()["TokenloomScrapeLost"] == "pending", TIMEOUT_S)
