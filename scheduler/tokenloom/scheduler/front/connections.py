"""What a front takes of connections, streams and metadata, before any of it reaches a servicer."""

from __future__ import annotations

import resource

from tokenloom.scheduler.config import SchedulerConfig

_MAX_CONNECTIONS = 16_384
_OWN_FILES = 256
"""Descriptors that a front needs beside its connections."""
_METADATA_BYTES = 8 * 1024
_REFUSED_STREAMS = 1024
"""That a connection may have beside those that are served, while they are told so."""
_HANDSHAKE_MS = 10_000
"""For a connection to become one of HTTP/2; gRPC's own bound is two minutes."""


def max_streams(config: SchedulerConfig) -> int:
    """Returns how many streams a front has at once: twice as many as the core takes.

    The others are being tokenized, or are read by their clients after their end.
    """
    return 2 * (config.max_num_requests + config.max_waiting_requests)


def connection_options(config: SchedulerConfig) -> tuple[tuple[str, int], ...]:
    """Returns the options of a server; raises this process's limit of open files for it."""
    return (
        ("grpc.max_allowed_incoming_connections", _max_connections()),
        # One connection may have them all. Those past them are refused by a status that says when
        # to come again; past this bound a stream is reset, which meshes take for UNAVAILABLE.
        ("grpc.max_concurrent_streams", max_streams(config) + _REFUSED_STREAMS),
        ("grpc.max_metadata_size", _METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * _METADATA_BYTES),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
    )


def _max_connections() -> int:
    """Returns how many there can be without running out of descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_CONNECTIONS + _OWN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return _MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(wanted, soft) - _OWN_FILES
