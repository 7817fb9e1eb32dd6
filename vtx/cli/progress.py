"""The progress of a conformance run on a terminal: one line per running test, one per failure, one for all."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from vtx.conformance.results import SerialReport, TestResult

_LONGEST_CHECK: Final = 48


class Progress:
    """An observer of a run of ``total`` tests that draws on standard error, as a context manager."""

    def __init__(self, total: int) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=4,
        )
        self._all = self._bars.add_task("all tests", total=total, note="")
        self._failed = 0
        self._running: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def started(self, name: str) -> None:
        """A line for the test."""
        self._running[name] = self._bars.add_task(escape(name), total=None, note="")

    def progressed(self, name: str, report: SerialReport) -> None:
        """The number of checks so far, and the latest one."""
        last = report.checks[-1].name[:_LONGEST_CHECK] if report.checks else ""
        self._bars.update(self._running[name], completed=report.counts.total(), note=escape(last))

    def finished(self, result: TestResult) -> None:
        """The line goes; a failure leaves one behind."""
        task = self._running.pop(result.name, None)
        if task is None:
            return
        self._bars.remove_task(task)
        if result.verdict.is_failure:
            self._failed += 1
            self._bars.print(f"[red]{result.verdict.value}[/red] {escape(result.name)}: {escape(result.reason)}")
        self._bars.update(self._all, advance=1, note=f"{self._failed} failed" if self._failed else "")
