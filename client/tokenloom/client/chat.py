"""The interactive chat of the `tokenloom` command."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from tokenloom.client.client import Client, Stream
from tokenloom.client.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    TokenloomError,
    Unavailable,
)
from tokenloom.client.requests import Message, Options

_HELP = """\
Write a line to say it. Ctrl-C cancels the answer, Ctrl-D leaves.
  /reset         forget the chat so far, apart from the system message
  /system TEXT   begin a new chat with another system message; without TEXT, with none
  /help          this
"""


class ChatSession:
    """One chat: reads lines from standard input and prints the answers as they come.

    Prompts and notes go to the terminal only, so that a pipe gets the answers alone.
    """

    def __init__(
        self,
        client: Client,
        *,
        target: str,
        options: Options,
        timeout_s: float | None,
        system: str | None,
    ) -> None:
        self._client = client
        self._target = target
        self._options = options
        self._timeout_s = timeout_s
        self._system = system
        self._messages: list[Message] = []
        self._is_interactive = sys.stdin.isatty()

    def run(self) -> int:
        """Chats until the input ends; returns the exit status. Raises TokenloomError at first."""
        model = self._client.model(timeout_s=self._timeout_s)
        if not model.has_chat_template:
            raise InvalidRequest(f"{model.name} has no chat template; `tokenloom generate` works")
        if self._is_interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401, PLC0415 - gives `input` editing and history
        self._note(f"{model.name} at {self._target}; Ctrl-D leaves, /help tells more\n")
        self._reset()
        while True:
            try:
                self._turn(input("> " if self._is_interactive else ""))
            except KeyboardInterrupt:
                self._note("\nCtrl-D leaves\n")
            except EOFError:
                self._note("\n")
                return 0

    def _turn(self, line: str) -> None:
        match line.strip().split(maxsplit=1):
            case []:
                pass
            case ["/reset"]:
                self._reset()
            case ["/system", *text]:
                self._system = text[0] if text else None
                self._reset()
            case ["/help"]:
                self._note(_HELP)
            case [word, *_] if word.startswith("/"):
                self._note(f"there is no {word}; /help tells what there is\n")
            case _:
                self._answer(line)

    def _answer(self, line: str) -> None:
        """Prints the answer to a line. What was read of it stays in the chat, cancelled or not."""
        text = ""
        failure: TokenloomError | None = None
        with self._client.chat(
            [*self._messages, Message("user", line)], timeout_s=self._timeout_s, **self._options
        ) as stream:
            try:
                with interrupt_cancels(stream):
                    for delta in stream:
                        text += delta.text
                        sys.stdout.write(delta.text)
                        sys.stdout.flush()
            except TokenloomError as error:
                failure = error
        if text:
            sys.stdout.write("\n")
            sys.stdout.flush()
        if isinstance(failure, Cancelled):
            self._note("[cancelled]\n")
        elif failure is not None:
            sys.stderr.write(f"tokenloom: {describe(failure, self._target)}\n")
        if text:
            self._messages += [Message("user", line), Message("assistant", text)]

    def _reset(self) -> None:
        self._messages = [] if self._system is None else [Message("system", self._system)]

    def _note(self, text: str) -> None:
        if self._is_interactive:
            sys.stderr.write(text)
            sys.stderr.flush()


@contextlib.contextmanager
def interrupt_cancels(stream: Stream) -> Iterator[None]:
    """Makes Ctrl-C cancel a stream that the main thread reads.

    From a thread of its own: an exception raised wherever gRPC happens to be can leave one of
    its locks locked, and then the next call waits for ever.
    """

    def cancel(_signal: int, _frame: FrameType | None) -> None:
        threading.Thread(target=stream.cancel, daemon=True).start()

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def describe(error: TokenloomError, target: str) -> str:
    """Returns an error as one line or several for a person at a terminal."""
    lines = [error.message or error.code.name.lower().replace("_", " ")]
    if not error.reason:
        # Then it is gRPC here that speaks, in its own words.
        if isinstance(error, Unavailable):
            lines = [f"no server at {target}: {error.message}"]
        elif isinstance(error, DeadlineExceeded):
            lines = ["the answer took longer than --timeout-s allows"]
    if isinstance(error, InvalidRequest):
        lines += [
            f"  {violation.field}: {violation.description}"
            for violation in error.violations
            if violation.description not in error.message
        ]
    if error.retry_after_s is not None:
        lines.append(f"  try again in {error.retry_after_s:g} s")
    return "\n".join(lines)
