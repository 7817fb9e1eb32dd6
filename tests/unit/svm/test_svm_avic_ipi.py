"""Interprocessor interrupts of guests with AVIC: delivered between processors, or incomplete."""

from __future__ import annotations

import pytest
from svm_avic import (
    DFR,
    ICR,
    ICR_HIGH,
    IRR,
    ISR,
    LOGICAL_TABLE,
    NOP,
    PHYSICAL_TABLE,
    RUNNING,
    SPIN,
    STI,
    VALID,
    VMMCALL,
    Guest,
    store,
    wrmsr,
)

from vmcs.vmcb.intercepts import Exit

INCOMPLETE_IPI = 0x401
CODE = 0x4000
SELF, ALL, OTHERS, LOGICAL, LEVEL = 1 << 18, 2 << 18, 3 << 18, 1 << 11, 1 << 15
VECTOR = 0x55
LISTENING = STI + SPIN


def send(command: int, destination: int = 0) -> bytes:
    return store(ICR_HIGH, destination << 24) + store(ICR, command)


def incomplete(guest: Guest) -> tuple[int, int]:
    """ID and index."""
    assert guest.stored("EXITCODE") == INCOMPLETE_IPI
    return guest.stored("EXITINFO2") >> 32, guest.stored("EXITINFO2") & 0xFFFF_FFFF


def sender(code: bytes, others: int = 2, **options: object) -> Guest:
    """Virtual processor 0 executes ``code``; the others are not entered."""
    guest = Guest(code + VMMCALL, *[NOP] * others, **options)  # type: ignore[arg-type]
    guest.enter()
    return guest


def requested(guest: Guest, vector: int = VECTOR) -> list[int]:
    """The virtual processors of which ``vector`` is requested."""
    return [number for number in range(len(guest.machine.cpus)) if guest.bit(IRR, vector, number)]


@pytest.mark.parametrize(
    ("command", "destination", "x2apic"),
    [
        (VECTOR, 1, False),
        (VECTOR | LOGICAL, 2, False),
        (VECTOR | OTHERS, 0, False),
        (VECTOR | ALL, 0, False),
        (VECTOR, 1, True),
        (VECTOR | LOGICAL, 2, True),
        (VECTOR | OTHERS, 0, True),
    ],
)
def test_reaches_a_processor_that_runs(command: int, destination: int, x2apic: bool) -> None:
    """Without an exit of either: the doorbell has it delivered to the guest that spins there."""
    ipi = wrmsr(0x830, destination << 32 | command) if x2apic else send(command, destination)
    guest = Guest(NOP * 3 + ipi + SPIN, LISTENING, x2apic=x2apic)
    guest.enter(0)
    guest.enter(1)
    guest.machine.run(max_instructions=2000)
    assert guest.handled(VECTOR) == 1
    assert (guest.stored("EXITCODE", 1), guest.cpu(1).svm.non_root) == (Exit.VMMCALL, False)
    assert guest.cpu(0).svm.non_root
    assert (guest.bit(IRR, VECTOR, 1), guest.bit(ISR, VECTOR, 1)) == (False, True)


def test_waits_for_the_interrupt_flag_of_its_destination() -> None:
    guest = Guest(send(VECTOR, 1) + SPIN, SPIN)
    guest.enter(0)
    guest.enter(1)
    guest.machine.run(max_instructions=2000)
    assert (guest.handled(VECTOR), requested(guest)) == (0, [1])


def test_processor_in_host_mode__has_it_at_the_next_vmrun() -> None:
    guest = sender(send(VECTOR, 1))
    assert guest.run() == Exit.VMMCALL
    assert requested(guest) == [1]
    guest.memory.write(CODE + 0x200, STI + NOP + NOP)
    guest.enter(1)
    assert guest.run(1) == Exit.VMMCALL
    assert guest.handled(VECTOR) == 1


@pytest.mark.parametrize(
    ("command", "destination", "targets"),
    [
        (VECTOR, 2, [2]),
        (VECTOR, 0, [0]),
        (VECTOR, 0xFF, [0, 1, 2]),
        (VECTOR | LOGICAL, 0xFF, [0, 1, 2]),
        (VECTOR | LOGICAL, 5, [0, 2]),
        (VECTOR | LOGICAL, 0, []),
        (VECTOR | SELF, 0x77, [0]),
        (VECTOR | ALL, 0x77, [0, 1, 2]),
        (VECTOR | OTHERS | LOGICAL, 0x77, [1, 2]),
        (VECTOR | 1 << 14, 1, [1]),
    ],
)
def test_destination(command: int, destination: int, targets: list[int]) -> None:
    guest = sender(send(command, destination))
    assert guest.run() == Exit.VMMCALL
    assert requested(guest) == targets


@pytest.mark.parametrize(
    ("command", "targets"),
    [
        (2 << 32 | VECTOR, [2]),
        (0xFFFF_FFFF << 32 | VECTOR, [0, 1, 2]),
        (0xFFFF_FFFF << 32 | VECTOR | LOGICAL, [0, 1, 2]),
        (5 << 32 | VECTOR | LOGICAL, [0, 2]),
        (VECTOR | SELF, [0]),
    ],
)
def test_destination_in_x2apic_mode(command: int, targets: list[int]) -> None:
    guest = sender(wrmsr(0x830, command), x2apic=True)
    assert guest.run() == Exit.VMMCALL
    assert requested(guest) == targets
    assert (guest.register(ICR), guest.register(ICR_HIGH)) == (command & 0xFFFF_FFFF, command >> 32)


