"""A terminal that shows one page again and again, and is as it was afterwards. ANSI, no curses."""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from tokenloom.client.top.table import Line

_ENTER = "\x1b[?1049h\x1b[?25l"  # the alternate screen, no cursor
_LEAVE = "\x1b[?25h\x1b[?1049l"
_HOME, _END_OF_LINE, _END_OF_PAGE = "\x1b[H", "\x1b[K", "\x1b[J"
_COLOURS = {None: "1", "ready": "", "not ready": "33", "away": "31"}
"""Of lines: bold, as it is, yellow, red."""
_LEAVING_KEYS = frozenset(b"qQ")
_FIRST_PAGE_S = 0.2
"""After which there is something to show."""


class Screen:
    """The terminal of standard output, until the end of `with`; keys come from standard input."""

    def __init__(self) -> None:
        self._keys = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._old: list[Any] = []
        self._is_plain = bool(os.environ.get("NO_COLOR"))
        self._has_shown = False

    def show(self, heading: str, lines: Sequence[Line]) -> None:
        """Shows a page, cut to the terminal's size."""
        width, height = shutil.get_terminal_size()
        texts = [heading[:width], "", *(self._coloured(line, width) for line in lines)]
        page = f"{_END_OF_LINE}\r\n".join(texts[:height])
        self._write(f"{_HOME}{page}{_END_OF_LINE}{_END_OF_PAGE}")

    def wait_for_leave(self, timeout_s: float) -> bool:
        """Waits for so long, at first only a moment, or for the key that leaves."""
        if not self._has_shown:
            self._has_shown, timeout_s = True, min(timeout_s, _FIRST_PAGE_S)
        end_s = time.monotonic() + timeout_s
        while (left_s := end_s - time.monotonic()) > 0:
            if self._keys is None:
                time.sleep(left_s)
            elif select.select([self._keys], [], [], left_s)[0]:
                pressed = os.read(self._keys, 64)
                if not pressed or _LEAVING_KEYS.intersection(pressed):
                    return True
        return False

    def __enter__(self) -> Self:
        signal.signal(signal.SIGTERM, _leave)
        if self._keys is not None:
            self._old = termios.tcgetattr(self._keys)
            tty.setcbreak(self._keys)
        self._write(_ENTER)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._write(_LEAVE)
        if self._keys is not None:
            termios.tcsetattr(self._keys, termios.TCSADRAIN, self._old)

    def _coloured(self, line: Line, width: int) -> str:
        colour = "" if self._is_plain else _COLOURS[line.state]
        text = line.text[:width]
        return f"\x1b[{colour}m{text}\x1b[0m" if colour else text

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _leave(number: int, _: FrameType | None) -> NoReturn:
    """Ends by an exception, so that the terminal is put right on the way out."""
    raise SystemExit(128 + number)
