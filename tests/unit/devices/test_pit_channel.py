"""A counter of the 8254 against one that really counts, pulse by pulse, as the data sheet tells it."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtx.devices.pit_channel import Counter, Mode

MODULUS = 1 << 16


@dataclass
class SteppedCounter:
    """Counts. Between pulses software writes and the gate moves; `pulse` is one falling edge of CLK."""

    mode: int = 0
    register: int = 0
    element: int = 0
    out: bool = False
    gate: bool = True
    written: bool = False
    load: bool = False
    running: bool = False
    strobe_armed: bool = False
    null: bool = True
    in_use: int = 0

    def control(self, mode: int) -> None:
        self.mode, self.out = mode, mode != 0
        self.written = self.load = self.running = self.strobe_armed = False
        self.null = True

    def write(self, count: int) -> None:
        self.register, self.written, self.null = count, True, True
        if self.mode in (0, 4) or (self.mode in (2, 3) and not self.running):
            self.load = True
        if self.mode == 0:
            self.out = False

    def set_gate(self, level: bool) -> None:
        rising, falling = level and not self.gate, self.gate and not level
        self.gate = level
        if self.mode in (1, 2, 3, 5) and rising and self.written:
            self.load = True
        if falling and self.mode in (2, 3):
            self.out = True

    def pulse(self) -> None:
        if self.mode in (4, 5):
            self.out = True
        if self.load:
            self.load, self.running, self.strobe_armed = False, True, True
            self.take_register()
            self.out = self.mode not in (0, 1)
        elif self.running and (self.gate or self.mode in (1, 5)):
            self.count()

    def take_register(self) -> None:
        self.in_use = self.element = self.register
        self.null = False
        if self.mode == 3:
            self.element &= ~1

    def count(self) -> None:
        if self.mode == 3:
            self.count_square_wave()
            return
        self.element = (self.element - 1) % MODULUS
        if self.mode == 2 and self.element == 1:
            self.out = False
        elif self.mode == 2 and self.element == 0:
            self.out = True
            self.take_register()
        elif self.element == 0 and self.mode in (0, 1):
            self.out = True
        elif self.element == 0 and self.strobe_armed:
            self.out = self.strobe_armed = False

    def count_square_wave(self) -> None:
        """By two; an odd count's high half lasts one pulse beyond zero."""
        if self.element:
            self.element -= 2
            if self.element or (self.in_use & 1 and self.out):
                return
        self.out = not self.out
        self.take_register()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("pulses"), st.integers(1, 12)),
        st.tuples(st.just("pulses"), st.integers(1, 12)),
        st.tuples(st.just("count"), st.integers(2, 9)),
        st.tuples(st.just("gate"), st.booleans()),
    ),
    max_size=30,
)


@pytest.mark.parametrize("mode", list(Mode))
@settings(max_examples=150, deadline=None)
@given(operations=OPERATIONS, gate=st.booleans())
def test_counts_as_the_chip_does(mode: Mode, operations: list[tuple[str, int]], gate: bool) -> None:
    """Output at every pulse, value once there is one, and the null-count flag."""
    counter, reference, clock = Counter(), SteppedCounter(), 0
    counter.set_gate(0, gate)
    reference.set_gate(gate)
    counter.set_mode(0, mode, False)
    reference.control(mode)
    for operation, argument in [*operations, ("pulses", 5)]:
        if operation == "count":
            counter.set_count(clock, argument)
            reference.write(argument)
        elif operation == "gate":
            counter.set_gate(clock, bool(argument))
            reference.set_gate(bool(argument))
        for _ in range(argument if operation == "pulses" else 0):
            predicted = counter.next_change(clock)
            before = reference.out
            clock += 1
            reference.pulse()
            assert counter.output(clock) == reference.out
            assert (predicted == clock) == (before != reference.out)
        assert counter.output(clock) == reference.out
        assert counter.null_count(clock) == reference.null
        if reference.running:
            assert counter.value(clock) == reference.element


