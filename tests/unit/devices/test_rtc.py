"""The real-time clock; its dates are checked against the calendar of the standard library."""

import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtx.devices.clock import ManualClock
from vtx.devices.rtc import Rtc, memory_size_bytes
from vtx.devices.rtc_calendar import CalendarTime, days_in_month

TICKS = 2_100_000_000
SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
WEEKDAY, DAY, MONTH, YEAR, A, B, C, D, CENTURY = 6, 7, 8, 9, 10, 11, 12, 13, 0x32
SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
MIB, GIB = 1 << 20, 1 << 30


def calendar(moment: datetime.datetime) -> CalendarTime:
    return CalendarTime(
        moment.second,
        moment.minute,
        moment.hour,
        moment.isoweekday() % 7 + 1,
        moment.day,
        moment.month,
        moment.year,
    )


class Pc:
    """A clock with its line; time is set in seconds."""

    def __init__(self, start: datetime.datetime = datetime.datetime(2026, 1, 1)) -> None:
        self.clock = ManualClock()
        self.levels: list[bool] = []
        self.rtc = Rtc(self.clock, TICKS, self.levels.append, start=calendar(start))

    def at(self, seconds: float) -> None:
        self.clock.ticks = round(seconds * TICKS)

    def read(self, index: int) -> int:
        self.rtc.port_write(0, 1, index)
        return self.rtc.port_read(1, 1)

    def write(self, index: int, value: int) -> None:
        self.rtc.port_write(0, 1, index)
        self.rtc.port_write(1, 1, value)

    def time(self) -> str:
        """As BCD registers show it."""
        return "{:02x}{:02x}-{:02x}-{:02x} {:02x}:{:02x}:{:02x}".format(
            *(self.read(index) for index in (CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS))
        )

    @property
    def line(self) -> bool:
        return bool(self.levels) and self.levels[-1]


@pytest.fixture
def pc() -> Pc:
    return Pc()


def test_starts_at_its_date_and_runs_by_virtual_time(pc: Pc) -> None:
    assert pc.time() == "2026-01-01 00:00:00"
    assert pc.read(WEEKDAY) == 5  # a Thursday
    pc.at(0.999)
    assert pc.time() == "2026-01-01 00:00:00"
    pc.at(1)
    assert pc.time() == "2026-01-01 00:00:01"
    pc.at(86400 * 31 + 3 * 3600 + 25 * 60 + 45)
    assert pc.time() == "2026-02-01 03:25:45"


@given(
    start=st.datetimes(datetime.datetime(1970, 1, 1), datetime.datetime(2900, 1, 1)),
    steps=st.lists(st.integers(0, 3 * 10**9), max_size=4),
)
def test_calendar_agrees_with_the_standard_library(start: datetime.datetime, steps: list[int]) -> None:
    time = calendar(start)
    moment = start.replace(microsecond=0)
    for step in steps:
        time.add(step)
        moment += datetime.timedelta(seconds=step)
    assert time == calendar(moment)


