"""The front's process: the gRPC server around the servicer, from bind to drain."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tokenloom.scheduler.config import ConfigError, SchedulerConfig
from tokenloom.scheduler.front.connections import connection_options
from tokenloom.scheduler.front.counts import CallCounts, CountsFile
from tokenloom.scheduler.front.errors import Absence
from tokenloom.scheduler.front.health import Health
from tokenloom.scheduler.front.identity import Identities
from tokenloom.scheduler.front.journal import Journal, Traces
from tokenloom.scheduler.front.link import CoreLink
from tokenloom.scheduler.front.load import LoadReports
from tokenloom.scheduler.front.servicer import (
    MESSAGE_LIMIT_BYTES,
    SERVER_VERSION,
    SERVICE_NAME,
    InferenceServicer,
)
from tokenloom.scheduler.front.text import TextModel
from tokenloom.scheduler.front.tls import CONNECTION_AGE_MS, server_credentials
from tokenloom.scheduler.listening import bind, write_address
from tokenloom.scheduler.messages import Draining, Load, ModelReady
from tokenloom.scheduler.ports import check_free
from tokenloom.scheduler.tenants import TenantsFile
from tokenloom.wire.started import process_start_s

_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    # A client that vanished without a word is noticed within half a minute;
    # without the ping time-out a half-open connection is not noticed at all.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients may ping every 10 s; gRPC's own 5 minutes would cut them off.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)
_START_S = 30.0
"""A front that begins later than this after the command does so in place of one that died."""
_LAST_CALLS_S = 0.5
"""For calls that are nearly done when the streams are; health watches end with it."""

_log = logging.getLogger(__name__)


class FrontServer:
    """One front, from `start` to `stop`."""

    def __init__(self, config: SchedulerConfig, text: TextModel) -> None:
        self._config = config
        self._text = text
        self._health = Health((SERVICE_NAME,), timeout_s=config.heartbeat_timeout_s)
        self._reports = LoadReports()
        self._link = CoreLink(
            config.core_endpoint,
            on_model=self._on_model,
            on_pulse=self._health.feel,
            on_load=self._on_load,
            on_draining=self._on_draining,
        )
        counts = CallCounts()
        self._journal = Journal(_traces(config), counts, gpu_hour_price=config.gpu_hour_price)
        tenants = TenantsFile(Path(config.tenants)) if config.tenants else None
        self._identities = Identities(tenants)
        self._servicer = InferenceServicer(
            config,
            text,
            self._link,
            journal=self._journal,
            identities=self._identities,
            reports=self._reports,
        )
        self._counts_file: CountsFile | None = None
        if config.metrics_listen:
            folder = Path(config.metrics_dir)
            self._counts_file = CountsFile(folder, counts, lambda: self._health.is_ready)
        self._tasks: list[asyncio.Task[None]] = []
        self._has_served = False
        # A port that another server has is an error, not a port shared in silence.
        sharing = ("grpc.so_reuseport", int(config.num_fronts > 1))
        # A client that connects again also looks its target's name up again, and so finds replicas
        # that came meanwhile.
        age = ("grpc.max_connection_age_ms", CONNECTION_AGE_MS)
        options = (*_OPTIONS, *connection_options(config), sharing, age)
        self._server = grpc.aio.server(options=options)
        self.address = ""
        """Where the server listens, as a client dials it; set by `start`."""

    async def start(self) -> None:
        """Listens and connects to the core. Raises ConfigError if the address cannot be had."""
        self._server.add_generic_rpc_handlers((self._servicer.handler(), self._reports.handler()))
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, self._server)
        services = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(services, self._server)
        await self._health.tell()
        if self._config.num_fronts == 1:  # else the supervisor holds the port
            check_free(self._config.listen)
        credentials = server_credentials(self._config)
        self.address = bind(self._server, self._config.listen, credentials)
        await self._server.start()
        self._link.open()
        self._tasks = [
            asyncio.create_task(self._health.follow(self._link.ping)),
            asyncio.create_task(self._identities.follow()),
        ]
        if self._counts_file is not None:
            self._tasks.append(asyncio.create_task(self._counts_file.follow()))
        write_address(Path(self._config.run_dir) / "address", self.address)
        _log.info("listening on %s", self.address)

    async def drain(self, grace_s: float) -> None:
        """Tells health checks, refuses new requests, lets running ones finish."""
        self._health.drain()
        await self._health.tell()
        await self._servicer.drain(grace_s)

    async def stop(self) -> None:
        """Ends what is left and closes everything."""
        (Path(self._config.run_dir) / "address").unlink(missing_ok=True)
        for task in self._tasks:
            task.cancel()
        await self._server.stop(_LAST_CALLS_S)
        self._link.close()
        self._text.close()
        if self._counts_file is not None:
            self._counts_file.close()
        self._journal.close()

    def _on_draining(self, draining: Draining) -> None:
        self._servicer.refuse_all()
        self._health.drain()
        if draining.ends:
            self._servicer.end_all()

    def _on_load(self, load: Load) -> None:
        self._reports.feel(load, time.monotonic())

    def _on_model(self, model: ModelReady | Absence) -> None:
        self._servicer.model = model
        self._health.set_model(is_there=isinstance(model, ModelReady))
        if isinstance(model, ModelReady):
            told = "" if self._has_served else _start_told(model)
            self._has_served = True
            _log.info("serving %s on %s%s", self._config.name, self.address, told)


async def run(config: SchedulerConfig, text: TextModel) -> None:
    """Serves until SIGTERM, then drains; SIGINT, SIGUSR1 and a second SIGTERM end the grace.

    The supervisor hurries with SIGUSR1: it ends a process that is still importing in silence.
    """
    loop = asyncio.get_running_loop()
    term, hurry = asyncio.Event(), asyncio.Event()

    def on_term() -> None:
        (hurry if term.is_set() else term).set()

    def on_hurry() -> None:
        term.set()
        hurry.set()

    loop.add_signal_handler(signal.SIGTERM, on_term)
    for number in (signal.SIGINT, signal.SIGUSR1):
        loop.add_signal_handler(number, on_hurry)
    loop.set_exception_handler(_on_loop_error)
    server = FrontServer(config, text)
    try:
        await server.start()
        gc.freeze()  # the tables of the tokenizer are not looked through again
        await term.wait()
        await _drain(server, 0.0 if hurry.is_set() else config.grace_s, hurry)
    finally:
        await server.stop()


def _on_loop_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Logs what nobody awaited, but not what it was called with: that may be a prompt."""
    _log.error("an error reached the event loop", exc_info=context.get("exception"))