def test_destination_255__is_no_broadcast_in_x2apic_mode() -> None:
    guest = sender(wrmsr(0x830, 0xFF << 32 | VECTOR), x2apic=True)
    guest.run()
    assert (incomplete(guest), requested(guest)) == ((2, 0xFF), [])


def test_clusters() -> None:
    guest = sender(send(VECTOR | LOGICAL, 0x32))
    guest.set_register(DFR, 0x0FFF_FFFF)
    guest.memory.write_u32(LOGICAL_TABLE + 4 * (4 * 3 + 1), 1 << 31 | 2)
    assert guest.run() == Exit.VMMCALL
    assert requested(guest) == [2]


def test_self_ipi_of_x2apic_mode() -> None:
    guest = sender(wrmsr(0x83F, VECTOR) + STI + NOP, x2apic=True)
    assert guest.run() == Exit.VMMCALL
    assert guest.handled(VECTOR) == 1


def test_self_is_not_looked_up() -> None:
    guest = sender(send(VECTOR | SELF) + STI + NOP)
    guest.memory.write_u64(PHYSICAL_TABLE, 0)
    assert guest.run() == Exit.VMMCALL
    assert guest.handled(VECTOR) == 1


@pytest.mark.parametrize(
    ("command", "identity"),
    [
        (VECTOR | LEVEL, 0),
        *((VECTOR | mode << 8, 0) for mode in range(1, 8)),
        (VECTOR | LEVEL | SELF, 0),
        (0x0F, 4),
        (0x0F | SELF, 4),
        (0, 4),
    ],
)
def test_what_is_not_handled(command: int, identity: int) -> None:
    guest = sender(send(command, 1))
    guest.run()
    assert (incomplete(guest), guest.stored("EXITINFO1")) == ((identity, 0), 1 << 56 | command)
    assert (guest.stored("RIP"), guest.stored("nRIP"), guest.register(ICR)) == (CODE + 22, 0, command)
    assert requested(guest, command & 0xFF) == []


class TestTargets:
    """Entries of the tables that stand in the way."""

    def test_not_running(self) -> None:
        guest = sender(send(VECTOR | OTHERS))
        guest.memory.write_u64(PHYSICAL_TABLE + 8, VALID | guest.backing_page(1))
        guest.run()
        assert incomplete(guest) == (1, 1)
        assert requested(guest) == [1, 2]

    def test_not_running__of_a_logical_destination(self) -> None:
        guest = sender(send(VECTOR | LOGICAL, 0x30))
        guest.memory.write_u32(LOGICAL_TABLE + 16, 1 << 31 | 1)
        guest.memory.write_u32(LOGICAL_TABLE + 20, 1 << 31 | 2)
        guest.memory.write_u64(PHYSICAL_TABLE + 16, VALID | guest.backing_page(2))
        guest.run()
        assert (incomplete(guest), requested(guest)) == ((1, 5), [1, 2])

    @pytest.mark.parametrize("destination", [1, 3, 0xFE])
    def test_invalid(self, destination: int) -> None:
        guest = sender(send(VECTOR, destination))
        guest.memory.write_u64(PHYSICAL_TABLE + 8, RUNNING | guest.backing_page(1))
        guest.run()
        assert (incomplete(guest), requested(guest)) == ((2, destination), [])

    @pytest.mark.parametrize("entry", [0, 1, 1 << 31 | 3, 1 << 31 | 0x101])
    def test_invalid_logical__nothing_is_delivered(self, entry: int) -> None:
        guest = sender(send(VECTOR | LOGICAL, 3))
        guest.memory.write_u32(LOGICAL_TABLE + 4, entry)
        guest.run()
        assert (incomplete(guest), requested(guest)) == ((2, 1), [])

    def test_broadcast__passes_over_invalid_ones(self) -> None:
        guest = sender(send(VECTOR | OTHERS))
        guest.memory.write_u64(PHYSICAL_TABLE + 8, RUNNING | guest.backing_page(1))
        assert guest.run() == Exit.VMMCALL
        assert requested(guest) == [2]

    @pytest.mark.parametrize(("command", "destination"), [(VECTOR, 2), (VECTOR | ALL, 0), (VECTOR | LOGICAL, 4)])
    def test_backing_page_beyond_memory(self, command: int, destination: int) -> None:
        guest = sender(send(command, destination))
        guest.memory.write_u64(PHYSICAL_TABLE + 16, VALID | RUNNING | 1 << 48)
        guest.run()
        assert (incomplete(guest), requested(guest)) == ((3, 2), [])

    def test_processor_that_is_not_there__hears_no_doorbell(self) -> None:
        guest = sender(send(VECTOR, 1))
        guest.memory.write_u64(PHYSICAL_TABLE + 8, VALID | RUNNING | guest.backing_page(1) | 0xABC)
        assert guest.run() == Exit.VMMCALL
        assert requested(guest) == [1]


def test_doorbell_of_another_hypervisor_processor() -> None:
    """Software requests an interrupt in the page and rings by the MSR, as for an interrupt of a device."""
    guest = Guest(LISTENING, NOP)
    guest.enter(0)
    guest.machine.run(max_instructions=10)
    guest.set_bit(IRR, VECTOR)
    guest.machine.cpu.limit_instructions(None)
    guest.machine.run(max_instructions=60)
    assert guest.handled(VECTOR) == 0
    assert guest.cpu(1).msrs.write(0xC001_011B, 0)
    guest.machine.run(max_instructions=1000)
    assert guest.handled(VECTOR) == 1
