"""The fixed ACPI hardware: PM1 event and control registers and the power management timer.

Offsets 0 and 2 are PM1 status and enable, 4 is PM1 control, 8 the timer: 32 bits at 3.579545 MHz. The machine is always
in ACPI mode. Its one event besides the timer's carry is the power button, `press_power_button`; that of the real-time
clock can be enabled and never happens. Sleep type 5 with sleep enable calls ``power_off``; other sleep types are not
entered, the bits read as written.

Threats: the guest chooses every bit. The timer is arithmetic; powering off is the guest's to ask.

Spec: ACPI Specification, "ACPI Register Model", "Power Management Timer", "PM1 Control Registers".
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import define

from vtx.devices.clock import Clock, Oscillator
from vtx.devices.ports import InterruptLine, read_as_bytes, unconnected, write_as_bytes

FREQUENCY = 3_579_545
TIMER_BITS = 32
HALF_RANGE = 1 << TIMER_BITS - 1
STATUS, ENABLE, CONTROL, TIMER, SIZE = 0x0, 0x2, 0x4, 0x8, 0xC
SOFT_OFF = 5


class Pm1Event:
    """Bits of PM1 status and enable."""

    TIMER = 1 << 0
    GLOBAL = 1 << 5
    POWER_BUTTON = 1 << 8
    REAL_TIME_CLOCK = 1 << 10
    ALL = TIMER | GLOBAL | POWER_BUTTON | REAL_TIME_CLOCK


class Pm1Control:
    """Bits of PM1 control; 12:10 are the sleep type."""

    SCI_ENABLE = 1 << 0
    SLEEP_ENABLE = 1 << 13
    WRITABLE = 0x1C02


@define(slots=True)
class AcpiPmState:
    """Everything a snapshot needs; ``seen`` is the latest pulse of the timer accounted for."""

    status: int = 0
    enable: int = 0
    control: int = 0
    seen: int = 0
    line_level: bool = False


class AcpiPm:
    """The device; ``line`` is the system control interrupt."""

    def __init__(
        self,
        clock: Clock,
        tick_frequency: int,
        line: InterruptLine = unconnected,
        power_off: Callable[[], None] = lambda: None,
    ) -> None:
        self.state = AcpiPmState()
        self._clock = clock
        self._oscillator = Oscillator(FREQUENCY, tick_frequency)
        self._line = line
        self._power_off = power_off

    def port_read(self, offset: int, size: int) -> int:
        """Read registers, byte by byte."""
        self.advance(self._clock.now())
        return read_as_bytes(self._read, offset, size)

    def port_write(self, offset: int, size: int, value: int) -> None:
        """Write registers, byte by byte."""
        self.advance(self._clock.now())
        write_as_bytes(self._write, offset, size, value)
        self._update_line()

    def reset(self) -> None:
        """No events, none enabled; the timer goes on."""
        self.advance(self._clock.now())
        self.state.status = self.state.enable = self.state.control = 0
        self._update_line()

    def press_power_button(self) -> None:
        """The user presses the power button."""
        self.state.status |= Pm1Event.POWER_BUTTON
        self._update_line()

    def next_deadline(self) -> int | None:
        """The tick at which the timer's carry next interrupts, or None."""
        state = self.state
        if not state.enable & Pm1Event.TIMER or state.status & Pm1Event.TIMER:
            return None
        return self._oscillator.tick_of((state.seen // HALF_RANGE + 1) * HALF_RANGE)

    def advance(self, now: int) -> None:
        """Note a change of the timer's highest bit."""
        state = self.state
        pulse = self._oscillator.edges(now)
        if pulse // HALF_RANGE > state.seen // HALF_RANGE:
            state.status |= Pm1Event.TIMER
        state.seen = max(pulse, state.seen)
        self._update_line()

    def _update_line(self) -> None:
        state = self.state
        level = bool(state.status & state.enable)
        if level != state.line_level:
            state.line_level = level
            self._line(level)

    def _read(self, offset: int) -> int:
        state = self.state
        registers = state.status | state.enable << 16 | (state.control | Pm1Control.SCI_ENABLE) << 32
        registers |= (state.seen & (1 << TIMER_BITS) - 1) << 8 * TIMER
        return registers >> 8 * offset & 0xFF if offset < SIZE else 0xFF

    def _write(self, offset: int, value: int) -> None:
        state = self.state
        placed, lane = value << 8 * (offset & 1), 0xFF << 8 * (offset & 1)
        match offset & ~1:
            case 0x0:  # STATUS: ones clear
                state.status &= ~placed
            case 0x2:  # ENABLE
                state.enable = (state.enable & ~lane | placed) & Pm1Event.ALL
            case 0x4:  # CONTROL; sleep enable is a command, it reads as zero
                state.control = (state.control & ~lane | placed) & Pm1Control.WRITABLE
                if placed & Pm1Control.SLEEP_ENABLE and state.control >> 10 & 7 == SOFT_OFF:
                    self._power_off()