def test_calendar_over_centuries() -> None:
    start, end = datetime.datetime(1600, 2, 29, 1, 2, 3), datetime.datetime(9600, 2, 29, 1, 2, 4)
    time = calendar(start)
    time.add((end - start) // datetime.timedelta(seconds=1))
    assert time == calendar(end)


def test_leap_years() -> None:
    assert [days_in_month(year, 2) for year in (1900, 2000, 2023, 2024, 2100)] == [28, 29, 28, 29, 28]


def test_reset_registers(pc: Pc) -> None:
    assert [pc.read(index) for index in (A, B, C, D)] == [0x26, 0x02, 0, 0x80]
    pc.write(C, 0xFF)
    pc.write(D, 0)
    assert (pc.read(C), pc.read(D)) == (0, 0x80)


def test_binary_and_12_hours() -> None:
    pc = Pc(datetime.datetime(1999, 12, 31, 23, 59, 59))
    pc.write(B, SET | BINARY)
    for index, value in ((HOURS, 0x80 | 11), (MINUTES, 59), (SECONDS, 59), (DAY, 31), (MONTH, 12), (YEAR, 99)):
        pc.write(index, value)
    pc.write(B, BINARY)
    pc.at(1)
    assert [pc.read(index) for index in (CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS)] == [
        0x20,
        0,
        1,
        1,
        12,
        0,
        0,
    ]
    pc.at(1 + 12 * 3600)
    assert pc.read(HOURS) == 0x80 | 12
    pc.at(1 + 13 * 3600)
    assert pc.read(HOURS) == 0x80 | 1


@pytest.mark.parametrize(("hour", "shown"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)])
def test_12_hour_encoding_in_bcd(hour: int, shown: int) -> None:
    pc = Pc(datetime.datetime(2026, 1, 1, (hour - 1) % 24, 59, 59))
    pc.write(B, SET)
    before = (hour - 1) % 24
    pc.write(HOURS, ((before - 1) % 12 + 1) // 10 << 4 | ((before - 1) % 12 + 1) % 10 | (0x80 if before >= 12 else 0))
    pc.write(B, 0)
    pc.at(1)
    assert pc.read(HOURS) == shown


def test_set_stops_the_time_and_the_update_interrupt(pc: Pc) -> None:
    pc.write(B, H24 | UIE)
    pc.write(B, H24 | UIE | SET)
    assert pc.read(B) == H24 | SET
    pc.write(SECONDS, 0x30)
    pc.at(10.5)
    assert pc.read(SECONDS) == 0x30
    assert not pc.read(C) & 0x10
    pc.write(B, H24)
    pc.at(11)
    assert pc.read(SECONDS) == 0x31


def test_update_in_progress_shows_before_the_update(pc: Pc) -> None:
    pc.at(1 - 0.00025)
    assert pc.read(A) == 0x26
    pc.at(1 - 0.00024)
    assert pc.read(A) == 0xA6
    pc.at(1)
    assert pc.read(A) == 0x26
    pc.write(B, H24 | SET)
    pc.at(2 - 0.0001)
    assert pc.read(A) == 0x26


def test_divider_reset_holds_the_time_and_sets_its_phase(pc: Pc) -> None:
    pc.at(0.25)
    pc.write(A, 0x70)
    pc.at(5.1)
    assert pc.read(SECONDS) == 0
    pc.write(A, 0x26)
    pc.at(5.599)
    assert pc.read(SECONDS) == 0
    pc.at(5.6001)
    assert pc.read(SECONDS) == 1
    pc.at(6.6001)
    assert pc.read(SECONDS) == 2


@pytest.mark.parametrize(
    ("rate", "hertz"), [(1, 256), (2, 128), (3, 8192), (4, 4096), (6, 1024), (8, 256), (9, 128), (15, 2)]
)
def test_periodic_interrupt(pc: Pc, rate: int, hertz: int) -> None:
    pc.write(A, 0x20 | rate)
    pc.write(B, H24 | PIE)
    for n in (1, 2, 3):
        deadline = pc.rtc.next_deadline()
        assert deadline == -(-n * TICKS // hertz)
        pc.rtc.advance(deadline - 1)
        assert not pc.line
        pc.rtc.advance(deadline)
        assert pc.line
        assert pc.rtc.next_deadline() is None
        pc.clock.ticks = deadline
        assert pc.read(C) & 0xC0 == 0xC0
        assert not pc.line


def test_flags_rise_without_their_enable(pc: Pc) -> None:
    pc.at(1.5)
    assert pc.read(C) == 0x50
    assert pc.read(C) == 0
    assert pc.levels == []
    pc.at(2)
    pc.write(B, H24 | UIE)
    assert pc.line


def test_no_rate_is_no_periodic_interrupt(pc: Pc) -> None:
    pc.write(A, 0x20)
    pc.write(B, H24 | PIE)
    assert pc.rtc.next_deadline() is None
    pc.at(0.9)
    assert pc.read(C) == 0


def test_update_interrupt(pc: Pc) -> None:
    pc.write(B, H24 | UIE)
    assert pc.rtc.next_deadline() == TICKS
    pc.at(1)
    assert pc.read(C) & 0x90 == 0x90
    assert pc.rtc.next_deadline() == 2 * TICKS


def set_alarm(pc: Pc, hour: int, minute: int, second: int) -> None:
    for index, value in ((HOURS_ALARM, hour), (MINUTES_ALARM, minute), (SECONDS_ALARM, second)):
        pc.write(index, value)
    pc.write(B, H24 | AIE)


@pytest.mark.parametrize(
    ("alarm", "seconds"),
    [
        ((0x00, 0x00, 0x05), 5),
        ((0x12, 0x34, 0x56), 12 * 3600 + 34 * 60 + 56),
        ((0x00, 0x00, 0x00), 86400),
        ((0xFF, 0xFF, 0xFF), 1),
        ((0xFF, 0xFF, 0x30), 30),
        ((0xC0, 0x10, 0x00), 600),
        ((0x03, 0xFF, 0xFF), 3 * 3600),
        ((0xFF, 0x00, 0x00), 3600),
    ],
)
def test_alarm(pc: Pc, alarm: tuple[int, int, int], seconds: int) -> None:
    set_alarm(pc, *alarm)
    assert pc.rtc.next_deadline() == seconds * TICKS
    pc.at(seconds - 0.001)
    assert not pc.read(C) & 0x20
    pc.at(seconds)
    assert pc.read(C) & 0xA0 == 0xA0


@pytest.mark.parametrize("alarm", [(0x24, 0, 0), (0, 0x60, 0), (0, 0, 0x1A), (0x80, 0, 0)])
def test_alarm_that_never_matches(pc: Pc, alarm: tuple[int, int, int]) -> None:
    set_alarm(pc, *alarm)
    assert pc.rtc.next_deadline() is None
    pc.at(86401)
    assert not pc.read(C) & 0x20


@settings(max_examples=200, deadline=None)
@given(
    start=st.integers(0, 86399),
    alarm=st.tuples(*(st.one_of(st.none(), st.integers(0, limit - 1)) for limit in (24, 60, 60))),
)
def test_next_alarm_by_search(start: int, alarm: tuple[int | None, int | None, int | None]) -> None:
    pc = Pc(datetime.datetime(2026, 1, 1) + datetime.timedelta(seconds=start))
    set_alarm(pc, *(0xFF if value is None else value // 10 << 4 | value % 10 for value in alarm))

    def matches(second: int) -> bool:
        parts = (second // 3600 % 24, second // 60 % 60, second % 60)
        return all(want is None or want == part for want, part in zip(alarm, parts, strict=True))

    expected = next(wait for wait in range(1, 86401) if matches(start + wait))
    assert pc.rtc.next_deadline() == expected * TICKS


def test_nmi_mask_and_index(pc: Pc) -> None:
    pc.rtc.port_write(0, 1, 0x80 | DAY)
    assert pc.rtc.state.nmi_masked
    assert pc.rtc.port_read(1, 1) == 0x01
    pc.rtc.port_write(0, 1, DAY)
    assert not pc.rtc.state.nmi_masked
    assert pc.rtc.port_read(0, 1) == 0xFF
    pc.rtc.port_write(0, 2, 0x5540)
    assert pc.read(0x40) == 0x55


def test_cmos_keeps_bytes(pc: Pc) -> None:
    for index in range(0x0E, 0x80):
        if index != CENTURY:
            pc.write(index, index ^ 0xA5)
    assert all(pc.read(index) == index ^ 0xA5 for index in range(0x0E, 0x80) if index != CENTURY)


@pytest.mark.parametrize(
    ("low", "high", "base", "extended", "above_16m", "above_4g"),
    [
        (128 * MIB, 0, 640, 0xFFFF, 0x0700, 0),
        (32 * MIB, 0, 640, 31 * 1024, 0x0100, 0),
        (3 * GIB, 5 * GIB, 640, 0xFFFF, 0xBF00, 0x14000),
        (512 << 10, 0, 512, 0, 0, 0),
        (3 * GIB, 1 << 40, 640, 0xFFFF, 0xBF00, 0xFFFFFF),
    ],
)
def test_memory_size(low: int, high: int, base: int, extended: int, above_16m: int, above_4g: int) -> None:
    contents = memory_size_bytes(low, high)
    rtc = Rtc(ManualClock(), TICKS, cmos=contents)

    def word(first: int, size: int = 2) -> int:
        return int.from_bytes(rtc.state.cmos[first : first + size], "little")

    assert [word(0x15), word(0x17), word(0x30), word(0x34), word(0x5B, 3)] == [
        base,
        extended,
        extended,
        above_16m,
        above_4g,
    ]


@settings(max_examples=200, deadline=None)
@given(
    writes=st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255)), max_size=30),
    step=st.integers(0, 10**13),
)
def test_any_contents_run_on(writes: list[tuple[int, int]], step: int) -> None:
    pc = Pc()
    for index, value in writes:
        pc.write(index, value)
        pc.clock.ticks += step
        deadline = pc.rtc.next_deadline()
        pc.rtc.advance(pc.clock.ticks)
        assert deadline is None or deadline > 0
        assert all(0 <= pc.read(at) <= 0xFF for at in range(14))
