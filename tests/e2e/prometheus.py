"""A real Prometheus that scrapes the servers of a test."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from tests.deploy.programs import prometheus_program
from tests.e2e.server import wait_until

TIMEOUT_S = 60.0
SCRAPE_S = 0.25


@dataclass(frozen=True)
class Series:
    """One of the results of an expression."""

    labels: dict[str, str]
    value: float


class Prometheus:
    """Scrapes `targets` (HOST:PORT each) as the job `tokenloom`, until the end of `with`."""

    def __init__(self, targets: Sequence[str], *, rule_files: Sequence[Path] = ()) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="loom-prometheus-"))
        config = self._folder / "prometheus.yml"
        config.write_text(
            yaml.safe_dump(
                {
                    "global": {"scrape_interval": "250ms", "evaluation_interval": "250ms"},
                    "rule_files": [str(path.resolve()) for path in rule_files],
                    "scrape_configs": [
                        {"job_name": "tokenloom", "static_configs": [{"targets": list(targets)}]}
                    ],
                }
            )
        )
        self.targets = tuple(targets)
        self.address = f"127.0.0.1:{_free_port()}"
        self._process = subprocess.Popen(
            [
                prometheus_program("prometheus"),
                f"--config.file={config}",
                f"--storage.tsdb.path={self._folder / 'data'}",
                f"--web.listen-address={self.address}",
                "--log.level=error",
            ]
        )

    def query(self, expression: str) -> list[Series]:
        """Returns what an expression is now."""
        found = self._get("query", query=expression)["result"]
        return [Series(each["metric"], float(each["value"][1])) for each in found]

    def value(self, expression: str) -> float | None:
        """Returns the only value of an expression, None if it has none."""
        found = self.query(expression)
        assert len(found) < 2, found
        return found[0].value if found else None

    def number(self, expression: str) -> float:
        """Returns the only value of an expression, which has one."""
        (found,) = self.query(expression)
        return found.value

    def types(self) -> dict[str, str]:
        """Returns the type of each metric that was scraped, as Prometheus took it."""
        return {name: entries[0]["type"] for name, entries in self._get("metadata").items()}

    def rules(self) -> list[dict[str, Any]]:
        """Returns the alert rules with their state and health."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def settle(self) -> None:
        """Waits until each target was scraped a few times from now on."""
        end_s = time.time() + 8 * SCRAPE_S

        def is_seen() -> bool:
            targets = self._get("targets")["activeTargets"]
            return (
                bool(targets)
                and time.time() > end_s
                and all(target["health"] == "up" for target in targets)
            )

        wait_until(is_seen, TIMEOUT_S, alive=self._process)

    def _get(self, what: str, **arguments: str) -> dict[str, Any]:
        query = urllib.parse.urlencode(arguments)
        with urllib.request.urlopen(f"http://{self.address}/api/v1/{what}?{query}") as response:
            data: dict[str, Any] = json.load(response)["data"]
            return data

    def _is_ready(self) -> bool:
        try:
            urllib.request.urlopen(f"http://{self.address}/-/ready").close()
        except urllib.error.URLError:
            return False
        return True

    def __enter__(self) -> Self:
        try:
            wait_until(self._is_ready, TIMEOUT_S, alive=self._process)
            self.settle()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder)


def _free_port() -> int:
    """Returns a port that was free a moment ago: Prometheus does not tell which one it chose."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
