"""The scheduler's configuration, parsed once and handed to each of its processes."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tokenloom.wire.logs import LOG_FORMATS, LOG_LEVELS
from tokenloom.wire.messages import MAX_NUM_REQUESTS

QUANTIZE_NAMES = ("none", "nf4", "fp4", "int8")
KV_CACHE_NAMES = ("auto", "fp8")

_LEAST = {
    0: ("spin_us", "grace_s", "max_crashes"),
    1: (
        "num_fronts",
        "tensor_parallel",
        "max_num_requests",
        "max_mixed_prompt_tokens",
        "max_waiting_requests",
        "max_waiting_tokens",
        "max_waiting_bytes",
        "max_stream_buffer_tokens",
    ),
    2: ("max_model_tokens",),
}
"""The least value of each field that has one."""
_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+):[0-9]{1,5}")
_CHOICES = {
    "quantize": QUANTIZE_NAMES,
    "kv_cache": KV_CACHE_NAMES,
    "log_format": LOG_FORMATS,
    "log_level": LOG_LEVELS,
}
_MOST = {"max_num_requests": MAX_NUM_REQUESTS}
"""The largest value of each field that has one."""
_DURATIONS = ("step_timeout_s", "heartbeat_timeout_s", "crash_window_s")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What one scheduler serves, where, and within which bounds."""

    model: str
    """A local folder or a Hub id."""
    run_dir: str
    """A folder of mode 0700 that holds the ipc sockets."""
    served_name: str = ""
    """Name told to clients; empty: the last part of `model`."""
    listen: str = "127.0.0.1:50051"
    """Address of the gRPC server; `unix:PATH` is a Unix socket; port 0 picks a free one."""
    admin_listen: str = ""
    """Address of the operators' service, as `listen`; empty: there is none. Only this host
    reaches it, for it asks nobody who he is."""
    insecure: bool = False
    """Whether `listen` may be an address that others reach without TLS."""
    tls_cert: str = ""
    """A file with the server's certificate and those between it and its CA, as PEM; empty: no
    TLS. It, and the two below, are read again when they change."""
    tls_key: str = ""
    """A file with the certificate's key, which others than its owner cannot read."""
    tls_client_ca: str = ""
    """A file with the CAs of clients' certificates; empty: clients need none."""
    tenants: str = ""
    """A file that says who may call (`tenants.py`), read again when it changes; empty: everybody
    who can connect."""
    tenant_stretch: float = 1.2
    """While a tenant that asks for little is there: how many times as long as without the others
    they may make a step."""
    num_fronts: int = 1
    """Processes that speak gRPC, on one port. With more than one, `listen` names a port that
    the supervisor holds for them."""
    tensor_parallel: int = 1
    """Workers that hold the model together."""
    workers_listen: str = ""
    """Where workers of other hosts connect, as ZeroMQ writes it; empty: only those of this host
    join."""
    workers_key: str = ""
    """A file with the core's key pair; the secret of it has mode 0600."""
    workers_allowed: str = ""
    """A folder with the public keys of workers of other hosts."""
    dtype: str = "auto"
    """`bfloat16`, `float16`, `float32`, or `auto` for the checkpoint's own."""
    quantize: str = "none"
    """`nf4`, `fp4` or `int8`: what matrices that the checkpoint has dense are quantized to."""
    quantize_lm_head: bool = False
    """Whether the head is quantized, too."""
    int8_threshold: float = 0.0
    """Activations from which on inputs of 8-bit matrices are multiplied as they are, as
    bitsandbytes does it, which is slow; 0: none are."""
    kv_cache: str = "auto"
    """`fp8` for keys and values in 8 bits, or `auto` for the type of the arithmetic."""
    max_model_tokens: int | None = None
    """Longest prompt + completion; None: what the checkpoint's config allows."""
    max_num_requests: int = 256
    """Requests that run at once."""
    max_step_tokens: int | None = None
    """Tokens that one step computes at most; None: what suits the worker's device."""
    max_mixed_prompt_tokens: int | None = None
    """Prompt tokens that a step computes beside decoding requests, unless many wait;
    None: by what steps turn out to cost."""
    max_waiting_requests: int = 2048
    """Requests that may wait; one more is refused."""
    max_waiting_tokens: int = 8 * 1024 * 1024
    """Prompt tokens that may wait in all; more are refused."""
    max_waiting_bytes: int = 256 * 1024 * 1024
    """Bytes of the core's memory that waiting requests may take; more are refused."""
    deadline_admission: bool = True
    """Whether requests are refused that would not be done by their deadline, by what requests and
    steps took lately."""
    max_stream_buffer_tokens: int = 8192
    """Tokens kept for a client that does not read; past it the stream is ended."""
    prefix_cache: bool = True
    """Whether blocks of finished requests are kept and found again."""
    spin_us: int | None = None
    """Core and worker wait without sleeping for results that follow each other sooner than this;
    None: as the host allows."""
    grace_s: float = 30.0
    """After SIGTERM: how long running requests may take to finish."""
    step_timeout_s: float = 20.0
    """A step counts as hung after this, or after a multiple of what such steps took lately."""
    heartbeat_timeout_s: float = 10.0
    """A worker that has not answered for so long counts as lost, a core as not alive."""
    max_crashes: int = 3
    """Losses of workers within `crash_window_s`; one more ends the server."""
    crash_window_s: float = 600.0
    metrics_listen: str = ""
    """`HOST:PORT` where Prometheus finds metrics, unencrypted; port 0 picks a free one; empty: none
    are served."""
    gpu_hour_price: float | None = None
    """What an hour of one GPU costs, in any currency; None: costs are told without a price."""
    log_format: str = "text"
    """`text` for people, `json` for programs."""
    log_level: str = "info"
    """The least that is logged: `debug`, `info`, `warning` or `error`."""
    otlp_endpoint: str = ""
    """Where spans go, by OTLP over gRPC; empty: where OpenTelemetry's own variables say."""

    def __post_init__(self) -> None:
        self._check_numbers()
        for name, names in _CHOICES.items():
            if getattr(self, name) not in names:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(names)}"
                )
        if not 1 < self.tenant_stretch < math.inf:
            raise ConfigError(
                f"tenant_stretch is {self.tenant_stretch}; it must be a number above 1"
            )
        if not 0 <= self.int8_threshold < math.inf:
            raise ConfigError(
                f"int8_threshold is {self.int8_threshold}; it must be 0 or a positive number"
            )
        if self.max_step_tokens is not None and self.max_step_tokens < self.max_num_requests:
            raise ConfigError(
                f"max_step_tokens is {self.max_step_tokens}; it must be at least "
                f"max_num_requests ({self.max_num_requests}): each running request takes one a step"
            )
        self._check_workers()
        self._check_metrics()
        self._check_admin()
        self._check_access()
        if self.num_fronts > 1 and self.listen.startswith("unix:"):
            raise ConfigError(
                f"num_fronts is {self.num_fronts} and listen is {self.listen}; "
                "a Unix socket has one front, only a port can be shared"
            )

    def _check_numbers(self) -> None:
        for least, names in _LEAST.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and value < least:
                    raise ConfigError(f"{name} is {value}; it must be at least {least}")
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value > most:
                raise ConfigError(f"{name} is {value}; it must be at most {most}")
        for name in _DURATIONS:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; it must be a positive number")

    def _check_admin(self) -> None:
        if self.admin_listen and not is_loopback(self.admin_listen):
            raise ConfigError(
                f"admin_listen is {self.admin_listen}, which other hosts may reach: "
                "it must be a loopback address or a Unix socket"
            )

    def _check_workers(self) -> None:
        """Raises ConfigError unless workers come over TCP with keys, or not at all."""
        names = ("workers_listen", "workers_key", "workers_allowed")
        missing = [name for name in names if not getattr(self, name)]
        if 0 < len(missing) < len(names):
            raise ConfigError(
                f"{' and '.join(missing)} must be given, too: workers of other hosts need keys"
            )
        if self.workers_listen and not self.workers_listen.startswith("tcp://"):
            raise ConfigError(
                f"workers_listen is {self.workers_listen!r}; it must be tcp://HOST:PORT"
            )

    def _check_metrics(self) -> None:
        """Raises ConfigError unless metrics have an address, or none, and an hour a price."""
        if self.metrics_listen and not _PORT.fullmatch(self.metrics_listen):
            raise ConfigError(f"metrics_listen is {self.metrics_listen!r}; it must be HOST:PORT")
        if self.gpu_hour_price is not None and not 0 <= self.gpu_hour_price < math.inf:
            raise ConfigError(
                f"gpu_hour_price is {self.gpu_hour_price}; it must be 0 or a positive number"
            )

    def _check_access(self) -> None:
        """Raises ConfigError where strangers could read and write what is meant to be private."""
        if bool(self.tls_cert) != bool(self.tls_key):
            missing = "tls_key" if self.tls_cert else "tls_cert"
            raise ConfigError(f"{missing} must be given, too: a certificate goes with its key")
        if self.tls_client_ca and not self.tls_cert:
            raise ConfigError(
                "tls_client_ca needs tls_cert and tls_key: clients show theirs in TLS"
            )
        if not (self.tls_cert or self.insecure or is_loopback(self.listen)):
            raise ConfigError(
                f"listen is {self.listen}, which other hosts may reach: it needs tls_cert and "
                "tls_key; insecure allows it without, for networks that encrypt by themselves"
            )

    @property
    def name(self) -> str:
        """The name told to clients."""
        return self.served_name or Path(self.model).name

    @property
    def worker_endpoint(self) -> str:
        """Where workers connect, as ZeroMQ writes it."""
        return f"ipc://{self.run_dir}/worker.sock"

    @property
    def core_endpoint(self) -> str:
        """Where fronts connect to the core."""
        return f"ipc://{self.run_dir}/core.sock"

    @property
    def metrics_dir(self) -> str:
        """Where the processes write what they measure."""
        return f"{self.run_dir}/metrics"

    def to_json(self) -> str:
        """Returns the configuration as a child process takes it on its command line."""
        return msgspec.json.encode(self).decode()

    @staticmethod
    def from_json(text: str) -> SchedulerConfig:
        """Reads what `to_json` wrote. Raises ConfigError."""
        try:
            return msgspec.json.decode(text, type=SchedulerConfig)
        except msgspec.DecodeError as error:
            raise ConfigError(f"configuration is not readable: {error}") from error


def is_loopback(listen: str) -> bool:
    """Returns whether only this host can reach an address that gRPC listens on.

    Of names only `localhost` is known without asking, and so is no other.
    """
    if listen.startswith(("unix:", "unix-abstract:")):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ConfigError(ValueError):
    """An option has a value that cannot be used."""
