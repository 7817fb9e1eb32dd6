"""The HPET; register offsets and bits are typed from its specification."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtx.devices.clock import ManualClock
from vtx.devices.hpet import Hpet

TICKS = 2_100_000_000
PULSE = TICKS // 100_000_000  # ticks of one count
CAPABILITIES, PERIOD, CONFIGURATION, STATUS, COUNTER = 0x000, 0x004, 0x010, 0x020, 0x0F0
LEVEL, ENABLE, PERIODIC, SET_VALUE, FORCE_32 = 1 << 1, 1 << 2, 1 << 3, 1 << 6, 1 << 8


def timer(number: int) -> int:
    return 0x100 + 0x20 * number


def comparator(number: int) -> int:
    return 0x108 + 0x20 * number


def route(line: int) -> int:
    return line << 9


class Pc:
    """An HPET with what it drove; time is set in counts."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.driven: list[tuple[int, bool]] = []
        self.legacy: list[bool] = []
        lines = [self._line(number) for number in range(24)]
        self.hpet = Hpet(self.clock, TICKS, lines, self.legacy.append)

    def _line(self, number: int):  # type: ignore[no-untyped-def]
        return lambda level: self.driven.append((number, level))

    def at(self, pulse: int) -> None:
        self.clock.ticks = pulse * PULSE
        self.hpet.advance(self.clock.ticks)

    def read(self, offset: int, size: int = 8) -> int:
        return self.hpet.mmio_read(offset, size)

    def write(self, offset: int, value: int, size: int = 8) -> None:
        self.hpet.mmio_write(offset, size, value)


@pytest.fixture
def pc() -> Pc:
    return Pc()


def test_capabilities(pc: Pc) -> None:
    assert pc.read(PERIOD, 4) == 10_000_000  # femtoseconds
    assert pc.read(CAPABILITIES, 4) == 0x8086_A201
    pc.write(CAPABILITIES, 0)
    assert pc.read(CAPABILITIES) == 10_000_000 << 32 | 0x8086_A201
    assert pc.read(timer(0)) == 0x00F0_0000 << 32 | 0x30
    assert pc.read(timer(3)) == pc.read(0x30) == pc.read(0x3F8) == 0


def test_counter_runs_while_enabled(pc: Pc) -> None:
    pc.at(100)
    assert pc.read(COUNTER) == 0
    pc.write(CONFIGURATION, 1)
    pc.at(350)
    assert pc.read(COUNTER) == 250
    pc.write(CONFIGURATION, 0)
    pc.at(1000)
    assert pc.read(COUNTER) == 250
    pc.write(COUNTER, 0xFFFF_FFFF_FFFF_FFF0)
    pc.write(CONFIGURATION, 1)
    pc.at(1020)
    assert pc.read(COUNTER) == 4


def test_halves_of_registers(pc: Pc) -> None:
    pc.write(COUNTER + 4, 0x1234, 4)
    pc.write(COUNTER, 0x5678, 4)
    assert pc.read(COUNTER) == 0x1234_0000_5678
    assert pc.read(COUNTER + 4, 4) == 0x1234
    assert pc.read(COUNTER + 1, 1) == 0x56
    pc.write(COUNTER, 0xFF, 1)
    pc.write(COUNTER + 2, 0xFF, 4)
    assert pc.read(COUNTER) == 0x1234_0000_5678


def test_configuration_keeps_what_is_writable(pc: Pc) -> None:
    pc.write(CONFIGURATION, 0xFFFF_FFFF_FFFF_FFFF)
    assert pc.read(CONFIGURATION) == 3
    pc.write(timer(1), 0xFFFF_FFFF_FFFF_FFFF)
    assert pc.read(timer(1)) == 0x00F0_0000 << 32 | 0x3F7E


def test_one_shot_edge(pc: Pc) -> None:
    pc.write(CONFIGURATION, 1)
    pc.write(timer(1), ENABLE | route(21))
    pc.write(comparator(1), 500)
    assert pc.hpet.next_deadline() == 500 * PULSE
    pc.at(499)
    assert pc.driven == []
    pc.at(500)
    assert pc.driven == [(21, True)]
    assert pc.read(STATUS) == 0
    pc.write(comparator(1), 600)
    pc.at(600)
    assert pc.driven == [(21, True), (21, False), (21, True)]
    pc.write(timer(1), route(21))
    assert pc.driven[3:] == [(21, False)]


