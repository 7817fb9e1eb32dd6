"""What ``vtx run`` says about a run when it is over: a screen of text, or one JSON object."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from attrs import field, frozen

from vtx.cli.failures import Failures

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vtx.cli.session import Ended
    from vtx.machine import Machine

_LONGEST_TABLE: Final = 12
_LABEL_WIDTH: Final = 48
_FIGURE_WIDTH: Final = 16


@frozen
class Summary:
    """The figures of one run. Times are in seconds; ``vm_exits`` are counts by basic exit reason, most frequent first.

    ``entry_failure`` is why the last failing VM entry failed, told only when the guest ended badly. ``failures`` are
    the failing VM entries and VMX instructions, by the rule they broke.
    """

    reason: str
    message: str
    status: int
    exit_value: int | None
    instructions: int
    ticks: int
    virtual_time: float
    wall_time: float
    vm_exits: Mapping[str, int] = field(factory=dict)
    entry_failure: str | None = None
    failures: Failures = field(factory=Failures)

    def to_json(self) -> str:
        """One JSON object on one line."""
        return json.dumps(
            {
                "reason": self.reason,
                "message": self.message,
                "status": self.status,
                "exit_value": self.exit_value,
                "instructions": self.instructions,
                "ticks": self.ticks,
                "virtual_time": self.virtual_time,
                "wall_time": round(self.wall_time, 6),
                "vm_exits": dict(self.vm_exits),
                "entry_failure": self.entry_failure,
                "failures": self.failures.to_json(),
            }
        )

    def to_text(self) -> str:
        """A screen of lines, the reason last."""
        lines = [
            _row("  instructions", f"{self.instructions:,}"),
            _row("  virtual time", _duration(self.virtual_time)),
            _row("  wall time", _duration(self.wall_time)),
            _row("  VM exits", f"{sum(self.vm_exits.values()):,}"),
        ]
        lines += _counts(self.vm_exits, "reasons")
        if self.failures.counts:
            lines.append(_row("  failures of VMX", f"{self.failures.counts.total():,}"))
            lines += _counts(dict(self.failures.counts.most_common()), "rules")
        if self.entry_failure is not None:
            lines.append("last failing VM entry:")
            lines += [f"  {line}" for line in self.entry_failure.splitlines()]
        lines.append(f"vtx: {self.message}")
        return "\n".join(lines)


def _counts(counts: Mapping[str, int], what: str) -> list[str]:
    """The first rows of a table, and what the others come to."""
    rows = list(counts.items())
    shown = rows if len(rows) <= _LONGEST_TABLE else rows[: _LONGEST_TABLE - 1]
    lines = [_row(f"    {name}", f"{count:,}") for name, count in shown]
    if len(shown) < len(rows):
        rest = sum(count for _, count in rows[len(shown) :])
        lines.append(_row(f"    {len(rows) - len(shown)} more {what}", f"{rest:,}"))
    return lines


def _row(label: str, figure: str) -> str:
    return f"{label:<{_LABEL_WIDTH}}{figure:>{_FIGURE_WIDTH}}"


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.3f} s"
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3f} us"


def summarize(
    machine: Machine, ended: Ended, failures: Failures, message: str, status: int, *, guest_is_well: bool
) -> Summary:
    """The summary of a run that ended with ``status`` and for the reason ``message``."""
    result = ended.result
    counts = sorted(machine.exit_counts.items(), key=lambda item: (-item[1], item[0]))
    return Summary(
        result.reason.value,
        message,
        status,
        result.exit_value,
        result.instructions,
        result.ticks,
        result.ticks / machine.profile.tsc_frequency,
        ended.wall,
        dict(counts),
        None if guest_is_well else entry_failure(machine),
        failures,
    )


def entry_failure(machine: Machine) -> str | None:
    """What broke the last VM entry or VMRUN that failed: rule, fields and citation of each violation, or None."""
    failure = machine.cpu.svm.last_failure if machine.profile.is_amd else machine.cpu.vmx.last_failure
    return None if failure is None else str(failure)
