"""MONITOR and MWAIT, MONITORX and MWAITX: waiting for a store of another processor to a line of memory.

Interpretations. The processor looks at the line now and then instead of watching it: a store is noticed late, by
`CHECK_TICKS` at most, and one that changes nothing not at all. A wait without a timer ends by itself after
`LONGEST_WAIT`. Software has to be ready for both: it looks at what it waits for again, and waits again. Between
MONITOR and MWAIT, events that are delivered, VM entries and VM exits, VMRUN and #VMEXIT disarm the monitor; far
transfers by instructions do not.

Spec: SDM Vol. 2B, "MONITOR—Set Up Monitor Address", "MWAIT—Monitor Wait"; APM Vol. 3, "General-Purpose Instruction
Reference" (MONITORX, MWAITX).
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vtx.x86.memory import PhysicalMemory

LINE_SIZE: Final = 64
CHECK_TICKS: Final = 100_000
LONGEST_WAIT: Final = 1_000_000


@frozen
class Monitor:
    """A line of RAM, by physical address, that MONITOR armed, and what it held then."""

    line: int
    contents: bytes

    @classmethod
    def arm(cls, memory: PhysicalMemory, address: int) -> Monitor | None:
        """Monitor the line that holds ``address``; None where there is no RAM to store to."""
        line = address & -LINE_SIZE
        return cls(line, memory.read(line, LINE_SIZE)) if memory.is_backed(line, LINE_SIZE) else None

    def triggered(self, memory: PhysicalMemory) -> bool:
        """Whether somebody has stored something to the line."""
        return memory.read(self.line, LINE_SIZE) != self.contents


@frozen
class Wait:
    """What an MWAIT or MWAITX waits for: a store to the monitored line, or tick ``until``.

    With ``masked_too``, interrupts end it although RFLAGS.IF is 0.
    """

    monitor: Monitor
    until: int
    masked_too: bool
