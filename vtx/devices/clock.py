"""Virtual time, the only time devices know.

One tick is one increment of the machine's time-stamp counter before any guest-controlled offset. A device never
schedules anything: it names the next tick at which something would happen by itself, and the machine tells it when time
has reached that tick. Ticks never run backwards.
"""

from __future__ import annotations

from typing import Protocol

from attrs import define, frozen


class Clock(Protocol):
    """Source of virtual time."""

    def now(self) -> int:
        """Ticks since power-up; never decreases."""
        ...


class TimedDevice(Protocol):
    """A device that acts by itself as time passes."""

    def next_deadline(self) -> int | None:
        """Absolute tick at which `advance` next has an effect (possibly already past), or None."""
        ...

    def advance(self, now: int) -> None:
        """Let everything due at or before tick ``now`` happen; cheap however long ago the last call was."""
        ...


@define(slots=True)
class ManualClock:
    """A clock that is set by hand: for a machine that counts its own ticks, and for tests."""

    ticks: int = 0

    def now(self) -> int:
        """Ticks since power-up."""
        return self.ticks


@frozen
class Oscillator:
    """A clock of ``frequency`` Hz derived from ticks of ``tick_frequency`` Hz; its edge 0 is at tick 0.

    Whole numbers only: an edge is never more than one tick late, and the error does not add up.
    """

    frequency: int
    tick_frequency: int

    def edges(self, tick: int) -> int:
        """Number of the latest edge at or before ``tick``."""
        return tick * self.frequency // self.tick_frequency

    def tick_of(self, edge: int) -> int:
        """The first tick at which `edges` is ``edge``."""
        return -(-edge * self.tick_frequency // self.frequency)
