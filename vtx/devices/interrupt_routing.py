"""The board's interrupt request lines: who drives each, and the two controllers it leads to.

A line can have several drivers; it is active while one of them is. Lines 0 to 15 are the ISA interrupts: each leads to
an input of the 8259 pair and to the I/O APIC input of the same number, but line 0 (the timer) to I/O APIC input 2 and
line 2 (the cascade of the 8259s) nowhere. Lines 16 to 23 lead to the I/O APIC alone.

Threats: none of its own; the number of drivers is fixed when the machine is built.

Spec: MultiProcessor Specification, "I/O Interrupt Assignment Entries"; ACPI Specification, "Interrupt Source Override
Structure".
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from attrs import define, field

from vtx.devices.io_apic import PINS, IoApic
from vtx.devices.pic import CASCADE_INPUT, PicPair
from vtx.devices.ports import InterruptLine
from vtx.pc_map import TIMER_IRQ, TIMER_PIN

ISA_LINES = 16


class Hearing(enum.Enum):
    """Whether a request on a line would change anything.

    WAITING: not before a processor takes the request that waits already.
    """

    NONE = enum.auto()
    WAITING = enum.auto()
    OPEN = enum.auto()


@define(slots=True)
class LinesState:
    """For each line the drivers that assert it, one bit each."""

    asserted: list[int] = field(factory=lambda: [0] * PINS)


class InterruptLines:
    """The 24 lines in front of ``pic`` and ``io_apic``."""

    def __init__(self, pic: PicPair, io_apic: IoApic) -> None:
        self.state = LinesState()
        self._pic = pic
        self._io_apic = io_apic
        self._drivers = [0] * PINS
        self._targets = [self._targets_of(number) for number in range(PINS)]

    def driver(self, number: int) -> InterruptLine:
        """A new driver of line ``number``, 0 to 23."""
        bit = 1 << self._drivers[number]
        self._drivers[number] += 1

        def drive(level: bool) -> None:
            asserted = self.state.asserted
            before = asserted[number]
            asserted[number] = before | bit if level else before & ~bit
            if bool(before) != bool(asserted[number]):
                for target in self._targets[number]:
                    target(level)

        return drive

    def hearing(self, number: int) -> Hearing:
        """What a request on line ``number`` would lead to now."""
        hearing = Hearing.NONE
        if number == CASCADE_INPUT:
            return hearing
        if number < ISA_LINES and not self._pic.masks(number):
            if not self._pic.requests(number):
                return Hearing.OPEN
            hearing = Hearing.WAITING
        pin = TIMER_PIN if number == TIMER_IRQ else number
        if not self._io_apic.masks(pin):
            return Hearing.WAITING if self._io_apic.is_requested(pin) else Hearing.OPEN
        return hearing

    def _targets_of(self, number: int) -> tuple[Callable[[bool], None], ...]:
        if number == CASCADE_INPUT:
            return ()
        pin = self._io_apic.line(TIMER_PIN if number == TIMER_IRQ else number)
        return (self._pic.line(number), pin) if number < ISA_LINES else (pin,)


@define(slots=True)
class SwitchState:
    """What drives the switch, and whether it lets that through."""

    level: bool = False
    closed: bool = True


class LineSwitch:
    """Connects a driver to ``line`` while closed; an open switch leaves the line inactive."""

    def __init__(self, line: InterruptLine) -> None:
        self.state = SwitchState()
        self._line = line

    def drive(self, level: bool) -> None:
        """The driver's side, an `InterruptLine`."""
        self.state.level = level
        if self.state.closed:
            self._line(level)

    def close(self, closed: bool) -> None:
        """Connect or disconnect."""
        if closed != self.state.closed:
            self.state.closed = closed
            self._line(closed and self.state.level)
