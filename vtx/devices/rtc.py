"""The MC146818 real-time clock and its CMOS RAM.

Offset 0 selects one of 128 bytes and masks NMI (bit 7), offset 1 is the byte. The clock starts at a date the machine
was given and counts virtual time from a 32768-Hz oscillator; the host's clock plays no part.

Interpretations. The update at the end of each second takes no time; update-in-progress shows for the 8 pulses (244
microseconds) before it. The divider runs in its normal setting alone; leaving its reset, the first update follows half
a second later. Daylight saving and the square-wave output do not exist, their bits are stored. The century, in CMOS
byte 32H, counts along. Registers with values that are no time count on from where they say
(`vtx.devices.rtc_calendar`). The NMI mask is a latch: what it would mask, parity and channel errors, never occurs here.

Threats: the guest sets any register. Every catch-up is arithmetic however long nobody looked, at most a few thousand
steps once; interrupts are no deadline while one of them waits to be acknowledged.

Spec: MC146818A data sheet, "Registers", "Interrupts"; ACPI Specification, "Real Time Clock Alarm".
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping

from attrs import define, field

from vtx.devices.clock import Clock, Oscillator
from vtx.devices.ports import InterruptLine, read_as_bytes, unconnected, write_as_bytes
from vtx.devices.rtc_calendar import DAY, CalendarTime

FREQUENCY = 32_768
SIZE = 128
UPDATE_PULSES = 8
MIDNIGHT_2026 = CalendarTime(second=0, minute=0, hour=0, weekday=5, day=1, month=1, year=2026)


class Cmos(enum.IntEnum):
    """Bytes with a meaning: the clock's registers, then those of a PC's firmware."""

    SECONDS = 0x00
    SECONDS_ALARM = 0x01
    MINUTES = 0x02
    MINUTES_ALARM = 0x03
    HOURS = 0x04
    HOURS_ALARM = 0x05
    WEEKDAY = 0x06
    DAY = 0x07
    MONTH = 0x08
    YEAR = 0x09
    A = 0x0A
    B = 0x0B
    C = 0x0C
    D = 0x0D
    EQUIPMENT = 0x14
    BASE_MEMORY = 0x15
    EXTENDED_MEMORY = 0x17
    EXTENDED_MEMORY_COPY = 0x30
    CENTURY = 0x32
    MEMORY_ABOVE_16M = 0x34
    MEMORY_ABOVE_4G = 0x5B


class A:
    """Register A; 6:4 are the divider, 3:0 the rate of the periodic interrupt."""

    UPDATE_IN_PROGRESS = 1 << 7
    DIVIDER = 0x70
    RUNNING = 0x20
    RATE = 0x0F


class B:
    """Register B; the interrupt enables are where register C has the flags."""

    SET = 1 << 7
    PERIODIC = 1 << 6
    ALARM = 1 << 5
    UPDATE = 1 << 4
    BINARY = 1 << 2
    HOURS_24 = 1 << 1


C_REQUEST = 1 << 7
D_VALID = 1 << 7
INTERRUPTS = B.PERIODIC | B.ALARM | B.UPDATE
ALARM_ANY = 0xC0
NMI_MASK = 1 << 7
PM = 1 << 7


def memory_size_bytes(low: int, high: int) -> dict[int, int]:
    """The CMOS bytes that tell of ``low`` bytes of RAM from 0 and ``high`` bytes from 4 GiB.

    Sizes too large for their field are its largest value, as firmware has it.
    """
    extended = min(max(low - (1 << 20), 0) >> 10, 0xFFFF)
    above_16m = min(max(low - (16 << 20), 0) >> 16, 0xFFFF)
    fields = (
        (Cmos.BASE_MEMORY, 2, min(low >> 10, 640)),
        (Cmos.EXTENDED_MEMORY, 2, extended),
        (Cmos.EXTENDED_MEMORY_COPY, 2, extended),
        (Cmos.MEMORY_ABOVE_16M, 2, above_16m),
        (Cmos.MEMORY_ABOVE_4G, 3, min(high >> 16, 0xFF_FFFF)),
    )
    return {first + index: value >> 8 * index & 0xFF for first, size, value in fields for index in range(size)}


@define(slots=True)
class RtcState:
    """Everything a snapshot needs.

    Pulses count from power-up. ``seen`` is the latest one accounted for, ``next_update`` that of the next update, None
    while the divider is held in reset.
    """

    cmos: bytearray = field(factory=lambda: bytearray(SIZE))
    index: int = 0
    nmi_masked: bool = False
    seen: int = 0
    next_update: int | None = FREQUENCY
    line_level: bool = False


class Rtc:
    """The clock; ``line`` is its interrupt request. ``cmos`` holds initial bytes of the RAM."""

    def __init__(
        self,
        clock: Clock,
        tick_frequency: int,
        line: InterruptLine = unconnected,
        *,
        start: CalendarTime = MIDNIGHT_2026,
        cmos: Mapping[int, int] | None = None,
    ) -> None:
        self.state = RtcState()
        self._clock = clock
        self._oscillator = Oscillator(FREQUENCY, tick_frequency)
        self._line = line
        contents = self.state.cmos
        contents[Cmos.A] = A.RUNNING | 6
        contents[Cmos.B] = B.HOURS_24
        for at, value in (cmos or {}).items():
            contents[at] = value
        self._store(start)

    def port_read(self, offset: int, size: int) -> int:
        """The selected byte at offset 1; ones from the write-only index."""
        self.advance(self._clock.now())
        return read_as_bytes(self._read, offset, size)

    def port_write(self, offset: int, size: int, value: int) -> None:
        """Select a byte at offset 0, write it at offset 1."""
        self.advance(self._clock.now())
        write_as_bytes(self._write, offset, size, value)
        self._update_line()

    def reset(self) -> None:
        """The reset pin: no interrupts; the clock, the RAM and the calendar are the battery's."""
        self.advance(self._clock.now())
        self.state.cmos[Cmos.B] &= ~INTERRUPTS
        self.state.cmos[Cmos.C] = 0
        self._update_line()

    def next_deadline(self) -> int | None:
        """The tick at which the interrupt line next rises by itself, or None."""
        state, cmos = self.state, self.state.cmos
        enabled = cmos[Cmos.B] & INTERRUPTS
        if not enabled or state.next_update is None or cmos[Cmos.C] & enabled:
            return None
        pulses = []
        if enabled & B.PERIODIC and (period := self._period()):
            pulses.append(state.seen + period - (state.seen - state.next_update) % period)
        if not cmos[Cmos.B] & B.SET:
            if enabled & B.UPDATE:
                pulses.append(state.next_update)
            if enabled & B.ALARM and (seconds := self._seconds_to_alarm()):
                pulses.append(state.next_update + (seconds - 1) * FREQUENCY)
        return self._oscillator.tick_of(min(pulses)) if pulses else None

    def advance(self, now: int) -> None:
        """Count up to tick ``now`` and raise the interrupts due."""
        state, cmos = self.state, self.state.cmos
        pulse = self._oscillator.edges(now)
        first, state.seen = state.seen, max(pulse, state.seen)
        if state.next_update is None:
            return
        period = self._period()
        if period and (pulse - state.next_update) // period > (first - state.next_update) // period:
            cmos[Cmos.C] |= B.PERIODIC
        if pulse >= state.next_update:
            seconds = (pulse - state.next_update) // FREQUENCY + 1
            state.next_update += seconds * FREQUENCY
            if not cmos[Cmos.B] & B.SET:
                self._count(seconds)
        self._update_line()

    def _count(self, seconds: int) -> None:
        """The updates of ``seconds`` seconds, at least one."""
        cmos = self.state.cmos
        alarm = self._seconds_to_alarm()
        if alarm is not None and alarm <= seconds:
            cmos[Cmos.C] |= B.ALARM
        cmos[Cmos.C] |= B.UPDATE
        time = self._time()
        time.add(seconds)
        self._store(time)

    def _update_line(self) -> None:
        cmos = self.state.cmos
        level = bool(cmos[Cmos.C] & cmos[Cmos.B] & INTERRUPTS)
        cmos[Cmos.C] = cmos[Cmos.C] & INTERRUPTS | (C_REQUEST if level else 0)
        if level != self.state.line_level:
            self.state.line_level = level
            self._line(level)

    def _period(self) -> int:
        """Pulses between periodic interrupts, 0 for none; the two slowest-looking rates are fast ones."""
        rate = self.state.cmos[Cmos.A] & A.RATE
        return 1 << (rate - 1 if rate > 2 else rate + 6) if rate else 0

    # The bytes.

    def _read(self, offset: int) -> int:
        if offset != 1:
            return 0xFF
        state, index = self.state, self.state.index
        value = state.cmos[index]
        if index == Cmos.A:
            updating = (
                state.next_update is not None
                and not state.cmos[Cmos.B] & B.SET
                and state.next_update - state.seen <= UPDATE_PULSES
            )
            return value | (A.UPDATE_IN_PROGRESS if updating else 0)
        if index == Cmos.C:
            state.cmos[Cmos.C] = 0
            self._update_line()
        return D_VALID if index == Cmos.D else value

    def _write(self, offset: int, value: int) -> None:
        state = self.state
        if offset == 0:
            state.index = value & SIZE - 1
            state.nmi_masked = bool(value & NMI_MASK)
        elif offset == 1 and state.index == Cmos.A:
            self._control_divider(value)
        elif offset == 1 and state.index == Cmos.B:
            # Setting the time ends what announced its updates.
            state.cmos[Cmos.B] = value & ~B.UPDATE if value & B.SET else value
        elif offset == 1 and state.index not in (Cmos.C, Cmos.D):
            state.cmos[state.index] = value

    def _control_divider(self, value: int) -> None:
        state = self.state
        state.cmos[Cmos.A] = value & ~A.UPDATE_IN_PROGRESS
        if value & A.DIVIDER != A.RUNNING:
            state.next_update = None
        elif state.next_update is None:
            state.next_update = state.seen + FREQUENCY // 2

    # The time in the registers.

    def _decode(self, value: int) -> int:
        return value if self.state.cmos[Cmos.B] & B.BINARY else (value >> 4) * 10 + (value & 0xF)

    def _encode(self, value: int) -> int:
        value %= 100
        return value if self.state.cmos[Cmos.B] & B.BINARY else value // 10 << 4 | value % 10

    def _decode_hour(self, value: int) -> int:
        if self.state.cmos[Cmos.B] & B.HOURS_24:
            return self._decode(value)
        return self._decode(value & ~PM) % 12 + (12 if value & PM else 0)

    def _encode_hour(self, hour: int) -> int:
        if self.state.cmos[Cmos.B] & B.HOURS_24:
            return self._encode(hour)
        return self._encode((hour - 1) % 12 + 1) | (PM if hour >= 12 else 0)

    def _time(self) -> CalendarTime:
        cmos, decode = self.state.cmos, self._decode
        return CalendarTime(
            decode(cmos[Cmos.SECONDS]),
            decode(cmos[Cmos.MINUTES]),
            self._decode_hour(cmos[Cmos.HOURS]),
            decode(cmos[Cmos.WEEKDAY]),
            decode(cmos[Cmos.DAY]),
            decode(cmos[Cmos.MONTH]),
            100 * _from_bcd(cmos[Cmos.CENTURY]) + decode(cmos[Cmos.YEAR]),
        )

    def _store(self, time: CalendarTime) -> None:
        cmos, encode = self.state.cmos, self._encode
        cmos[Cmos.SECONDS] = encode(time.second)
        cmos[Cmos.MINUTES] = encode(time.minute)
        cmos[Cmos.HOURS] = self._encode_hour(time.hour)
        cmos[Cmos.WEEKDAY] = encode(time.weekday)
        cmos[Cmos.DAY] = encode(time.day)
        cmos[Cmos.MONTH] = encode(time.month)
        cmos[Cmos.YEAR] = encode(time.year)
        century = time.year // 100 % 100
        cmos[Cmos.CENTURY] = century // 10 << 4 | century % 10

    def _seconds_to_alarm(self) -> int | None:
        """Seconds from the time in the registers to the next that matches the alarm, 1 to a day; None for never."""
        cmos = self.state.cmos
        hours = _matching(cmos[Cmos.HOURS_ALARM], 24, self._encode_hour)
        minutes = _matching(cmos[Cmos.MINUTES_ALARM], 60, self._encode)
        seconds = _matching(cmos[Cmos.SECONDS_ALARM], 60, self._encode)
        now = self._time().second_of_day
        waits = [
            (hour * 3600 + minute * 60 + second - now - 1) % DAY + 1
            for hour in _candidates(hours, (now + 1) // 3600 % 24)
            for minute in _candidates(minutes, (now + 1) // 60 % 60)
            for second in _candidates(seconds, (now + 1) % 60)
        ]
        return min(waits, default=None)


def _matching(alarm: int, count: int, encode: Callable[[int], int]) -> range:
    """The values below ``count`` that an alarm byte matches; the chip compares the bytes as they are stored."""
    if alarm & ALARM_ANY == ALARM_ANY:
        return range(count)
    return next((range(value, value + 1) for value in range(count) if encode(value) == alarm), range(0))


def _candidates(values: range, current: int) -> list[int]:
    """Those of ``values``, one or all of them, that the next match can have: this one, the next, or the first."""
    return [value for value in (values.start, current, current + 1) if value in values]


def _from_bcd(value: int) -> int:
    return (value >> 4) * 10 + (value & 0xF)
