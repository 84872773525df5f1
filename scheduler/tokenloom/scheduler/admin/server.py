"""The operators' process, from bind to SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path

import grpc.aio
from grpc_reflection.v1alpha import reflection

from tokenloom.scheduler.admin.link import AdminLink
from tokenloom.scheduler.admin.servicer import SERVICE_NAME, AdminServicer
from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.listening import bind, write_address
from tokenloom.scheduler.ports import check_free

ADDRESS_FILE = "admin-address"
"""In the run_dir: where the service listens."""
_OPTIONS = (
    ("grpc.max_receive_message_length", 64 * 1024),
    ("grpc.max_concurrent_streams", 64),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
)

_log = logging.getLogger(__name__)


async def run(config: SchedulerConfig) -> None:
    """Serves operators until SIGTERM or SIGINT. Raises ConfigError."""
    link = AdminLink(config.core_endpoint)
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((AdminServicer(config, link).handler(),))
    reflection.enable_server_reflection((SERVICE_NAME, reflection.SERVICE_NAME), server)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    following = asyncio.create_task(link.follow())
    address_file = Path(config.run_dir) / ADDRESS_FILE
    try:
        check_free(config.admin_listen)
        address = bind(server, config.admin_listen)
        await server.start()
        write_address(address_file, address)
        _log.info("operators are served on %s", address)
        await stopped.wait()
    finally:
        address_file.unlink(missing_ok=True)
        await server.stop(None)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        link.close()
