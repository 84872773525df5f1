"""How the processes of a server log: a line a record on standard error, for people or for programs.

    text   2026-11-22 10:15:30,123 front[12] INFO request ended code=OK num_completion_tokens=7
    json   {"time": "2026-11-22T09:15:30.123Z", "level": "info", "process": "front", "pid": 12,
            "logger": "…", "message": "request ended", "code": "OK", "num_completion_tokens": 7}

A record has fields beside its message where it was logged with `extra={"fields": {…}}`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TypeAlias

LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")

_ErrorInfo: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `set_up_logs` takes."""
    parser.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default=LOG_FORMATS[0],
        help="lines for people, or a JSON object a line",
    )
    parser.add_argument(
        "--log-level", choices=LOG_LEVELS, default="info", help="the least that is logged"
    )


def set_up_logs(process: str, *, form: str, level: str, tells_errors: bool = True) -> None:
    """Makes all that this process logs come in one form, what nobody caught and warnings, too.

    `process` is its role. Without `tells_errors` no exception's text is logged, only its type and
    where it was raised: for a process whose exceptions may quote what callers sent.
    """
    formatter: logging.Formatter = (
        _JsonFormatter(process, tells_errors=tells_errors)
        if form == "json"
        else _TextFormatter(process, tells_errors=tells_errors)
    )
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[stream])
    logging.captureWarnings(True)
    sys.excepthook = _on_uncaught
    threading.excepthook = _on_uncaught_in_thread


class _TextFormatter(logging.Formatter):
    """A line for people; tracebacks follow on lines of their own."""

    def __init__(self, process: str, *, tells_errors: bool) -> None:
        super().__init__(f"%(asctime)s {process}[%(process)d] %(levelname)s %(message)s")
        self._tells_errors = tells_errors

    def format(self, record: logging.LogRecord) -> str:
        record.exc_text = None  # another handler's words about the same error
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        line = super().formatMessage(record)
        told = "".join(f" {name}={value}" for name, value in _fields(record).items())
        return line + told

    def formatException(self, ei: _ErrorInfo) -> str:  # noqa: N802 - logging's own name
        return _trace(ei[1], tells_errors=self._tells_errors)


class _JsonFormatter(logging.Formatter):
    """An object a line."""

    def __init__(self, process: str, *, tells_errors: bool) -> None:
        super().__init__()
        self._process = process
        self._tells_errors = tells_errors

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        told: dict[str, object] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info and record.exc_info[1] is not None:
            told["error"] = _trace(record.exc_info[1], tells_errors=self._tells_errors)
        return json.dumps(told, ensure_ascii=False, default=str)


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields: Mapping[str, object] = getattr(record, "fields", {})
    return {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in fields.items()
        if value is not None
    }


def _trace(error: BaseException | None, *, tells_errors: bool) -> str:
    """Returns where an exception came from, with its text or without."""
    if error is None:
        return ""
    if tells_errors:
        return "".join(traceback.format_exception(error)).rstrip("\n")
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        where = "".join(traceback.format_tb(cause.__traceback__))
        parts.append(f"{where}{type(cause).__qualname__}")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\nraised while dealing with this:\n".join(reversed(parts))


def _on_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logging.getLogger(__name__).critical(
        "process %d ends by an error", os.getpid(), exc_info=(kind, error, trace)
    )


def _on_uncaught_in_thread(args: Any) -> None:  # noqa: ANN401 - threading's own type is private
    if args.exc_value is not None:
        logging.getLogger(__name__).error("a thread ends by an error", exc_info=args.exc_value)
