"""What PAUSE takes: a processor that executes the same PAUSE again and again waits, and waits longer each time.

How long a PAUSE takes is a processor's own affair. Here it doubles for as long as nothing happens in between, so that
waiting loops get to their end after few iterations, and none waits more than twice as long as it would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from attrs import define

from vtx.x86.state import Gpr

PAUSE_TICKS: Final = 140
"""What the first PAUSE takes, as on recent server parts."""

LONGEST_PAUSE: Final = PAUSE_TICKS << 12

ITERATION_TICKS: Final = 1_000
"""What the rest of a waiting loop takes at most: reading the time-stamp counter or a register, and comparing."""

_KEPT: Final = (Gpr.RBX, Gpr.RSP, Gpr.RBP, Gpr.R12, Gpr.R13, Gpr.R14, Gpr.R15)


@define(slots=True)
class Spin:
    """The loop in which the processor executes PAUSE, if it is one.

    ``rip`` is where, ``registers`` are those that the loop does not change (a loop may read clock and memory into the
    others), ``ended`` is the tick at which the last PAUSE ended, and ``ticks`` what it took.
    """

    rip: int = 0
    registers: tuple[int, ...] = ()
    ended: int = 0
    ticks: int = 0

    def pause(self, now: int, rip: int, gpr: Sequence[int], *, longer: bool) -> bool:
        """A PAUSE at ``rip`` begins at tick ``now`` and takes `ticks`; whether it repeats the last one.

        One that does takes ``longer`` than that.
        """
        registers = tuple([gpr[register] for register in _KEPT])
        again = rip == self.rip and registers == self.registers and now - self.ended <= ITERATION_TICKS
        self.rip, self.registers = rip, registers
        self.ticks = min(2 * self.ticks, LONGEST_PAUSE) if again and longer else PAUSE_TICKS
        self.ended = now + self.ticks
        return again