@pytest.mark.parametrize("mode", list(Mode))
@settings(max_examples=60, deadline=None)
@given(operations=OPERATIONS)
def test_looking_late_changes_nothing(mode: Mode, operations: list[tuple[str, int]]) -> None:
    """A counter asked at every pulse and one asked only at the end agree."""
    often, once, clock = Counter(), Counter(), 0
    for counter in (often, once):
        counter.set_mode(0, mode, False)
    for operation, argument in operations:
        for counter in (often, once):
            if operation == "count":
                counter.set_count(clock, argument)
            elif operation == "gate":
                counter.set_gate(clock, bool(argument))
        for _ in range(argument if operation == "pulses" else 0):
            clock += 1
            often.output(clock)
            often.value(clock)
    assert (often.output(clock), often.value(clock)) == (once.output(clock), once.value(clock))


def started(mode: Mode, count: int, *, bcd: bool = False) -> Counter:
    counter = Counter()
    counter.set_mode(0, mode, bcd)
    counter.set_count(0, count)
    return counter


def wave(counter: Counter, pulses: int) -> str:
    return "".join("_#"[counter.output(clock)] for clock in range(pulses))


# The first column is before the pulse that loads the count.
@pytest.mark.parametrize(
    ("mode", "count", "expected"),
    [
        (Mode.INTERRUPT_ON_TERMINAL_COUNT, 4, "_____#####"),
        (Mode.RATE_GENERATOR, 3, "###_##_##_##_"),
        (Mode.SQUARE_WAVE, 4, "###__##__##__"),
        (Mode.SQUARE_WAVE, 5, "####__###__###__"),
        (Mode.SOFTWARE_STROBE, 3, "####_#####"),
    ],
)
def test_waveforms_of_the_data_sheet(mode: Mode, count: int, expected: str) -> None:
    assert wave(started(mode, count), len(expected)) == expected


def test_one_shot_is_retriggered() -> None:
    counter = Counter()
    counter.set_gate(0, False)
    counter.set_mode(0, Mode.HARDWARE_ONE_SHOT, False)
    counter.set_count(0, 3)
    assert counter.next_change(0) is None
    counter.set_gate(2, True)
    counter.set_gate(3, False)
    counter.set_gate(4, True)
    assert [counter.output(clock) for clock in range(4, 10)] == [False, False, False, False, True, True]


def test_count_zero_is_the_largest() -> None:
    assert started(Mode.INTERRUPT_ON_TERMINAL_COUNT, 0).next_change(0) == 0x10001
    assert started(Mode.INTERRUPT_ON_TERMINAL_COUNT, 0, bcd=True).next_change(0) == 10001


def test_counts_in_decimal() -> None:
    counter = started(Mode.INTERRUPT_ON_TERMINAL_COUNT, 0x0100, bcd=True)
    assert counter.value(1) == 0x0100
    assert counter.value(2) == 0x0099
    assert counter.next_change(0) == 101
    assert counter.value(102) == 0x9999


def test_wraps_after_the_end() -> None:
    counter = started(Mode.INTERRUPT_ON_TERMINAL_COUNT, 2)
    assert [counter.value(clock) for clock in (1, 2, 3, 4)] == [2, 1, 0, 0xFFFF]
    assert counter.next_change(4) is None


def test_first_byte_stops_mode_0_and_lowers_its_output() -> None:
    counter = started(Mode.INTERRUPT_ON_TERMINAL_COUNT, 2)
    assert counter.output(5)
    value = counter.value(5)
    counter.suspend(5)
    assert not counter.output(5)
    assert counter.value(50) == value
    counter.set_count(50, 7)
    assert counter.next_change(50) == 58


@pytest.mark.parametrize("mode", [Mode.RATE_GENERATOR, Mode.SQUARE_WAVE])
def test_forbidden_count_1_gives_no_edges(mode: Mode) -> None:
    counter = started(mode, 1)
    clock = counter.next_change(0)
    assert clock is None or counter.next_change(clock) is None


def test_invalid_decimal_digits_are_harmless() -> None:
    counter = started(Mode.SQUARE_WAVE, 0xFFFF, bcd=True)
    assert counter.next_change(0) is not None
    assert counter.value(12345) <= 0x9999


def test_binary_count_beyond_a_digit() -> None:
    assert started(Mode.INTERRUPT_ON_TERMINAL_COUNT, 0x1A2B).next_change(0) == 0x1A2B + 1
    assert started(Mode.INTERRUPT_ON_TERMINAL_COUNT, 0x1234, bcd=True).next_change(0) == 1234 + 1
