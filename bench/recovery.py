"""Kills workers with signal 9 while they generate, and measures what their streams wait for.

    python bench/recovery.py [MODEL] [--ranks 1 2] [--kills 6] [--serve-args="--device cuda"]

For each number of ranks it starts `tokenloom serve`, and kills each rank in turn while one stream
has its tokens. What the server logs tells the phases:

    killed ─▶ noticed ─▶ gathered: all ranks are there, imports done ─▶ loaded ─▶ next token

`--no-standby` among the server's options shows what processes that stand by save.

The load is the model's own time; what comes before and after it is what recovery costs.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tokenloom.client import Client, Delta, Pause

POCKET = Path(__file__).parent.parent / "models" / "pocket"
POCKET_ARGS = "--device cpu --kv-cache-bytes 64MiB --standby"
PROMPT = [5] * 100
NUM_TOKENS_BEFORE = 20
"""That a stream has when its worker is killed."""
MAX_TOKENS = 300
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
RANK = re.compile(r"worker (\d+) on \S+ is rank (\d+)")
NOTICED, GATHERED, LOADED = (
    re.compile(pattern) for pattern in (r"epoch \d+ ends", r"epoch \d+ begins", r"model is ready")
)


class Log:
    """What a server writes, line by line as it comes."""

    def __init__(self, pipe: IO[str]) -> None:
        self._lines: list[tuple[float, str]] = []
        self._thread = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._thread.start()

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            self._lines.append((time.monotonic(), line.rstrip()))

    def time_s(self, pattern: re.Pattern[str], since_s: float) -> float:
        """Returns when the first such line since a moment came. Raises ValueError."""
        for moment_s, line in list(self._lines):
            if moment_s >= since_s and pattern.search(line):
                return moment_s
        raise ValueError(f"the server's log has no {pattern.pattern!r}:\n{self.tail()}")

    def pid(self, rank: int) -> int:
        """Returns the process that was this rank last."""
        found = [RANK.search(line) for _, line in list(self._lines)]
        return [int(each[1]) for each in found if each and int(each[2]) == rank][-1]

    def tail(self) -> str:
        """Returns the last lines."""
        return "\n".join(line for _, line in self._lines[-20:])


@dataclass(frozen=True, kw_only=True)
class Server:
    """One that serves."""

    address: str
    log: Log
    begun_s: float


@dataclass(frozen=True, kw_only=True)
class Phases:
    """The seconds from one event of a recovery, or of a start, to the next."""

    noticed_s: float
    gathered_s: float
    loaded_s: float
    token_s: float

    @property
    def whole_s(self) -> float:
        """From the kill to the next token."""
        return self.noticed_s + self.gathered_s + self.loaded_s + self.token_s


@contextmanager
def serving(model: Path, serve_args: Sequence[str], num_ranks: int) -> Iterator[Server]:
    """Yields a server that is ready. Raises RuntimeError if it does not come to serve."""
    with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
        begun_s = time.monotonic()
        here = ("--listen=127.0.0.1:0", f"--run-dir={folder}", "--max-crashes=1000")
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tokenloom.scheduler", "serve", str(model), *here),
                *(f"--tensor-parallel={num_ranks}", *serve_args),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        log = Log(process.stderr)
        try:
            while not (address := Path(folder) / "address").exists():
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended with {process.returncode}:\n{log.tail()}")
                time.sleep(0.02)
            yield Server(address=address.read_text(), log=log, begun_s=begun_s)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def recovered(client: Client, log: Log, rank: int) -> Phases:
    """Kills a rank under a stream; returns what happens until its next token."""
    with client.generate(PROMPT, max_tokens=MAX_TOKENS, ignore_eos=True) as stream:
        num_tokens = 0
        while num_tokens < NUM_TOKENS_BEFORE:
            num_tokens += len(next(stream).token_ids)
        killed_s = time.monotonic()
        os.kill(log.pid(rank), signal.SIGKILL)
        events = stream.events()
        while not isinstance(next(events), Pause):  # tokens that were under way
            pass
        while not isinstance(next(events), Delta):
            pass
        token_s = time.monotonic()
    noticed_s = log.time_s(NOTICED, killed_s)
    gathered_s = log.time_s(GATHERED, noticed_s)
    loaded_s = log.time_s(LOADED, gathered_s)
    return Phases(
        noticed_s=noticed_s - killed_s,
        gathered_s=gathered_s - noticed_s,
        loaded_s=loaded_s - gathered_s,
        token_s=token_s - loaded_s,
    )


def measured(
    model: Path, serve_args: Sequence[str], num_ranks: int, num_kills: int, pause_s: float
) -> str:
    """Returns a row of the table: the medians of several kills."""
    with serving(model, serve_args, num_ranks) as server, Client(server.address) as client:
        client.wait_ready(timeout_s=START_TIMEOUT_S)
        gathered_s = server.log.time_s(GATHERED, server.begun_s)
        loaded_s = server.log.time_s(LOADED, gathered_s)
        kills = []
        for kill in range(num_kills):
            time.sleep(pause_s)
            kills.append(recovered(client, server.log, kill % num_ranks))
    whole = [each.whole_s for each in kills]
    beyond = [each.whole_s - each.loaded_s for each in kills]
    cells = [
        statistics.median(each)
        for each in (
            [kill.noticed_s for kill in kills],
            [kill.gathered_s for kill in kills],
            [kill.loaded_s for kill in kills],
            [kill.token_s for kill in kills],
            whole,
        )
    ]
    start = f"{loaded_s - server.begun_s:.2f}, {loaded_s - gathered_s:.2f} of it loading"
    row = [str(num_ranks), start, *(f"{cell:.2f}" for cell in cells)]
    row.append(f"{min(whole):.2f}–{max(whole):.2f}")
    row.append(f"{statistics.median(beyond):.2f}, at most {max(beyond):.2f}")
    return "| " + " | ".join(row) + " |"


def main(argv: Sequence[str]) -> int:
    """Prints a table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=POCKET)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kills", type=int, default=6, help="for each number of ranks")
    parser.add_argument(
        "--pause-s", type=float, default=5.0, help="before each, for those that stand by to come"
    )
    parser.add_argument("--serve-args", default=POCKET_ARGS, help="for `tokenloom serve`")
    args = parser.parse_args(argv)
    columns = ("ranks", "first start s", "noticed", "gathered", "loaded", "token", "whole")
    print("| " + " | ".join((*columns, "least–most", "beyond the load")) + " |")
    print("| --- " * (len(columns) + 2) + "|")
    for num_ranks in args.ranks:
        serve_args = shlex.split(args.serve_args)
        row = measured(args.model, serve_args, num_ranks, args.kills, args.pause_s)
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
