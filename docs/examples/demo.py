"""Serves the pocket model on this machine and asks it several things at once.

    python docs/examples/demo.py            # or `make demo`
    python docs/examples/demo.py --seed 7   # other questions

Scheduler and worker are the real processes; the questions go through the client
SDK and their answers are known. Exits with 0 if every answer was complete, most
were right, and the server shut down cleanly. Options that are not the demo's own
go to `tokenloom serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from models.pocket import tasks  # noqa: E402 - the questions lie beside the model, not in a package
from tokenloom.client import (  # noqa: E402 - as above
    AsyncClient,
    FinishReason,
    Message,
    TokenloomError,
)

MODEL = ROOT / "models" / "pocket"
ASKED = ("addition2", "subtraction2", "addition3", "sorting", "copying", "reversing", "lookup")
START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0

Result = TypeVar("Result")


class DemoError(Exception):
    """The server did not come up, or did not go down as it should."""


class Board:
    """The questions and their answers, a line each.

    On a terminal each line is rewritten as its answer grows, and what a line cannot hold is told
    in full at the end; elsewhere a line is printed once, when its answer is complete.
    """

    def __init__(self, questions: list[str]) -> None:
        self._questions = [" ".join(question.split()) for question in questions]
        self._is_live = sys.stdout.isatty()
        self._width = shutil.get_terminal_size().columns - 1
        self._too_long: list[str] = []
        if self._is_live:
            print("\n" * len(questions), end="")

    def grow(self, index: int, answer: str) -> None:
        """Shows how far an answer has come."""
        if self._is_live:
            self._rewrite(index, " ", answer)

    def end(self, index: int, answer: str, mark: str) -> None:
        """Shows a complete answer and its mark."""
        if not self._is_live:
            print(self._head(index, mark) + answer, flush=True)
            return
        self._rewrite(index, mark, answer)
        if len(self._head(index, mark)) + len(answer) > self._width:
            self._too_long.append(answer)

    def close(self) -> None:
        """Shows what the lines could not hold."""
        for answer in self._too_long:
            print(f"\n{answer}")

    def _head(self, index: int, mark: str) -> str:
        question = _shortened(self._questions[index], 44)
        return f"{mark:<5}  {question:<44}  "

    def _rewrite(self, index: int, mark: str, answer: str) -> None:
        head = self._head(index, mark)
        room = max(1, self._width - len(head))
        rows_up = len(self._questions) - index
        line = head + _shortened(answer, room)
        print(f"\x1b[{rows_up}A\r\x1b[2K{line}\x1b[{rows_up}B\r", end="", flush=True)


def _shortened(text: str, width: int) -> str:
    """Returns at most `width` characters; the end tells most."""
    return text if len(text) <= width else "…" + text[1 - width :]


@asynccontextmanager
async def serving(model: Path, options: list[str]) -> AsyncIterator[AsyncClient]:
    """Runs a server and yields a client of it, once the model is loaded. Raises DemoError."""
    with tempfile.TemporaryDirectory(prefix="tokenloom-demo-") as run_dir:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tokenloom.scheduler", "serve", str(model)),
            *("--listen", "127.0.0.1:0", "--run-dir", run_dir, "--log-level", "warning", *options),
        )
        try:
            address = await _unless_exited(process, _address(Path(run_dir)))
            async with AsyncClient(address) as client:
                await _unless_exited(process, client.wait_ready(timeout_s=START_TIMEOUT_S))
                yield client
        finally:
            await _stop(process)


async def _address(run_dir: Path) -> str:
    """Waits until the server tells where it listens."""
    path = run_dir / "address"
    while not path.exists():  # noqa: ASYNC110 - another process writes the file
        await asyncio.sleep(0.05)
    return path.read_text(encoding="utf-8").strip()


async def _unless_exited(process: Process, start: Coroutine[None, None, Result]) -> Result:
    """Awaits a step of the start. Raises DemoError if the server exits or takes too long."""
    step = asyncio.ensure_future(start)
    exited = asyncio.ensure_future(process.wait())
    try:
        await asyncio.wait(
            {step, exited}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        if step.done():
            return step.result()
        if exited.done():
            raise DemoError("the server exited before it was ready")
        raise DemoError(f"the server was not ready within {START_TIMEOUT_S:g} s")
    finally:
        step.cancel()
        exited.cancel()


async def _stop(process: Process) -> None:
    """Asks the server to shut down and waits. Raises DemoError unless it exits with 0."""
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
    try:
        status = await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise DemoError(f"the server did not shut down within {STOP_TIMEOUT_S:g} s") from None
    if status != 0:
        raise DemoError(f"the server exited with status {status}")


async def answer(client: AsyncClient, example: tasks.Example, index: int, board: Board) -> bool:
    """Asks one question and returns whether the answer is right. Raises TokenloomError."""
    messages = [Message("user", example.prompt)]
    async with client.chat(messages, temperature=0, timeout_s=ANSWER_TIMEOUT_S) as stream:
        async for _ in stream:
            board.grow(index, " ".join(stream.partial_text.split()))
        result = await stream.result()
    if result.finish_reason is not FinishReason.STOP_TOKEN:
        raise DemoError(f"an answer ended early: {result.finish_reason}, {result.text!r}")
    is_right = result.text.strip() == example.answer
    board.end(index, " ".join(result.text.split()), "right" if is_right else "WRONG")
    return is_right


async def demo(model: Path, seed: int, options: list[str]) -> bool:
    """Runs the demo and returns whether it went well. Raises DemoError and TokenloomError."""
    examples = [tasks.held_out(task, 1, seed)[0] for task in (*ASKED, "stories")]
    async with serving(model, options) as client:
        served = await client.model()
        print(
            f"{served.name} is ready; {len(examples)} questions that it never saw, all at once",
            flush=True,
        )
        board = Board([example.prompt for example in examples])
        start_s = time.monotonic()
        marks = await asyncio.gather(
            *(answer(client, example, index, board) for index, example in enumerate(examples))
        )
        took_s = time.monotonic() - start_s
        board.close()
        num_right = sum(marks)
        print(f"{num_right} of {len(marks)} answers are right, in {took_s:.1f} s", flush=True)
    return 4 * num_right >= 3 * len(marks)


def main() -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="default: models/pocket")
    parser.add_argument("--seed", type=int, default=0, help="chooses the questions; default: 0")
    args, options = parser.parse_known_args()
    try:
        return 0 if asyncio.run(demo(args.model, args.seed, options)) else 1
    except (DemoError, TokenloomError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
