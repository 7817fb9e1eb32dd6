"""The high precision event timer (HPET): a main counter of 100 MHz and three comparators.

The period is exactly 10 nanoseconds, a whole number of femtoseconds, so software converts without error. All three
timers are 64 bits wide, can be periodic and reach interrupt lines 20 to 23; there is no message-based delivery. With
legacy replacement, timers 0 and 1 drive lines 0 and 8 instead, and ``legacy_changed`` tells the board to disconnect the
8254 and the real-time clock from them.

Interpretations. An edge is the line going inactive and active again; it stays active until
the timer is reprogrammed. A timer routed to a line it cannot reach drives nothing. The comparator of a timer in
periodic mode with the period 0 matches once. Registers take aligned accesses of 4 and 8 bytes; narrower reads see the
bytes they cover, narrower writes are dropped. Writing the main counter while it runs, which is undefined, sets it.

Threats: the guest chooses comparators and periods down to one count. A late look skips missed periods by arithmetic; a
level interrupt that waits for software is no deadline.

Spec: IA-PC HPET Specification, "Hardware Overview".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attrs import define, field

from vtx.devices.clock import Clock, Oscillator
from vtx.devices.ports import InterruptLine

FREQUENCY = 100_000_000
PERIOD_FEMTOSECONDS = 10**15 // FREQUENCY
TIMERS = 3
ROUTES = 0x00F0_0000
LEGACY_LINES = (0, 8)
MASK32 = (1 << 32) - 1
MASK64 = (1 << 64) - 1

CAPABILITIES, CONFIGURATION, STATUS, MAIN_COUNTER = 0x000, 0x010, 0x020, 0x0F0
FIRST_TIMER, TIMER_STRIDE = 0x100, 0x20
ENABLE = 1 << 0
LEGACY_REPLACEMENT = 1 << 1
VENDOR, REVISION = 0x8086, 1
CAPABILITY_VALUE = PERIOD_FEMTOSECONDS << 32 | VENDOR << 16 | 1 << 15 | 1 << 13 | TIMERS - 1 << 8 | REVISION


class TimerBits:
    """Configuration and capability bits of a timer; 13:9 are the route, 63:32 the routes it can take."""

    LEVEL_TRIGGERED = 1 << 1
    INTERRUPT = 1 << 2
    PERIODIC = 1 << 3
    CAN_BE_PERIODIC = 1 << 4
    IS_64_BITS = 1 << 5
    SET_ACCUMULATOR = 1 << 6
    FORCE_32_BITS = 1 << 8
    WRITABLE = LEVEL_TRIGGERED | INTERRUPT | PERIODIC | SET_ACCUMULATOR | FORCE_32_BITS | 0x3E00
    FIXED = CAN_BE_PERIODIC | IS_64_BITS | ROUTES << 32


@define(slots=True)
class TimerState:
    """One comparator. ``active`` tells that an edge left its line active."""

    configuration: int = TimerBits.FIXED
    comparator: int = MASK64
    period: int = 0
    active: bool = False


@define(slots=True)
class HpetState:
    """Everything a snapshot needs.

    ``counter`` is the main counter at pulse ``since`` of its clock; while disabled it does not move. ``lines`` has a
    bit for each line driven active.
    """

    configuration: int = 0
    status: int = 0
    counter: int = 0
    since: int = 0
    lines: int = 0
    timers: list[TimerState] = field(factory=lambda: [TimerState() for _ in range(TIMERS)])


class Hpet:
    """The device; ``lines`` are the board's interrupt lines by number."""

    def __init__(
        self,
        clock: Clock,
        tick_frequency: int,
        lines: Sequence[InterruptLine],
        legacy_changed: Callable[[bool], None] = lambda replaced: None,
    ) -> None:
        self.state = HpetState()
        self._clock = clock
        self._oscillator = Oscillator(FREQUENCY, tick_frequency)
        self._lines = tuple(lines)
        self._legacy_changed = legacy_changed

    @property
    def enabled(self) -> bool:
        """Whether the main counter runs and interrupts are sent."""
        return bool(self.state.configuration & ENABLE)

    @property
    def replaces_legacy(self) -> bool:
        """Whether timers 0 and 1 have taken over the lines of the 8254 and the real-time clock."""
        return bool(self.state.configuration & LEGACY_REPLACEMENT)

    def mmio_read(self, offset: int, size: int) -> int:
        """Read registers; zero where there is none."""
        self.advance(self._clock.now())
        return self._read(offset & ~7) >> 8 * (offset & 7) & (1 << 8 * size) - 1

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """Write a register or half of one."""
        if size < 4 or offset % size:
            return
        self.advance(self._clock.now())
        shift = 8 * (offset & 7)
        mask = (1 << 8 * size) - 1 << shift
        self._write(offset & ~7, value << shift & mask, mask)
        self._drive_lines()

    def routed_to(self, number: int) -> int | None:
        """The line timer ``number`` drives, None for none."""
        if self.replaces_legacy and number < len(LEGACY_LINES):
            return LEGACY_LINES[number]
        route = self.state.timers[number].configuration >> 9 & 0x1F
        return route if ROUTES >> route & 1 else None

    def next_deadline(self, is_heard: Callable[[int], bool] = lambda line: True) -> int | None:
        """The tick at which a timer next interrupts on a line for which ``is_heard`` holds, or None."""
        if not self.enabled:
            return None
        waits = [
            self._pulses_to_match(timer)
            for number, timer in enumerate(self.state.timers)
            if timer.configuration & TimerBits.INTERRUPT
            and not self.state.status >> number & 1
            and (line := self.routed_to(number)) is not None
            and is_heard(line)
        ]
        return self._oscillator.tick_of(self.state.since + min(waits)) if waits else None

    def advance(self, now: int) -> None:
        """Count up to tick ``now``; each timer that matched meanwhile interrupts once."""
        state = self.state
        pulse = self._oscillator.edges(now)
        pulses, state.since = pulse - state.since, max(pulse, state.since)
        if not self.enabled or pulses <= 0:
            return
        for number, timer in enumerate(state.timers):
            wait = self._pulses_to_match(timer)
            if wait <= pulses:
                self._match(number, timer, pulses - wait)
        state.counter = (state.counter + pulses) & MASK64

    def _pulses_to_match(self, timer: TimerState) -> int:
        """Pulses until the main counter next equals the comparator, at least one."""
        mask = _width(timer)
        return (timer.comparator - self.state.counter - 1 & mask) + 1

    def _match(self, number: int, timer: TimerState, pulses_ago: int) -> None:
        if timer.configuration & TimerBits.PERIODIC and timer.period:
            periods = pulses_ago // timer.period + 1
            timer.comparator = timer.comparator + periods * timer.period & _width(timer)
        if timer.configuration & TimerBits.LEVEL_TRIGGERED:
            self.state.status |= 1 << number
        elif timer.configuration & TimerBits.INTERRUPT:
            timer.active = False
            self._drive_lines()
            timer.active = True
        self._drive_lines()

    def _drive_lines(self) -> None:
        """Drive every line as timers and status demand."""
        state = self.state
        wanted = 0
        for number, timer in enumerate(state.timers):
            line = self.routed_to(number)
            level_triggered = timer.configuration & TimerBits.LEVEL_TRIGGERED
            requests = state.status >> number & 1 if level_triggered else timer.active
            if requests and timer.configuration & TimerBits.INTERRUPT and self.enabled and line is not None:
                wanted |= 1 << line
        changed, state.lines = wanted ^ state.lines, wanted
        for number, drive in enumerate(self._lines):
            if changed >> number & 1:
                drive(bool(wanted >> number & 1))

    def _read(self, register: int) -> int:
        state = self.state
        match register:
            case 0x000:  # CAPABILITIES
                return CAPABILITY_VALUE
            case 0x010:  # CONFIGURATION
                return state.configuration
            case 0x020:  # STATUS
                return state.status
            case 0x0F0:  # MAIN_COUNTER
                return state.counter
        number, which = divmod(register - FIRST_TIMER, TIMER_STRIDE)
        if not 0 <= number < TIMERS:
            return 0
        timer = state.timers[number]
        return timer.configuration if which == 0 else timer.comparator if which == 8 else 0

    def _write(self, register: int, value: int, mask: int) -> None:
        """Change the bits of ``mask`` of a register to ``value``."""
        state = self.state
        if register == CONFIGURATION:
            old = state.configuration
            state.configuration = (old & ~mask | value) & (ENABLE | LEGACY_REPLACEMENT)
            if (old ^ state.configuration) & LEGACY_REPLACEMENT:
                self._drive_lines()
                self._legacy_changed(self.replaces_legacy)
        elif register == STATUS:
            state.status &= ~value
        elif register == MAIN_COUNTER:
            state.counter = state.counter & ~mask | value
        number, which = divmod(register - FIRST_TIMER, TIMER_STRIDE)
        if not 0 <= number < TIMERS:
            return
        timer = state.timers[number]
        if which == 0:
            self._configure(number, timer, timer.configuration & ~mask | value)
        elif which == 8:
            _set_comparator(timer, value, mask)

    def _configure(self, number: int, timer: TimerState, value: int) -> None:
        old = timer.configuration
        timer.configuration = value & TimerBits.WRITABLE | TimerBits.FIXED
        if (old ^ timer.configuration) & TimerBits.LEVEL_TRIGGERED or not value & TimerBits.INTERRUPT:
            timer.active = False
        if not timer.configuration & TimerBits.LEVEL_TRIGGERED:
            self.state.status &= ~(1 << number)
        if timer.configuration & TimerBits.FORCE_32_BITS:
            timer.comparator &= MASK32
            timer.period &= MASK32


def _width(timer: TimerState) -> int:
    return MASK32 if timer.configuration & TimerBits.FORCE_32_BITS else MASK64


def _set_comparator(timer: TimerState, value: int, mask: int) -> None:
    """In periodic mode a write sets the period, and the comparator only just after SET_ACCUMULATOR was set."""
    width = _width(timer)
    periodic = timer.configuration & TimerBits.PERIODIC
    if not periodic or timer.configuration & TimerBits.SET_ACCUMULATOR:
        timer.comparator = (timer.comparator & ~mask | value) & width
    if periodic:
        timer.period = (timer.period & ~mask | value) & width
    # Setting the comparator ends with the write of its lower half; in 32-bit writes the upper half comes first.
    if mask & MASK32:
        timer.configuration &= ~TimerBits.SET_ACCUMULATOR
