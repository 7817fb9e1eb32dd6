"""Reading a trace back as events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from vtx.events import TraceEvent
from vtx.trace.codec import from_json
from vtx.trace.errors import TraceError


def read_trace(path: str | Path) -> Iterator[TraceEvent]:
    """The events of the file ``path`` in order; `TraceError` naming the line for one that is no event."""
    try:
        with Path(path).open(encoding="ascii") as file:
            for number, line in enumerate(file, 1):
                yield _event(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"cannot read the trace {str(path)!r}: {error}") from None


def _event(line: str, place: str) -> TraceEvent:
    try:
        return from_json(json.loads(line))
    except ValueError as error:
        raise TraceError(f"{place}: not a trace event: {error}") from None