def _traces(config: SchedulerConfig) -> Traces | None:
    """Returns where trace spans go, if they go anywhere. Raises ConfigError if they cannot."""
    if not config.otlp_endpoint and not _are_asked_for():
        return None
    try:
        # Optional, and nothing that a front without it should load.
        from tokenloom.scheduler.front.tracing import Tracing  # noqa: PLC0415
    except ModuleNotFoundError as error:
        lack = f"{error.name} is not installed; `pip install tokenloom-scheduler[otel]` brings it"
        if config.otlp_endpoint:
            raise ConfigError(f"otlp_endpoint is {config.otlp_endpoint}, but {lack}") from error
        _log.warning("no spans are sent: %s", lack)
        return None
    return Tracing(endpoint=config.otlp_endpoint, model=config.name, version=SERVER_VERSION)


def _are_asked_for() -> bool:
    """Returns whether OpenTelemetry's variables name a place for spans and turn nothing off."""
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    is_off = (
        os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
        or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    )
    return any(os.environ.get(name) for name in names) and not is_off


def _start_told(model: ModelReady) -> str:
    """Returns what the start took, from the command to serving, as the end of a sentence."""
    command_s = process_start_s(os.getppid())  # the command started the front
    if process_start_s() - command_s > _START_S:
        return ""
    whole_s = time.monotonic() - command_s
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in model.phases)
    return f", {whole_s:.1f} s after the start; the worker: {phases}"


async def _drain(server: FrontServer, grace_s: float, hurry: asyncio.Event) -> None:
    _log.info("draining; running requests have %g s to finish", grace_s)
    drained = asyncio.create_task(server.drain(grace_s))
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if not drained.done():
        drained.cancel()
        await server.drain(0.0)
