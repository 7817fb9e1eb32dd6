"""What a test said on its serial port, how its run ended, and the verdict that follows."""

from __future__ import annotations

import enum
import re
from collections import Counter, deque
from collections.abc import Iterator
from typing import Final

from attrs import define, field, frozen

_LONGEST_LINE: Final = 4096
_LONGEST_TEXT: Final = 16 << 20
_MOST_CHECKS: Final = 1_000_000
_CONTEXT_LINES: Final = 40

# The suite's own last words before it ends a run that went wrong, ahead of registers and a call trace.
_LAST_WORDS: Final = re.compile(r"Unhandled |ABORT: |Assert|.*assert.* failed")

_CHECK_LINE: Final = re.compile(r"(PASS|FAIL|SKIP|XFAIL|XPASS|KFAIL): *(.*)")
_SUMMARY_LINE: Final = re.compile(r"SUMMARY: ([0-9]{1,9}) tests(?:, ([0-9]{1,9}) unexpected failures)?")

# Values that the suite writes to the debug-exit port. Everything else is an abort, an unhandled exception or worse.
EXIT_PASS: Final = 0
EXIT_FAIL: Final = 1
EXIT_SKIP: Final = 77 >> 1


class Verdict(enum.Enum):
    """How a test ended. All but the first two are failures of the run."""

    PASS = "PASS"
    SKIP = "SKIP"
    FAIL = "FAIL"
    TIMEOUT = "TIMEOUT"
    CRASH = "CRASH"

    @property
    def is_failure(self) -> bool:
        """Whether the run as a whole has failed."""
        return self not in (Verdict.PASS, Verdict.SKIP)


class CheckStatus(enum.Enum):
    """What the suite says of one check.

    A failure it expects (XFAIL, KFAIL) is not one. It expects them where it knows KVM to be wrong, so a pass it does
    not expect (XPASS) is what the architecture asks for.
    """

    PASS = "PASS"
    SKIP = "SKIP"
    FAIL = "FAIL"
    XFAIL = "XFAIL"
    XPASS = "XPASS"
    KFAIL = "KFAIL"

    @property
    def is_failure(self) -> bool:
        """Whether the processor is wrong."""
        return self is CheckStatus.FAIL


@frozen
class Check:
    """One reported check; ``context`` are the lines since the check before it, kept for failures alone."""

    status: CheckStatus
    name: str
    context: str = ""


@define(slots=True)
class SerialReport:
    """Reads the suite's reports out of what a guest writes, piece by piece, in bounded memory.

    ``text`` is the output, without what goes beyond some megabytes. ``silent`` is the number of checks that the suite
    counted in its summary without a line for each, ``unexpected`` the failures (and unexpected passes) it counted.
    """

    checks: list[Check] = field(factory=list)
    counts: Counter[CheckStatus] = field(factory=Counter)
    silent: int = 0
    unexpected: int = 0
    _text: bytearray = field(factory=bytearray)
    _line: bytearray = field(factory=bytearray)
    _context: deque[str] = field(factory=lambda: deque(maxlen=_CONTEXT_LINES))

    @property
    def text(self) -> str:
        """The serial output."""
        return self._text.decode("utf-8", errors="replace")

    @property
    def last_line(self) -> str:
        """The last line with something in it."""
        return next((line for line in self._last_lines() if line), "")

    @property
    def last_words(self) -> str:
        """The line that says why the guest gave up; failing that, the last one."""
        return next((line for line in self._last_lines() if _LAST_WORDS.match(line)), self.last_line)

    @property
    def last_remark(self) -> str:
        """The last line since the last check that reports nothing."""
        return next((line.strip() for line in reversed(self._context) if line.strip()), "")

    def _last_lines(self) -> Iterator[str]:
        return (line.strip() for line in reversed(self._text[-_LONGEST_LINE:].decode(errors="replace").splitlines()))

    def first_failure(self) -> Check | None:
        """The first check that failed."""
        return next((check for check in self.checks if check.status.is_failure), None)

    def feed(self, data: bytes) -> None:
        """Take some output."""
        self._text += data[: max(_LONGEST_TEXT - len(self._text), 0)]
        *lines, rest = data.split(b"\n")
        for line in lines:
            self._line += line[:_LONGEST_LINE]
            self._finish_line()
        self._line += rest[: max(_LONGEST_LINE - len(self._line), 0)]

    def finish(self) -> None:
        """There is no more output."""
        if self._line:
            self._finish_line()

    def _finish_line(self) -> None:
        line = self._line.decode("utf-8", errors="replace").rstrip("\r")
        self._line.clear()
        if match := _CHECK_LINE.match(line):
            self._add(CheckStatus[match[1]], match[2].strip(), line)
        elif match := _SUMMARY_LINE.match(line):
            self.silent = max(int(match[1]) - self.counts.total(), 0)
            self.unexpected = int(match[2] or 0)
        else:
            self._context.append(line)

    def _add(self, status: CheckStatus, name: str, line: str) -> None:
        self.counts[status] += 1
        if len(self.checks) < _MOST_CHECKS:
            context = "\n".join((*self._context, line)) if status.is_failure else ""
            self.checks.append(Check(status, name, context))
        self._context.clear()


