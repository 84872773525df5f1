"""A plan as a table for a terminal and as JSON for programs. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import msgspec

from tokenloom.worker.gpus import GPUS
from tokenloom.worker.plan.capacity import BATCHES, MAX_RANKS, Group, Plan, Pool, Row

_GIB = 1024**3
_KIB = 1024
_ABSENT = "–"


def as_json(plan: Plan) -> str:
    """Returns the fields of a Plan under their names."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=2).decode()


def as_text(plan: Plan) -> str:
    """Returns a table with what there is to say above and below it."""
    return "\n".join((*_above(plan), "", *_table(plan), "", *_below(plan)))


def _above(plan: Plan) -> Iterator[str]:
    stored = "" if plan.stored is None else f", stored in {plan.stored}"
    yield (
        f"{plan.model}: {plan.architecture}, {_count(plan.num_weights)} weights{stored},"
        f" contexts of up to {plan.max_model_tokens:,} tokens"
    )
    if plan.stored is not None:
        yield (
            f"unquantized its weights would take {plan.unquantized_bytes / _GIB:.2f} GiB in"
            f" {plan.serving.dtype}"
        )
    sizes = (f"{size / _KIB:g} KiB in {name}" for name, size in plan.kv_bytes_per_token.items())
    yield f"a token's keys and values take {', '.join(sizes)}"
    if any(row.num_gpus > 1 for row in plan.rows):
        yield (
            "GiB are those of each GPU where several share the model: heads, columns and vocabulary"
            " are divided, norms replicated"
        )


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _table(plan: Plan) -> Iterator[str]:
    columns = [(title, *cells) for title, cells in _columns(plan)]
    widths = [max(map(len, column)) for column in columns]
    for first, *others in zip(*columns, strict=True):
        cells = [first.ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        yield "  ".join(cells)


def _columns(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    """Yields titles and cells."""
    rows = plan.rows
    yield "weights", [row.precision for row in rows]
    yield "GiB", [f"{row.weights_bytes / _GIB:.2f}" for row in rows]
    yield (
        "GPU",
        [_ABSENT if row.gpu is None else _group(row.gpu.name, row.num_gpus) for row in rows],
    )
    first, *others = plan.serving.kv_types
    yield "KV GiB", _cells(rows, first, lambda pool: f"{pool.num_bytes / _GIB:.2f}")
    for kv_type in (first, *others):
        prefix = "" if kv_type == first else f"{kv_type}: "
        yield f"{prefix}tokens", _cells(rows, kv_type, lambda pool: f"{pool.num_tokens:,}")
        yield "requests", _cells(rows, kv_type, lambda pool: f"{pool.num_requests:,}")
    for batch in BATCHES:
        title = f"tok/s × {batch}" if batch == BATCHES[0] else f"× {batch}"
        yield title, _cells(rows, first, partial(_speed, batch))
    if any(row.smallest is None or row.gpu is None or _is_other(row) for row in rows):
        yield "smallest", [_smallest(row.smallest) for row in rows]


def _cells(rows: tuple[Row, ...], kv_type: str, show: Callable[[Pool], str]) -> list[str]:
    """Returns what a column shows of the pools in one type; of what does not fit, nothing."""
    return [
        next((show(pool) for pool in row.pools if row.fits and pool.kv_type == kv_type), _ABSENT)
        for row in rows
    ]


def _speed(batch: int, pool: Pool) -> str:
    speed = pool.tokens_per_s.get(batch)
    return _ABSENT if speed is None else f"{speed:,.0f}"


def _is_other(row: Row) -> bool:
    """Returns whether a GPU was asked about that is not the smallest."""
    assert row.gpu is not None
    return row.smallest != Group(gpu=row.gpu.name, num_gpus=row.num_gpus)


def _smallest(group: Group | None) -> str:
    return "none" if group is None else _group(group.gpu, group.num_gpus)


def _group(name: str, num_gpus: int) -> str:
    return name if num_gpus == 1 else f"{num_gpus} × {name}"


def _below(plan: Plan) -> Iterator[str]:
    serving = plan.serving
    for row in plan.rows:
        if not row.fits:
            yield f"{row.precision} does not fit: {_why_not(row)}"
    first = serving.kv_types[0]
    yield (
        f"requests: as many as fit at once with {serving.context_tokens:,} tokens each,"
        f" up to {serving.max_num_requests:,}"
    )
    yield (f"tok/s: the most that memory bandwidth allows for so many such requests, KV in {first}")


def _why_not(row: Row) -> str:
    if row.gpu is None:
        return f"no {MAX_RANKS} of any GPU up to {GPUS[-1].name} hold it"
    where = _group(row.gpu.name, row.num_gpus)
    if row.obstacle is not None:
        return row.obstacle
    ways = [] if row.least_num_gpus is None else [_group(row.gpu.name, row.least_num_gpus)]
    if row.smallest is not None:
        ways.append(_group(row.smallest.gpu, row.smallest.num_gpus))
    each = " each" if row.num_gpus > 1 else ""
    lacking = f"{where} lacks {row.lacking_bytes / _GIB:.2f} GiB{each} for one request"
    return f"{lacking}; {' or '.join(dict.fromkeys(ways)) or 'nothing in the table'} would do"
