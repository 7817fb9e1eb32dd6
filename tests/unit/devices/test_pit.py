"""The 8254 as software and the board see it: control words, latches, byte order, the interrupt line, port 61H."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtx.devices.clock import ManualClock, Oscillator
from vtx.devices.pit import Pit8254, SystemControlPort

HZ = 1_193_182
TICKS = 2_100_000_000
CONTROL = 3


class Pc:
    """A timer with its line; time is set in pulses of the timer's clock."""

    def __init__(self, frequency: int = TICKS) -> None:
        self.clock = ManualClock()
        self.levels: list[bool] = []
        self.pit = Pit8254(self.clock, frequency, self.levels.append)
        self.port_b = SystemControlPort(self.pit)
        self.frequency = frequency

    def at(self, pulse: int) -> None:
        self.clock.ticks = -(-pulse * self.frequency // HZ)
        self.pit.advance(self.clock.ticks)

    def control(self, word: int) -> None:
        self.pit.port_write(CONTROL, 1, word)

    def write(self, counter: int, *values: int) -> None:
        for value in values:
            self.pit.port_write(counter, 1, value)

    def read(self, counter: int) -> int:
        return self.pit.port_read(counter, 1)


@pytest.fixture
def pc() -> Pc:
    return Pc()


@given(frequency=st.integers(1_000_000, 10**10), edge=st.integers(0, 10**12))
def test_oscillator_is_exact(frequency: int, edge: int) -> None:
    oscillator = Oscillator(HZ, frequency)
    tick = oscillator.tick_of(edge)
    assert Fraction(edge, HZ) <= Fraction(tick, frequency)
    assert tick == 0 or Fraction(tick - 1, frequency) < Fraction(edge, HZ)
    assert oscillator.edges(tick) >= edge
    assert tick == 0 or oscillator.edges(tick - 1) < edge


def test_low_byte_then_high_byte(pc: Pc) -> None:
    pc.control(0x30)
    pc.write(0, 0x34)
    pc.at(5)
    pc.write(0, 0x12)
    pc.at(6)
    assert (pc.read(0), pc.read(0)) == (0x34, 0x12)
    pc.at(7)
    assert (pc.read(0), pc.read(0)) == (0x33, 0x12)


def test_single_byte_access(pc: Pc) -> None:
    pc.control(0x10)  # counter 0, low byte, mode 0
    pc.write(0, 9)
    pc.control(0x60)  # counter 1, high byte, mode 0
    pc.write(1, 2)
    pc.at(1)
    assert [pc.read(0), pc.read(0)] == [9, 9]
    assert [pc.read(1), pc.read(1)] == [2, 2]
    pc.at(2)
    assert pc.read(1) == 1


def test_latch_holds_the_count_until_it_is_read(pc: Pc) -> None:
    pc.control(0x30)
    pc.write(0, 0x00, 0x10)
    pc.at(1)
    pc.control(0x00)
    pc.at(0x300)
    pc.control(0x00)  # a second latch command changes nothing
    assert (pc.read(0), pc.read(0)) == (0x00, 0x10)
    assert (pc.read(0), pc.read(0)) == (0x01, 0x0D)


def test_read_back_of_status_and_count(pc: Pc) -> None:
    pc.control(0x36)
    pc.control(0xE2)  # status of counter 0
    assert pc.read(0) == 0xC0 | 0x30 | 3 << 1  # output high, null count
    pc.write(0, 0x10, 0x00)
    pc.at(1)
    pc.control(0xC2)  # both
    pc.at(3)
    assert pc.read(0) == 0x80 | 0x30 | 3 << 1
    assert (pc.read(0), pc.read(0)) == (0x10, 0)
    assert (pc.read(0), pc.read(0)) == (0x0C, 0)


def test_read_back_of_the_count_alone(pc: Pc) -> None:
    pc.control(0x30)
    pc.write(0, 0x10, 0x00)
    pc.at(1)
    pc.control(0xD2)
    pc.at(5)
    assert (pc.read(0), pc.read(0)) == (0x10, 0)
    assert (pc.read(0), pc.read(0)) == (0x0C, 0)


def test_read_back_of_several_counters(pc: Pc) -> None:
    pc.control(0x50)
    pc.control(0x90)
    pc.control(0xEC)  # status of counters 1 and 2
    assert (pc.read(1), pc.read(2)) == (0x50, 0x50)


def test_status_tells_the_decimal_flag_and_normal_modes(pc: Pc) -> None:
    pc.control(0x3D)  # counter 0, both bytes, mode 6 which is mode 2, decimal
    pc.control(0xE2)
    assert pc.read(0) == 0xC0 | 0x30 | 2 << 1 | 1


def test_control_word_empties_the_latches_and_byte_order(pc: Pc) -> None:
    pc.control(0x30)
    pc.write(0, 0x34)
    pc.control(0x00)
    pc.control(0x30)
    pc.write(0, 0x78, 0x56)
    pc.at(1)
    assert (pc.read(0), pc.read(0)) == (0x78, 0x56)


def test_control_port_reads_as_ones(pc: Pc) -> None:
    assert pc.read(CONTROL) == 0xFF
    pc.write(7, 1)
    assert pc.read(7) == 0xFF


def test_rate_generator_interrupts_at_its_rate(pc: Pc) -> None:
    """1000 Hz as DOS programs ask for it: 1193 pulses, exact to the tick over a minute."""
    pc.control(0x34)
    pc.write(0, 1193 & 0xFF, 1193 >> 8)
    edges = []
    while len(edges) < 3:
        deadline = pc.pit.next_deadline()
        assert deadline is not None
        pc.clock.ticks = deadline
        before = len(pc.levels)
        pc.pit.advance(deadline)
        assert len(pc.levels) == before + 1
        if pc.levels[-1]:
            edges.append(deadline)
    assert edges == [-(-(1 + 1193 * n) * TICKS // HZ) for n in (1, 2, 3)]


def test_square_wave_of_the_firmware(pc: Pc) -> None:
    pc.control(0x36)
    pc.write(0, 0, 0)
    assert pc.levels == [True]
    pc.at(32768)
    assert pc.levels == [True]
    pc.at(32769)
    assert pc.levels == [True, False]
    pc.at(65537)
    assert pc.levels == [True, False, True]


@pytest.mark.parametrize("periods", [1, 2, 1000, 10**9])
def test_a_late_look_shows_one_edge(pc: Pc, periods: int) -> None:
    pc.control(0x34)
    pc.write(0, 100, 0)
    pc.levels.clear()
    pc.at(1 + 100 * periods + 50)
    assert pc.levels == [False, True]


def test_terminal_count_interrupts_once(pc: Pc) -> None:
    pc.control(0x30)
    pc.write(0, 10, 0)
    assert pc.pit.next_deadline() == -(-11 * TICKS // HZ)
    pc.at(11)
    assert pc.levels == [True]
    assert pc.pit.next_deadline() is None
    pc.write(0, 10)
    assert pc.levels == [True, False]


def test_mode_change_drives_the_line_at_once(pc: Pc) -> None:
    pc.control(0x34)
    assert pc.levels == [True]
    pc.control(0x30)
    assert pc.levels == [True, False]


def test_port_b_gates_counter_2(pc: Pc) -> None:
    pc.control(0xB0)  # counter 2, both bytes, mode 0
    pc.write(2, 4, 0)
    pc.at(100)
    assert pc.port_b.port_read(0, 1) & 0x21 == 0
    pc.port_b.port_write(0, 1, 1)
    pc.at(103)
    assert pc.port_b.port_read(0, 1) & 0x21 == 0x01
    pc.at(104)
    assert pc.port_b.port_read(0, 1) & 0x21 == 0x21


def test_port_b_speaker(pc: Pc) -> None:
    pc.control(0xB6)
    pc.write(2, 4, 0)
    pc.port_b.port_write(0, 1, 0x03)
    pc.at(2)
    assert pc.port_b.speaker
    pc.at(3)
    assert not pc.port_b.speaker
    pc.port_b.port_write(0, 1, 0x01)
    pc.at(5)
    assert not pc.port_b.speaker


def test_port_b_refresh_toggles_and_reads_only_what_is_writable(pc: Pc) -> None:
    pc.port_b.port_write(0, 1, 0xFE)
    pc.port_b.port_write(1, 1, 0)
    for pulse, refresh in ((0, 0), (17, 0), (18, 0x10), (35, 0x10), (36, 0), (54, 0x10)):
        pc.at(pulse)
        assert pc.port_b.port_read(0, 1) & 0xDF == 0x0E | refresh
    assert pc.port_b.port_read(0, 2) >> 8 == 0xFF


@settings(max_examples=200, deadline=None)
@given(
    accesses=st.lists(
        st.tuples(st.booleans(), st.integers(0, 5), st.sampled_from((1, 2, 4)), st.integers(0, 2**32 - 1)), max_size=40
    ),
    step=st.integers(0, 10**9),
)
def test_any_access_is_answered(accesses: list[tuple[bool, int, int, int]], step: int) -> None:
    pc = Pc()
    for write, offset, size, value in accesses:
        pc.clock.ticks += step
        if write:
            pc.pit.port_write(offset, size, value)
        else:
            assert 0 <= pc.pit.port_read(offset, size) < 1 << 8 * size
        pc.port_b.port_write(0, 1, value & 0xFF)
        pc.pit.advance(pc.clock.ticks)
        deadline = pc.pit.next_deadline()
        assert deadline is None or deadline > pc.clock.ticks
