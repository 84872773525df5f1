"""Rows as a table for people, and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenloom.client.top.rows import Row, State, total_of

_MAX_TARGET_CHARS = 40


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the table; what it is about decides its colour."""

    text: str
    state: State | None = None
    """None: the heading."""


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _rate(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 10 or not value else f"{value:.1f}"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{1000 * value:.1f}"


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("RUN", lambda row: _count(row.num_running)),
    ("WAIT", lambda row: _count(row.num_waiting)),
    ("KV %", lambda row: _percent(row.kv_fraction)),
    ("LOAD %", lambda row: _percent(row.utilization)),
    ("IN tok/s", lambda row: _rate(row.prompt_tokens_per_s)),
    ("OUT tok/s", lambda row: _rate(row.generated_tokens_per_s)),
    ("STEP ms", lambda row: _ms(row.step_s)),
    ("BUSY %", lambda row: _percent(row.busy_fraction)),
    ("DONE/s", lambda row: _rate(row.finished_per_s)),
    ("REFUSED/s", lambda row: _rate(row.refused_per_s)),
    ("PREEMPTED", lambda row: _count(row.num_preemptions)),
    ("RECOVERED", lambda row: _count(row.num_recoveries)),
)


def table(rows: Sequence[Row]) -> list[Line]:
    """Returns the table: a heading, one line of all if there are several, and a line a replica."""
    shown = [total_of(rows), *rows] if len(rows) > 1 else list(rows)
    cells = [["REPLICA", "MODEL", "STATE", *(name for name, _ in _COLUMNS)]]
    for row in shown:
        names = [_plain(row.target)[-_MAX_TARGET_CHARS:], _plain(row.model), row.state]
        is_known = row.num_running is not None
        cells.append(names + [show(row) if is_known else "" for _, show in _COLUMNS])
    if len(rows) > 1:
        cells[1][2] = f"{sum(row.state == 'ready' for row in rows)}/{len(rows)} ready"
    widths = [max(len(line[place]) for line in cells) for place in range(len(cells[0]))]
    texts = [_joined(line, widths) for line in cells]
    for place, row in enumerate(shown, start=1):
        if row.error:
            texts[place] = f"{_joined(cells[place][:3], widths[:3])}  {_plain(row.error)}"
    states = [None, *(row.state for row in shown)]
    return [Line(text=text, state=state) for text, state in zip(texts, states, strict=True)]


def _plain(text: str) -> str:
    """Returns what another process said so that no terminal takes it for more than a line."""
    return "".join(each if each.isprintable() else " " for each in text)


def _joined(line: Sequence[str], widths: Sequence[int]) -> str:
    """Returns a line of the table: names to the left, figures to the right."""
    parts = [
        text.ljust(width) if place < 3 else text.rjust(width)
        for place, (text, width) in enumerate(zip(line, widths, strict=True))
    ]
    return "  ".join(parts).rstrip()


def as_json(rows: Sequence[Row], time: str) -> str:
    """Returns an object on one line: the replicas, and all together."""
    told = {
        "time": time,
        "replicas": [_object(row) for row in rows],
        "all": _object(total_of(rows)),
    }
    return json.dumps(told, ensure_ascii=False)


def _object(row: Row) -> dict[str, object]:
    return dataclasses.asdict(row) | {"kv_fraction": row.kv_fraction}
