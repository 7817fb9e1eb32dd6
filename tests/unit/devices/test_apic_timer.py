"""The local APIC timer on virtual time."""

import pytest
from apic_machine import CURRENT_COUNT, DIVIDE, INITIAL_COUNT, IRR, MASKED, SVR, TIMER, Machine
from hypothesis import given
from hypothesis import strategies as st

ONE_SHOT, PERIODIC, TSC_DEADLINE, RESERVED = 0 << 17, 1 << 17, 2 << 17, 3 << 17
DIVISORS = {0b0000: 2, 0b0001: 4, 0b0010: 8, 0b0011: 16, 0b1000: 32, 0b1001: 64, 0b1010: 128, 0b1011: 1}


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.mark.parametrize(("configuration", "divisor"), DIVISORS.items())
def test_divide_configuration(machine: Machine, configuration: int, divisor: int) -> None:
    machine.write(DIVIDE, configuration)
    machine.write(TIMER, 0x40)
    machine.write(INITIAL_COUNT, 10)
    assert machine.apic.next_deadline() == 10 * divisor
    machine.wait(3 * divisor)
    assert machine.read(CURRENT_COUNT) == 7
    machine.wait(divisor - 1)
    assert machine.read(CURRENT_COUNT) == 7 if divisor > 1 else True
    machine.wait(1)
    assert machine.read(CURRENT_COUNT) == 6


def test_input_clock_slower_than_the_tsc() -> None:
    machine = Machine(timer_input_ticks=40)
    machine.write(TIMER, 0x40)
    machine.write(INITIAL_COUNT, 10)
    assert machine.apic.next_deadline() == 10 * 40 * 2
    machine.write(DIVIDE, 0xB)
    machine.write(INITIAL_COUNT, 10)
    assert machine.apic.next_deadline() == 10 * 40
    machine.wait(399)
    assert machine.read(CURRENT_COUNT) == 1
    machine.apic.init_reset()
    machine.write(SVR, 0x1FF)
    machine.write(TIMER, 0x40)
    machine.write(INITIAL_COUNT, 10)
    assert machine.apic.next_deadline() == 399 + 10 * 40 * 2


def test_one_shot_fires_once(machine: Machine) -> None:
    machine.write(DIVIDE, 0xB)
    machine.write(TIMER, 0x40)
    machine.write(INITIAL_COUNT, 100)
    machine.wait(99)
    assert machine.apic.pending_vector() is None
    machine.wait(1)
    assert machine.serve() == 0x40
    assert machine.read(CURRENT_COUNT) == 0
    assert machine.read(INITIAL_COUNT) == 100
    assert machine.apic.next_deadline() is None
    machine.wait(1000)
    assert machine.apic.pending_vector() is None


def test_periodic_keeps_its_phase(machine: Machine) -> None:
    machine.write(DIVIDE, 0xB)
    machine.write(TIMER, PERIODIC | 0x40)
    machine.write(INITIAL_COUNT, 100)
    machine.wait(130)
    assert machine.serve() == 0x40
    assert machine.read(CURRENT_COUNT) == 70
    assert machine.apic.next_deadline() == 200
    machine.wait(1_000_000_000_000)
    assert machine.serve() == 0x40
    assert machine.apic.pending_vector() is None


def test_zero_initial_count_stops(machine: Machine) -> None:
    machine.write(TIMER, PERIODIC | 0x40)
    machine.write(INITIAL_COUNT, 100)
    machine.write(INITIAL_COUNT, 0)
    assert machine.apic.next_deadline() is None
    assert machine.read(CURRENT_COUNT) == 0


def test_masked_timer_counts_but_does_not_interrupt(machine: Machine) -> None:
    machine.write(DIVIDE, 0xB)
    machine.write(TIMER, MASKED | PERIODIC | 0x40)
    machine.write(INITIAL_COUNT, 100)
    assert machine.apic.next_deadline() is None
    machine.clock.ticks += 250
    assert machine.read(CURRENT_COUNT) == 50
    machine.write(TIMER, PERIODIC | 0x40)
    assert machine.apic.pending_vector() is None
    assert machine.apic.next_deadline() == 300


def test_mode_change_keeps_counting(machine: Machine) -> None:
    machine.write(DIVIDE, 0xB)
    machine.write(TIMER, 0x40)
    machine.write(INITIAL_COUNT, 100)
    machine.wait(60)
    machine.write(TIMER, PERIODIC | 0x40)
    assert machine.read(CURRENT_COUNT) == 40
    machine.wait(50)
    assert machine.read(CURRENT_COUNT) == 90
    machine.write(TIMER, 0x40)
    machine.wait(90)
    assert machine.read(CURRENT_COUNT) == 0
    machine.write(TIMER, PERIODIC | 0x40)
    assert machine.read(CURRENT_COUNT) == 0
    assert machine.apic.next_deadline() is None


def test_divide_change_continues_from_the_count(machine: Machine) -> None:
    machine.write(DIVIDE, 0xB)
    machine.write(TIMER, 0x40)
    machine.write(INITIAL_COUNT, 100)
    machine.wait(40)
    machine.write(DIVIDE, 0x1)
    assert machine.read(CURRENT_COUNT) == 60
    assert machine.apic.next_deadline() == 40 + 60 * 4


def test_pending_vector_is_no_deadline_and_missed_periods_merge(machine: Machine) -> None:
    machine.write(DIVIDE, 0xB)
    machine.write(TIMER, PERIODIC | 0x40)
    machine.write(INITIAL_COUNT, 1)
    machine.wait(1)
    assert machine.apic.pending_vector() == 0x40
    assert machine.apic.next_deadline() is None
    machine.clock.ticks += 10
    assert machine.apic.acknowledge() == 0x40
    assert machine.apic.pending_vector() is None
    assert machine.apic.next_deadline() == machine.clock.ticks + 1


