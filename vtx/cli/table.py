"""Tables: drawn on a terminal, plain aligned columns in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()) -> None:
    """Print ``rows`` under ``header``; the columns numbered in ``right`` are aligned to the right."""
    if sys.stdout.isatty():
        _draw(header, rows, right)
        return
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = [
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())  # noqa: T201


def _draw(header: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int]) -> None:
    from rich.console import Console  # noqa: PLC0415 - slow to import, and of use on a terminal alone
    from rich.table import Table  # noqa: PLC0415

    table = Table()
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column in right else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
