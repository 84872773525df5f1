"""The caller's span, where it uses OpenTelemetry, goes with its requests."""

from __future__ import annotations

import sys


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Returns what tells a server the current span: `traceparent`, or as propagators are set.

    Empty where nobody in this process has loaded OpenTelemetry: then no span is current. So this
    package needs nothing of it, and imports nothing of it before its caller did.
    """
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry.propagate import inject  # noqa: PLC0415 - see above

    carrier: dict[str, str] = {}
    inject(carrier)
    return tuple((key.lower(), value) for key, value in carrier.items())
