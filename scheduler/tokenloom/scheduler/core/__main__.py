"""The core's process: `python -m tokenloom.scheduler.core CONFIG_JSON`."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import zmq

from tokenloom.scheduler.config import ConfigError, SchedulerConfig
from tokenloom.scheduler.core.gate import Gate, Keyring, read_keyring
from tokenloom.scheduler.core.loop import CoreLoop, TooManyCrashesError, bind
from tokenloom.wire.logs import set_up_logs

log = logging.getLogger(__name__)

CORE_NICENESS = -10


def main(argv: list[str]) -> int:
    """Runs a core until SIGTERM or SIGINT, or too many crashes. Returns the exit code."""
    try:
        (text,) = argv
        config = SchedulerConfig.from_json(text)
        set_up_logs("core", form=config.log_format, level=config.log_level)
        _check_run_dir(Path(config.run_dir))
        keyring = _keyring(config)
    except ValueError as error:
        return _refuse(error)
    _go_first()
    # A signal writes a byte to the wake-up socket, which ends the poll.
    stop, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    with zmq.Context() as context:
        fronts = bind(context, config.core_endpoint)
        workers = bind(
            context, config.worker_endpoint, heartbeat_timeout_s=config.heartbeat_timeout_s
        )
        gate = Gate(workers)
        try:
            if keyring is not None:
                gate.listen(config.workers_listen, keyring)
            CoreLoop(config, fronts, workers, gate).run(stop.fileno())
        except ConfigError as error:
            return _refuse(error)
        except TooManyCrashesError as error:
            log.critical("%s", error)
            return 1
        finally:
            gate.close()
            fronts.close()
            workers.close()
            for endpoint in (config.core_endpoint, config.worker_endpoint):
                Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)
    return 0


def _keyring(config: SchedulerConfig) -> Keyring | None:
    """Returns the keys for workers on other hosts, None if there are none. Raises ValueError."""
    if not config.workers_listen:
        return None
    return read_keyring(Path(config.workers_key), Path(config.workers_allowed))


def _refuse(error: ValueError) -> int:
    log.critical("core cannot start: %s", error)
    return 2


def _go_first() -> None:
    """Asks to be run before others where CPUs are short: a late step delays every stream.

    The core sleeps most of the time. Without the right to ask (root or
    CAP_SYS_NICE) it stands in line like everybody.
    """
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, CORE_NICENESS)


def _check_run_dir(run_dir: Path) -> None:
    """Raises ConfigError unless only this user can reach the sockets in `run_dir`."""
    try:
        mode = run_dir.stat().st_mode & 0o777
    except FileNotFoundError:
        raise ConfigError(f"run_dir {run_dir} does not exist") from None
    if mode & 0o077:
        raise ConfigError(f"run_dir {run_dir} has mode {mode:o}; it must be 700")
    if run_dir.stat().st_uid != os.getuid():
        raise ConfigError(f"run_dir {run_dir} belongs to another user")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