def test_level_waits_for_the_status_bit(pc: Pc) -> None:
    pc.write(CONFIGURATION, 1)
    pc.write(timer(2), ENABLE | LEVEL | PERIODIC | SET_VALUE | route(20))
    pc.write(comparator(2), 100)
    pc.at(100)
    assert pc.driven == [(20, True)]
    assert pc.read(STATUS) == 4
    assert pc.hpet.next_deadline() is None
    pc.at(200)
    pc.write(STATUS, 3)
    assert pc.driven == [(20, True)]
    pc.write(STATUS, 4)
    assert pc.driven == [(20, True), (20, False)]
    assert pc.hpet.next_deadline() == 300 * PULSE


def test_level_status_rises_without_the_enable(pc: Pc) -> None:
    pc.write(CONFIGURATION, 1)
    pc.write(timer(0), LEVEL | route(20))
    pc.write(comparator(0), 10)
    assert pc.hpet.next_deadline() is None
    pc.at(10)
    assert pc.read(STATUS) == 1
    assert pc.driven == []
    pc.write(timer(0), LEVEL | ENABLE | route(20))
    assert pc.driven == [(20, True)]


def test_periodic_as_software_programs_it(pc: Pc) -> None:
    """The comparator first, by way of the accumulator bit, then the period; 32-bit writes need a 32-bit timer."""
    pc.write(timer(0), ENABLE | PERIODIC | SET_VALUE | FORCE_32 | route(20))
    pc.write(comparator(0), 1000, 4)
    assert not pc.read(timer(0)) & SET_VALUE
    pc.write(comparator(0), 300, 4)
    pc.write(CONFIGURATION, 1)
    deadlines = []
    for _ in range(3):
        deadline = pc.hpet.next_deadline()
        assert deadline is not None
        deadlines.append(deadline // PULSE)
        pc.clock.ticks = deadline
        pc.hpet.advance(deadline)
    assert deadlines == [1000, 1300, 1600]
    assert pc.read(comparator(0)) == 1900
    assert pc.driven == [(20, True), (20, False), (20, True), (20, False), (20, True)]


def test_late_look_interrupts_once_and_stays_in_phase(pc: Pc) -> None:
    pc.write(timer(0), ENABLE | PERIODIC | SET_VALUE | route(20))
    pc.write(comparator(0), 100)
    pc.write(CONFIGURATION, 1)
    pc.at(10**12 + 50)
    assert pc.driven == [(20, True)]
    assert pc.hpet.next_deadline() == (10**12 + 100) * PULSE


def test_32_bit_timer_wraps(pc: Pc) -> None:
    pc.write(COUNTER, 0xFFFF_FFF0)
    pc.write(timer(0), ENABLE | FORCE_32 | route(20))
    pc.write(comparator(0), 0x1_0000_0004)
    pc.write(CONFIGURATION, 1)
    assert pc.read(comparator(0)) == 4
    assert pc.hpet.next_deadline() == 20 * PULSE
    pc.at(20)
    assert pc.hpet.next_deadline() == (20 + (1 << 32)) * PULSE


def test_comparator_equal_to_the_counter_matches_after_a_wrap(pc: Pc) -> None:
    pc.write(timer(0), ENABLE | FORCE_32 | route(20))
    pc.write(comparator(0), 0)
    pc.write(CONFIGURATION, 1)
    assert pc.hpet.next_deadline() == (1 << 32) * PULSE


def test_legacy_replacement(pc: Pc) -> None:
    pc.write(timer(0), ENABLE | route(23))
    pc.write(timer(1), ENABLE | route(23))
    pc.write(timer(2), ENABLE | route(23))
    for number in range(3):
        pc.write(comparator(number), 10 * number + 10)
    pc.write(CONFIGURATION, 3)
    assert pc.legacy == [True]
    pc.at(30)
    assert pc.driven == [(0, True), (8, True), (23, True)]
    pc.write(CONFIGURATION, 1)
    assert pc.legacy == [True, False]
    assert pc.driven[3:] == [(0, False), (8, False)]


def test_unreachable_route_drives_nothing(pc: Pc) -> None:
    pc.write(CONFIGURATION, 1)
    pc.write(timer(0), ENABLE | route(5))
    pc.write(comparator(0), 10)
    assert pc.hpet.next_deadline() is None
    pc.at(10)
    assert pc.driven == []


def test_shared_line_stays_active_until_the_last_timer(pc: Pc) -> None:
    pc.write(CONFIGURATION, 1)
    for number in (0, 1):
        pc.write(timer(number), ENABLE | LEVEL | route(22))
        pc.write(comparator(number), 10)
    pc.at(10)
    pc.write(STATUS, 1)
    assert pc.driven == [(22, True)]
    pc.write(STATUS, 2)
    assert pc.driven == [(22, True), (22, False)]


def test_deadline_ignores_lines_nobody_hears(pc: Pc) -> None:
    pc.write(CONFIGURATION, 1)
    for number, line in ((0, 20), (1, 21)):
        pc.write(timer(number), ENABLE | route(line))
        pc.write(comparator(number), 10 + number)
    assert pc.hpet.next_deadline(lambda line: line == 21) == 11 * PULSE
    assert pc.hpet.next_deadline(lambda line: False) is None


@settings(max_examples=200, deadline=None)
@given(
    writes=st.lists(
        st.tuples(
            st.sampled_from((CONFIGURATION, STATUS, COUNTER, *(f(n) for f in (timer, comparator) for n in range(3)))),
            st.sampled_from((0, 4)),
            st.sampled_from((1, 2, 4, 8)),
            st.integers(0, (1 << 64) - 1),
            st.integers(0, 10**12),
        ),
        max_size=30,
    )
)
def test_any_access_is_answered(writes: list[tuple[int, int, int, int, int]]) -> None:
    pc = Pc()
    for register, half, size, value, step in writes:
        pc.write(register + half, value & (1 << 8 * size) - 1, size)
        pc.clock.ticks += step
        pc.hpet.advance(pc.clock.ticks)
        deadline = pc.hpet.next_deadline()
        assert deadline is None or deadline > pc.clock.ticks
        assert 0 <= pc.read(register + half, size) < 1 << 8 * size
    for number in range(24):
        levels = [level for line, level in pc.driven if line == number]
        assert all(first != second for first, second in itertools.pairwise(levels))


def test_change_of_trigger_drops_what_the_old_one_held(pc: Pc) -> None:
    pc.write(CONFIGURATION, 1)
    for number in (1, 2):
        pc.write(timer(number), ENABLE | route(20 + number))
        pc.write(comparator(number), 10)
    pc.at(10)
    assert pc.driven == [(21, True), (22, True)]
    pc.write(timer(1), ENABLE | LEVEL | route(21))
    assert pc.driven[2:] == [(21, False)]
    pc.write(timer(1), ENABLE | route(21))
    assert len(pc.driven) == 3
    pc.write(timer(1), ENABLE | LEVEL | route(21))
    pc.write(timer(2), ENABLE | LEVEL | route(22))
    for number in (1, 2):
        pc.write(comparator(number), 20)
    pc.at(20)
    assert pc.read(STATUS) == 6
    pc.write(timer(1), ENABLE | route(21))
    assert pc.read(STATUS) == 4


def test_rewriting_a_configuration_keeps_an_edge(pc: Pc) -> None:
    pc.write(CONFIGURATION, 1)
    pc.write(timer(1), ENABLE | route(21))
    pc.write(comparator(1), 10)
    pc.at(10)
    pc.write(timer(1), ENABLE | route(21))
    assert pc.driven == [(21, True)]


def test_forcing_32_bits_cuts_the_comparator(pc: Pc) -> None:
    pc.write(comparator(0), 0x1234_0000_5678)
    pc.write(timer(0), FORCE_32)
    assert pc.read(comparator(0)) == 0x5678