def test_software_disable_silences_the_timer(machine: Machine) -> None:
    machine.write(TIMER, 0x40)
    machine.write(INITIAL_COUNT, 100)
    machine.write(SVR, 0xFF)
    assert machine.apic.next_deadline() is None


def test_tsc_deadline_fires_once_and_clears(machine: Machine) -> None:
    machine.write(TIMER, TSC_DEADLINE | 0x40)
    machine.apic.tsc_deadline = 500
    assert machine.apic.tsc_deadline == 500
    assert machine.apic.next_deadline() == 500
    machine.wait(499)
    assert machine.apic.pending_vector() is None
    machine.wait(1)
    assert machine.serve() == 0x40
    assert machine.apic.tsc_deadline == 0
    assert machine.apic.next_deadline() is None


def test_tsc_deadline_in_the_past_fires_at_once(machine: Machine) -> None:
    machine.clock.ticks = 1000
    machine.write(TIMER, TSC_DEADLINE | 0x40)
    machine.apic.tsc_deadline = 1000
    assert machine.serve() == 0x40


def test_past_deadline_is_requested_without_waiting_for_advance(machine: Machine) -> None:
    machine.clock.ticks = 1000
    machine.write(TIMER, TSC_DEADLINE | 0x40)
    machine.apic.tsc_deadline = 1
    assert machine.apic.pending_vector() == 0x40


def test_access_takes_what_is_due_first(machine: Machine) -> None:
    machine.write(DIVIDE, 0xB)
    machine.write(TIMER, 0x40)
    machine.write(INITIAL_COUNT, 100)
    machine.clock.ticks += 100
    assert machine.read(IRR + 0x20) == 1
    assert machine.serve() == 0x40
    machine.write(INITIAL_COUNT, 100)
    machine.clock.ticks += 100
    machine.write(TIMER, MASKED | 0x40)
    assert machine.serve() == 0x40
    machine.write(TIMER, TSC_DEADLINE | 0x40)
    machine.apic.tsc_deadline = 300
    machine.clock.ticks += 100
    machine.apic.tsc_deadline = 1000
    assert machine.serve() == 0x40
    machine.clock.ticks = 1000
    machine.apic.set_tsc_offset((1 << 64) - 500)
    assert machine.serve() == 0x40
    machine.apic.tsc_deadline = 600
    machine.clock.ticks = 1100
    assert machine.apic.tsc_deadline == 0


def test_tsc_deadline_zero_disarms(machine: Machine) -> None:
    machine.write(TIMER, TSC_DEADLINE | 0x40)
    machine.apic.tsc_deadline = 500
    machine.apic.tsc_deadline = 0
    machine.wait(1000)
    assert machine.apic.pending_vector() is None


@pytest.mark.parametrize("offset", [1000, -1000 % (1 << 64)])
def test_tsc_deadline_follows_the_guests_tsc(machine: Machine, offset: int) -> None:
    machine.clock.ticks = 5000
    machine.apic.set_tsc_offset(offset)
    machine.write(TIMER, TSC_DEADLINE | 0x40)
    tsc = (5000 + offset) % (1 << 64)
    machine.apic.tsc_deadline = tsc + 30
    assert machine.apic.next_deadline() == 5030
    machine.wait(30)
    assert machine.serve() == 0x40


def test_modes_ignore_each_others_registers(machine: Machine) -> None:
    machine.apic.tsc_deadline = 500
    assert machine.apic.tsc_deadline == 0
    machine.write(TIMER, TSC_DEADLINE | 0x40)
    machine.write(INITIAL_COUNT, 100)
    assert machine.read(CURRENT_COUNT) == 0
    assert machine.apic.next_deadline() is None


def test_leaving_tsc_deadline_mode_disarms(machine: Machine) -> None:
    machine.write(TIMER, TSC_DEADLINE | 0x40)
    machine.apic.tsc_deadline = 500
    machine.write(TIMER, 0x40)
    machine.write(TIMER, TSC_DEADLINE | 0x40)
    assert machine.apic.tsc_deadline == 0


def test_entering_tsc_deadline_mode_stops_the_count(machine: Machine) -> None:
    machine.write(TIMER, 0x40)
    machine.write(INITIAL_COUNT, 100)
    machine.write(TIMER, TSC_DEADLINE | 0x40)
    assert machine.apic.next_deadline() is None
    assert machine.read(CURRENT_COUNT) == 0


def test_reserved_mode_never_interrupts(machine: Machine) -> None:
    machine.write(TIMER, RESERVED | 0x40)
    machine.write(INITIAL_COUNT, 10)
    machine.wait(10_000)
    assert machine.apic.pending_vector() is None


@given(
    periodic=st.booleans(),
    configuration=st.sampled_from(sorted(DIVISORS)),
    initial=st.integers(1, 40),
    waits=st.lists(st.integers(1, 90), min_size=1, max_size=8),
)
def test_agrees_with_a_counter_that_ticks(periodic: bool, configuration: int, initial: int, waits: list[int]) -> None:
    machine = Machine()
    machine.write(DIVIDE, configuration)
    machine.write(TIMER, (PERIODIC if periodic else ONE_SHOT) | 0x40)
    machine.write(INITIAL_COUNT, initial)
    count, phase = initial, 0
    for wait in waits:
        expired = False
        for _ in range(wait):
            phase += 1
            if count and phase == DIVISORS[configuration]:
                phase = 0
                count -= 1
                if not count:
                    expired = True
                    count = initial if periodic else 0
        machine.wait(wait)
        assert machine.read(CURRENT_COUNT) == count
        assert (machine.apic.pending_vector() == 0x40) == expired
        if expired:
            machine.serve()
