"""Writing a trace: one JSON object per line, in the order of events, byte for byte the same for the same run."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Final

from vtx.events import TraceEvent
from vtx.trace.codec import to_json
from vtx.trace.errors import TraceError

_BUFFER: Final = 1 << 20
_encode: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True).encode


class JsonLinesTracer:
    """A `Tracer` that writes to the file ``path``, which it replaces.

    Opening raises `TraceError` if the file cannot be written, so that this is known before a run; so do ``emit`` and
    ``close`` if the disk fills up later. A context manager.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        try:
            self._file = Path(path).open("w", encoding="ascii", newline="\n", buffering=_BUFFER)  # noqa: SIM115
        except (OSError, ValueError) as error:
            raise self._error(error) from None

    def _error(self, error: Exception) -> TraceError:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return TraceError(f"cannot write the trace {str(self.path)!r}: {why}")

    def emit(self, event: TraceEvent) -> None:
        """Write one line."""
        try:
            self._file.write(_encode(to_json(event)) + "\n")
        except OSError as error:
            raise self._error(error) from None

    def close(self) -> None:
        """Write what is buffered and close the file."""
        try:
            self._file.close()
        except OSError as error:
            raise self._error(error) from None

    def __enter__(self) -> JsonLinesTracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
