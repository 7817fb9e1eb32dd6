"""Performance counters: what counts when, overflow, the global registers, and freezing."""

from __future__ import annotations

import pytest
from attrs import define

from vtx.devices.performance_counters import PerformanceCounters
from vtx.x86.outcome import NotModelled
from vtx.x86.performance import PerformanceMonitoring
from vtx.x86.timing import TICKS_PER_BYTE

FACILITY = PerformanceMonitoring(general=4, general_width=48, fixed=3, fixed_width=40)
PMC0, SELECT0, FIXED0, FIXED_CONTROL, STATUS, CONTROL, OVERFLOW_CONTROL = 0xC1, 0x186, 0x309, 0x38D, 0x38E, 0x38F, 0x390
INSTRUCTIONS, CYCLES, REFERENCE, BRANCHES = 0x00C0, 0x003C, 0x013C, 0x00C4
USER, OS, EDGE, INTERRUPT, ENABLE, INVERT, MASK_1 = (1 << bit for bit in (16, 17, 18, 20, 22, 23, 24))
BOTH = USER | OS
TOP = 1 << 48


@define
class Work:
    """A processor that has done as much as the test says."""

    instructions: int = 0
    halted: int = 0
    ticks: int = 0

    def now(self) -> int:
        return self.ticks

    def do(self, instructions: int, ticks: int, halted: int = 0) -> None:
        self.instructions += instructions
        self.ticks += ticks + halted
        self.halted += halted


class Bench:
    def __init__(self) -> None:
        self.work = Work(instructions=1000, halted=70, ticks=9000)
        self.interrupts = 0
        self.counters = PerformanceCounters(FACILITY, self.work, self.interrupt)

    def interrupt(self) -> None:
        self.interrupts += 1

    def write(self, index: int, value: int) -> None:
        assert self.counters.msr_write(index, value)

    def read(self, *indices: int) -> list[int | None]:
        return [self.counters.msr_read(index) for index in indices]


@pytest.mark.parametrize(
    ("event", "count"), [(INSTRUCTIONS, 10), (CYCLES, 50), (REFERENCE, 50), (BRANCHES, 0), (0, 0), (0x01C0, 0)]
)
def test_general_counter__counts_its_event_and_no_halted_cycle(event: int, count: int) -> None:
    bench = Bench()
    bench.write(SELECT0 + 1, event | BOTH | ENABLE)
    bench.write(PMC0 + 1, 5)
    bench.work.do(10, 50, halted=1_000)
    assert bench.read(PMC0, PMC0 + 1) == [0, 5 + count]


def test_fixed_counters__count_instructions_and_cycles() -> None:
    bench = Bench()
    bench.write(FIXED_CONTROL, 0x333)
    bench.write(CONTROL, 0b111 << 32)
    bench.work.do(7, 30, halted=9)
    assert bench.read(FIXED0, FIXED0 + 1, FIXED0 + 2) == [7, 30, 30]


@pytest.mark.parametrize("select", [INSTRUCTIONS | BOTH, INSTRUCTIONS | ENABLE], ids=["disabled", "at no level"])
def test_general_counter__that_is_off_holds(select: int) -> None:
    bench = Bench()
    bench.write(SELECT0, select)
    bench.work.do(10, 50)
    assert bench.read(PMC0) == [0]


def test_global_control__gates_each_counter() -> None:
    bench = Bench()
    assert bench.read(CONTROL) == [0b1111]  # the general ones are enabled at power-up
    for n in range(4):
        bench.write(SELECT0 + n, INSTRUCTIONS | BOTH | ENABLE)
    bench.write(FIXED_CONTROL, 0x003)
    bench.write(CONTROL, 0b0101)
    bench.work.do(10, 50)
    bench.write(CONTROL, 1 << 32)
    bench.work.do(4, 20)
    assert bench.read(PMC0, PMC0 + 1, PMC0 + 2, PMC0 + 3, FIXED0) == [10, 0, 10, 0, 4]


def test_write_of_a_general_counter__is_sign_extended() -> None:
    bench = Bench()
    bench.write(PMC0, 0xFFFF_FFF0)
    bench.write(PMC0 + 1, 0xFFFF_FFFF)
    bench.write(PMC0 + 1, 0x1234_7FFF_FFF0)  # bits 47:32 are ignored
    assert bench.read(PMC0, PMC0 + 1) == [TOP - 16, 0x7FFF_FFF0]


def test_overflow__is_in_the_status_until_it_is_cleared() -> None:
    bench = Bench()
    bench.write(SELECT0 + 2, INSTRUCTIONS | BOTH | ENABLE)
    bench.write(PMC0 + 2, 0xFFFF_FFFE)
    bench.write(FIXED_CONTROL, 0x030)
    bench.write(CONTROL, 1 << 33 | 0b100)
    bench.write(FIXED0 + 1, (1 << 40) - 10)
    bench.work.do(1, 9)
    assert bench.read(STATUS) == [0]
    bench.work.do(2, 8)
    assert bench.read(STATUS, PMC0 + 2, FIXED0 + 1) == [1 << 33 | 0b100, 1, 7]
    bench.write(OVERFLOW_CONTROL, 0b100)
    assert bench.read(STATUS, OVERFLOW_CONTROL) == [1 << 33, 0]
    assert bench.interrupts == 0


