"""How channels reach servers: one, or replicas that share the calls.

    "host:port", "unix:/path"              one server
    "dns:///name:port"                     all addresses behind a name ┐ calls are spread by what
    "ipv4:1.2.3.4:5,6.7.8.9:5", [ … ]      these addresses             ┘ each could still take

gRPC itself does all of it; here is its configuration. Among replicas a call goes to one that its
health check calls SERVING, chosen by weights: requests a second over utilization, from the load
reports that each server sends.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TypeAlias

ServerTarget: TypeAlias = str | Sequence[str]
"""An address as gRPC writes it, or a list of `IP:port`."""

_SERVICE = "tokenloom.v1.Inference"

_OPTIONS: tuple[tuple[str, int], ...] = (
    # Connections are what a port spreads over its processes, and gRPC lets all channels of a
    # process with the same target share one.
    ("grpc.use_local_subchannel_pool", 1),
    # A peer that vanished without a word is noticed within 40 s of a running call. Servers
    # close connections that ping more often than they allow; tokenloom's allow 10 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # without it a half-open peer is not noticed
    # A server that is started again is found at once, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # what an attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Token ids of the longest prompt, where gRPC's own bound is 4 MiB.
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
)

_RETRIES = {
    # Only refusals without initial metadata are retried, and a server sends that with the
    # Admission: a completion that began is not begun again. RESOURCE_EXHAUSTED is left out, so
    # overload meets each request once.
    "methodConfig": [
        {
            "name": [{"service": _SERVICE}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    # Each failure takes a token and each success gives a tenth back; below half there are no
    # retries. So a burst of refusals goes elsewhere, and servers that are gone for longer get a
    # tenth more calls, not four times as many.
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
}
_BALANCING = {
    "loadBalancingConfig": [
        {
            "weighted_round_robin": {
                "enableOobLoadReport": True,
                "oobReportingPeriod": "5s",
                # Servers report what is smoothed already.
                "blackoutPeriod": "0s",
                "weightUpdatePeriod": "1s",
                "weightExpirationPeriod": "60s",
            }
        }
    ],
    "healthCheckConfig": {"serviceName": _SERVICE},
}


@dataclass(frozen=True, kw_only=True)
class Route:
    """What a channel is opened with."""

    target: str
    """As gRPC takes it."""
    options: tuple[tuple[str, int | str], ...]
    replicas: tuple[str, ...] = ()
    """The addresses one by one, where the target names several."""


def route_to(target: ServerTarget) -> Route:
    """Returns how to reach a target. Raises ValueError for a list that cannot be used."""
    if not isinstance(target, str):
        replicas = tuple(target)
        target = _list_target(replicas)
    elif target.startswith(("ipv4:", "ipv6:")):
        replicas = tuple(target.partition(":")[2].lstrip("/").split(","))
    else:
        replicas = ()
    is_shared = len(replicas) > 1 or target.startswith("dns:")
    config = _RETRIES | (_BALANCING if is_shared else {})
    return Route(
        target=target,
        options=(*_OPTIONS, ("grpc.service_config", json.dumps(config))),
        replicas=replicas if len(replicas) > 1 else (),
    )


def route_to_replica(address: str) -> Route:
    """Returns how to reach one of several replicas; what it refuses is not retried there."""
    return Route(target=address, options=_OPTIONS)


def _list_target(addresses: Sequence[str]) -> str:
    """Returns the target that gRPC spreads calls over."""
    versions = {_ip_version(address) for address in addresses}
    if len(versions) != 1:
        raise ValueError(
            f"a list of {len(addresses)} addresses of {len(versions)} kinds; it holds IPv4 or IPv6 "
            "addresses, one at least"
        )
    return f"ipv{versions.pop()}:{','.join(addresses)}"


def _ip_version(address: str) -> int:
    host, _, port = address.rpartition(":")
    try:
        int(port)
        return ip_address(host.removeprefix("[").removesuffix("]")).version
    except ValueError:
        raise ValueError(
            f"{address!r} in a list of servers is no IP:port; a name with several addresses is a "
            "target of its own: dns:///NAME:PORT"
        ) from None