@frozen
class Ended:
    """The machine of a test stopped: ``exit_value`` is what the guest wrote to the debug-exit port, None if it did not.

    ``message`` says why the machine stopped. ``instructions`` and ``ticks`` count from power-up.
    """

    exit_value: int | None
    message: str
    instructions: int = 0
    ticks: int = 0


@frozen
class Died:
    """There was no machine, or its process died; ``message`` is the last word of it."""

    message: str


@frozen
class TimedOut:
    """The limit of ``seconds`` of wall time passed."""

    seconds: float


Ending = Ended | Died | TimedOut


@frozen
class TestResult:
    """The result of one test; ``report`` is None and ``processor`` empty if it has not run, ``wall`` is in seconds."""

    __test__ = False  # not a test, whatever its name looks like to pytest

    name: str
    group: str
    verdict: Verdict
    reason: str = ""
    processor: str = ""
    report: SerialReport | None = None
    ending: Ending | None = None
    wall: float = 0.0

    def count(self, *statuses: CheckStatus) -> int:
        """Number of checks with one of ``statuses``; a test without any counts as one check, by its verdict."""
        report = self.report
        if report is None or not (report.counts or report.silent):
            as_check = {Verdict.PASS: CheckStatus.PASS, Verdict.SKIP: CheckStatus.SKIP}
            return int(as_check.get(self.verdict, CheckStatus.FAIL) in statuses)
        silent = report.silent if CheckStatus.PASS in statuses else 0
        return silent + sum(report.counts[status] for status in statuses)


def judge(ending: Ending, report: SerialReport) -> tuple[Verdict, str]:
    """The verdict on a test that ended so after saying this, with the reason unless it passed."""
    match ending:
        case TimedOut(seconds):
            last = report.last_line
            return Verdict.TIMEOUT, f"not done after {seconds:g} s" + (f", last line: {last}" if last else "")
        case Died(message):
            return Verdict.CRASH, message
        case Ended(exit_value=None, message=message):
            return Verdict.CRASH, message
        case Ended(exit_value=value):
            return _judge_exit(value, report)


def _judge_exit(value: int | None, report: SerialReport) -> tuple[Verdict, str]:
    failed = report.first_failure()
    better = report.counts[CheckStatus.XPASS]
    if value == EXIT_FAIL and failed is None and better and report.unexpected == better:
        return Verdict.PASS, f"the suite calls it a failure to pass what KVM fails ({better} XPASS)"
    if value == EXIT_FAIL or (value in (EXIT_PASS, EXIT_SKIP) and failed is not None):
        return Verdict.FAIL, failed.name if failed is not None else "ended with 1 although no check failed"
    if value == EXIT_PASS:
        return Verdict.PASS, ""
    if value == EXIT_SKIP:
        skipped = next((check.name for check in report.checks if check.status is CheckStatus.SKIP), "")
        return Verdict.SKIP, skipped or report.last_remark or "the test skipped itself"
    last = report.last_words
    return Verdict.CRASH, f"ended with {value:#x}" + (f": {last}" if last else "")
