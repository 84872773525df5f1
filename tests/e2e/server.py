"""tokenloom as a user starts it: real processes, a real port, and a look into the core."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import zmq

from tests.core.processes import FrontSocket
from tokenloom.client import TLS, Client
from tokenloom.scheduler.messages import Inspection

START_TIMEOUT_S = 120.0


class Server:
    """`tokenloom serve`, or `tokenloom scheduler` with fake workers, until the end of `with`."""

    def __init__(self, *arguments: str, module: str = "tokenloom.scheduler") -> None:
        self.run_dir = Path(tempfile.mkdtemp(prefix="loom-"))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.context = zmq.Context()
        here = ("--listen=127.0.0.1:0", f"--run-dir={self.run_dir}")
        command, *rest = arguments
        self._command = (module, command, *here, *rest)
        self.scheduler = self.start(*self._command)

    @classmethod
    def of_model(cls, model: Path, *options: str) -> Self:
        """Serves a checkpoint with a real worker on the CPU."""
        return cls("serve", str(model), "--device", "cpu", *options)

    @classmethod
    def of_fake(cls, model: Path, *options: str, worker: tuple[str, ...] = ()) -> Self:
        """Serves a checkpoint's tokenizer with a fake worker."""
        server = cls("scheduler", "--model", str(model), *options)
        server.start_fake_worker(*worker)
        return server

    @classmethod
    def of_fakes(cls, model: Path, *options: str, worker: tuple[str, ...] = ()) -> Self:
        """Serves a checkpoint's tokenizer with fake workers that are started again as real ones."""
        arguments = (str(model), "--device=cpu", *options, "--", *worker)
        return cls("serve", *arguments, module="tests.chaos.fake_serve")

    def start(self, module: str, *args: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-m", module, *args], env=environment)
        self.processes.append(process)
        return process

    def restart_scheduler(self) -> None:
        """Kills what was started first, and starts it again in the same folder."""
        self.scheduler.kill()
        self.scheduler.wait()
        (self.run_dir / "address").unlink()
        self.scheduler = self.start(*self._command)

    def start_fake_worker(self, *options: str) -> subprocess.Popen[bytes]:
        endpoint = f"ipc://{self.run_dir}/worker.sock"
        return self.start("tokenloom.worker.fake", "--connect", endpoint, *options)

    @property
    def address(self) -> str:
        path = self.run_dir / "address"
        wait_until(path.exists, START_TIMEOUT_S, alive=self.scheduler)
        return path.read_text()

    @property
    def metrics_address(self) -> str:
        """Where the server's exporter listens; it must have been told to."""
        path = self.run_dir / "metrics" / "address"
        wait_until(path.exists, START_TIMEOUT_S, alive=self.scheduler)
        return path.read_text()

    @property
    def admin_address(self) -> str:
        """Where operators are served, with --admin-listen."""
        path = self.run_dir / "admin-address"
        wait_until(path.exists, START_TIMEOUT_S, alive=self.scheduler)
        return path.read_text()

    def client(self, *, credentials: TLS | None = None, token: str | None = None) -> Client:
        """Returns a client of the server, once the model is ready."""
        client = Client(self.address, credentials=credentials, token=token)
        client.wait_ready(timeout_s=START_TIMEOUT_S)
        return client

    def inspect(self) -> Inspection:
        """Returns the core's own account of itself."""
        front = FrontSocket(self.context, f"ipc://{self.run_dir}/core.sock")
        try:
            return front.inspect()
        finally:
            front.socket.close()

    def wait_idle(self) -> Inspection:
        """Waits until no request is left; returns the state then."""
        last: list[Inspection] = []

        def idle() -> bool:
            last.append(self.inspect())
            return last[-1].num_running == last[-1].num_waiting == 0

        wait_until(idle, START_TIMEOUT_S, alive=self.scheduler)
        return last[-1]

    def assert_unharmed(self) -> None:
        """Nothing runs, every block is back, and all structures agree."""
        inspection = self.wait_idle()
        assert inspection.violations == ()
        assert inspection.num_free_blocks == inspection.num_blocks > 0

    def workers(self) -> list[psutil.Process]:
        """Returns the workers that the server started and that live."""
        return self.children("tokenloom.worker")

    def children(self, module: str) -> list[psutil.Process]:
        """Returns the processes that the server started, that live, and that run a module."""
        found = []
        for child in psutil.Process(self.scheduler.pid).children():
            with suppress(psutil.NoSuchProcess):
                if any(part.startswith(module) for part in child.cmdline()):
                    found.append(child)
        return sorted(found, key=lambda child: child.pid)

    def stop(self) -> int:
        """Sends SIGTERM and returns the exit code."""
        self.scheduler.send_signal(signal.SIGTERM)
        return self.scheduler.wait(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.scheduler.poll() is None:
            self.scheduler.send_signal(signal.SIGINT)
            try:
                self.scheduler.wait(20)
            except subprocess.TimeoutExpired:
                self.scheduler.kill()
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self.context.destroy(linger=0)
        shutil.rmtree(self.run_dir, ignore_errors=True)


def wait_until(
    condition: Callable[[], bool],
    timeout_s: float,
    *,
    alive: subprocess.Popen[bytes] | None = None,
) -> None:
    """Waits for a condition. Raises TimeoutError, or RuntimeError if `alive` exits before."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if alive is not None and alive.poll() is not None:
            raise RuntimeError(f"the server exited with {alive.returncode}")
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not within {timeout_s} s")
        time.sleep(0.02)
