"""What belongs to a worker's machine, as its command line tells it. Imports no torch."""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tokenloom.worker.errors import LoadError

ATTENTION_NAMES = ("auto", "flash4", "flash2", "triton", "torch")
CPU_KV_CACHE = "256MiB"

T = TypeVar("T")

_UNITS = {"": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How this machine is used; what to load comes with Configure."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1` …; `auto` is the first GPU, without one the CPU."""
    attention: str = "auto"
    """One of ATTENTION_NAMES."""
    graphs: bool = True
    """Whether steps are captured as CUDA graphs."""
    kv_cache_bytes: int | None = None
    """Size of the KV pool; None: by `kv_memory_fraction` on CUDA, CPU_KV_CACHE on a CPU."""
    kv_memory_fraction: float = 0.92
    """Part of the device memory that the weights leave free, less the scratch memory of the
    largest step, that the KV pool takes."""
    host: str | None = None
    """Name or address of this machine for other ranks; None: it serves alone."""


def default_cpu_threads() -> int:
    """Returns half of the CPUs that this process may use, at least 1.

    The scheduler needs the others: the threads of a CPU kernel spin while they
    wait for each other, and with one of them off its CPU a step takes ten times
    as long.
    """
    return max(1, len(os.sched_getaffinity(0)) // 2)


def host_towards(endpoint: str) -> str:
    """Returns this machine's address as seen from a ZeroMQ endpoint, where the core listens.

    Raises LoadError if there is no way to it.
    """
    if not endpoint.startswith("tcp://"):
        return "127.0.0.1"
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as towards:
            towards.connect(address)  # sends nothing
            return str(towards.getsockname()[0])
    except (OSError, ValueError) as error:
        raise LoadError(f"there is no way to {endpoint}: {error}") from error


def parse_bytes(text: str) -> int:
    """Returns the number of bytes that `256MiB` or `4096` says. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]iB|)", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write 4096, 256MiB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_fraction(text: str) -> float:
    """Returns a number in (0, 1]. Raises ValueError."""
    fraction = float(text)
    if not 0 < fraction <= 1:
        raise ValueError(f"{text} is no fraction above 0 and up to 1")
    return fraction


def parse_count(text: str, *, at_least: int = 0) -> int:
    """Returns a number of things. Raises ValueError."""
    if not text.isdecimal() or int(text) < at_least:
        raise ValueError(f"{text!r} is no whole number of {at_least} or more")
    return int(text)


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Returns a parser whose ValueError argparse shows as it is, not by the parser's name."""

    def parse_argument(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_argument
