from __future__ import annotations

import json
from typing import Any

import pytest

from tokenloom.client import Client
from tokenloom.client.channels import ServerTarget, route_to


def service_config(target: ServerTarget) -> dict[str, Any]:
    config = dict(route_to(target).options)["grpc.service_config"]
    found: dict[str, Any] = json.loads(str(config))
    return found


@pytest.mark.parametrize(
    ("addresses", "target"),
    [
        (["127.0.0.1:1", "127.0.0.2:2"], "ipv4:127.0.0.1:1,127.0.0.2:2"),
        (("[::1]:1", "[::2]:2"), "ipv6:[::1]:1,[::2]:2"),
    ],
)
def test_a_list_of_addresses_is_one_target_of_replicas(
    addresses: ServerTarget, target: str
) -> None:
    route = route_to(addresses)
    assert route.target == target
    assert route.replicas == tuple(addresses)
    assert route_to(target).replicas == tuple(addresses)


@pytest.mark.parametrize("target", [["127.0.0.1:1", "127.0.0.2:2"], "dns:///name:1"])
def test_replicas_are_weighed_and_asked_for_their_health(target: ServerTarget) -> None:
    config = service_config(target)
    (policy,) = config["loadBalancingConfig"]
    assert policy["weighted_round_robin"]["enableOobLoadReport"] is True
    assert config["healthCheckConfig"] == {"serviceName": "tokenloom.v1.Inference"}


@pytest.mark.parametrize("target", ["name:1", "unix:/tmp/a", "ipv4:127.0.0.1:1", ["127.0.0.1:1"]])
def test_one_server_is_called_whatever_its_health_says(target: ServerTarget) -> None:
    """It refuses with a reason, which gRPC's word for a server that is not healthy has not."""
    assert set(service_config(target)) == {"methodConfig", "retryThrottling"}
    assert route_to(target).replicas == ()


@pytest.mark.parametrize("target", ["name:1", ["127.0.0.1:1", "127.0.0.2:2"]])
def test_only_unavailable_is_retried(target: ServerTarget) -> None:
    (method,) = service_config(target)["methodConfig"]
    assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]


@pytest.mark.parametrize(
    "addresses", [[], ["name:1"], ["127.0.0.1"], ["127.0.0.1:x"], ["127.0.0.1:1", "[::1]:1"]]
)
def test_a_list_that_cannot_be_one_target_is_refused_before_anything_is_sent(
    addresses: list[str],
) -> None:
    with pytest.raises(ValueError, match=r"list|addresses"):
        Client(addresses)