class TestInterrupt:
    def test_cycles__come_due_exactly(self) -> None:
        bench = Bench()
        bench.write(PMC0, 0xFFFF_FF00)
        bench.write(SELECT0, CYCLES | BOTH | ENABLE | INTERRUPT)
        due = bench.work.now() + 0x100
        assert bench.counters.deadline == due
        bench.work.do(1, 0xFF)
        bench.counters.advance(bench.work.now())
        assert bench.interrupts == 0
        bench.work.do(1, 1)
        bench.counters.advance(bench.work.now())
        assert (bench.interrupts, bench.read(STATUS)) == (1, [1])
        assert bench.counters.deadline == due + TOP

    def test_instructions__are_never_due_too_late(self) -> None:
        bench = Bench()
        bench.write(SELECT0, INSTRUCTIONS | BOTH | ENABLE | INTERRUPT)
        bench.write(PMC0, 0xFFFF_FF00)
        looks = 0
        start = bench.work.instructions
        while not bench.interrupts:
            assert bench.counters.deadline is not None
            while bench.work.now() < bench.counters.deadline:
                bench.work.do(1, 3 * TICKS_PER_BYTE)  # instructions of three bytes
            bench.counters.advance(bench.work.now())
            looks += 1
        assert bench.work.instructions - start == 0x100
        assert looks < 20

    def test_fixed_counter(self) -> None:
        bench = Bench()
        bench.write(FIXED_CONTROL, 0xB00)
        bench.write(CONTROL, 1 << 34)
        bench.write(FIXED0 + 2, (1 << 40) - 3)
        bench.work.do(1, 3)
        bench.counters.advance(bench.work.now())
        assert bench.interrupts == 1

    def test_a_stopped_counter_is_never_due(self) -> None:
        bench = Bench()
        bench.write(SELECT0, CYCLES | BOTH | ENABLE | INTERRUPT)
        bench.write(CONTROL, 0)
        assert bench.counters.deadline is None

    def test_freeze__stops_every_counter(self) -> None:
        bench = Bench()
        bench.write(SELECT0, CYCLES | BOTH | ENABLE | INTERRUPT)
        bench.counters.freeze()
        bench.work.do(1, 50)
        assert bench.read(CONTROL, PMC0) == [0, 0]
        assert bench.counters.deadline is None


@pytest.mark.parametrize(
    ("select", "count"),
    [
        (INSTRUCTIONS | MASK_1, 10),  # cycles in which at least one instruction retires, of 50
        (INSTRUCTIONS | MASK_1 | INVERT, 40),
        (INSTRUCTIONS | 2 * MASK_1, 0),  # never two in one
        (INSTRUCTIONS | 2 * MASK_1 | INVERT, 50),
        (INSTRUCTIONS | 255 * MASK_1, 0),
        (CYCLES | MASK_1, 50),
        (CYCLES | MASK_1 | INVERT, 0),
        (CYCLES | 2 * MASK_1, 0),
        (REFERENCE | 2 * MASK_1 | INVERT, 50),
        (BRANCHES | MASK_1, 0),
        (BRANCHES | MASK_1 | INVERT, 50),  # an event that never happens
        (INSTRUCTIONS | INVERT, 10),  # inversion is of the comparison with a mask
        (INSTRUCTIONS | EDGE, 10),  # two never retire in cycles next to each other
        (INSTRUCTIONS | MASK_1 | EDGE, 10),
        (INSTRUCTIONS | MASK_1 | INVERT | EDGE, 10),
        (CYCLES | 2 * MASK_1 | EDGE, 0),
    ],
)
def test_counter_mask__counts_cycles_in_which_enough_happens(select: int, count: int) -> None:
    bench = Bench()
    bench.write(SELECT0, select | BOTH | ENABLE)
    bench.work.do(10, 50, halted=1_000)
    assert bench.read(PMC0) == [count]


@pytest.mark.parametrize("select", [CYCLES, CYCLES | MASK_1, INSTRUCTIONS | 2 * MASK_1 | INVERT])
def test_edges_of_unhalted_cycles__are_said_not_to_be_counted(select: int) -> None:
    bench = Bench()
    bench.write(SELECT0, select | EDGE | BOTH)  # not enabled yet
    with pytest.raises(NotModelled, match="edge detection of unhalted cycles"):
        bench.write(SELECT0, select | EDGE | BOTH | ENABLE)


@pytest.mark.parametrize("level", [USER, OS])
def test_one_privilege_level__is_said(level: int) -> None:
    bench = Bench()
    with pytest.raises(NotModelled, match="one privilege level"):
        bench.write(SELECT0, INSTRUCTIONS | level | ENABLE)
    with pytest.raises(NotModelled, match="one privilege level"):
        bench.write(FIXED_CONTROL, level >> 16 << 4)


def test_cpuid_leaf() -> None:
    assert FACILITY.cpuid == (0x0730_0402, 0b111_1000, 0, 3 | 40 << 5)


@pytest.mark.parametrize(
    ("number", "index"), [(0, PMC0), (3, PMC0 + 3), (4, None), (1 << 30, FIXED0), (1 << 30 | 2, FIXED0 + 2)]
)
def test_rdpmc(number: int, index: int | None) -> None:
    assert FACILITY.rdpmc(number) == index


@pytest.mark.parametrize("number", [1 << 30 | 3, 1 << 31, (1 << 32) - 1, 1 << 29])
def test_rdpmc_of_no_counter(number: int) -> None:
    assert FACILITY.rdpmc(number) is None
