"""Performance counters as guest code finds them: MSRs, RDPMC, the overflow interrupt, snapshots."""

from __future__ import annotations

import pytest
from flat_guest import EXIT_0, SOFTWARE_ENABLE, machine_with, store

from vtx.machine import Machine, StopReason

PMC0, SELECT0, FIXED0, FIXED_CONTROL, GLOBAL_STATUS, GLOBAL_CONTROL = 0xC1, 0x186, 0x309, 0x38D, 0x38E, 0x38F
DEBUGCTL = 0x1D9
INSTRUCTIONS, CYCLES, COUNT, INTERRUPT = 0xC0, 0x3C, 0x43_0000, 1 << 20
LVT_PERFORMANCE = 0xFEE0_0340
NMI_DELIVERY = 0x400


def write_msr(index: int, value: int) -> bytes:
    """MOV ECX; MOV EAX; MOV EDX; WRMSR."""
    low, high = value & 0xFFFF_FFFF, value >> 32
    operands = zip((b"\xb9", b"\xb8", b"\xba"), (index, low, high), strict=True)
    return b"".join(opcode + operand.to_bytes(4, "little") for opcode, operand in operands) + b"\x0f\x30"


def read_counter(number: int) -> bytes:
    """MOV ECX; RDPMC; MOV [9000H], EAX."""
    return b"\xb9" + number.to_bytes(4, "little") + b"\x0f\x33\xa3\x00\x90\x00\x00"


def counting_machine(code: bytes) -> Machine:
    return machine_with(1, code, profile="everything")


@pytest.mark.parametrize("fixed", [False, True])
def test_instructions_between_two_msr_accesses(fixed: bool) -> None:
    start = write_msr(SELECT0, INSTRUCTIONS | COUNT)
    if fixed:
        start = write_msr(FIXED_CONTROL, 3) + write_msr(GLOBAL_CONTROL, 1 << 32)
    machine = counting_machine(start + b"\x90" * 7 + read_counter(1 << 30 if fixed else 0) + EXIT_0)
    assert machine.run(max_instructions=1000).exit_value == 0
    # The WRMSR that starts counting is not counted; seven NOPs, MOV ECX and RDPMC itself are.
    assert machine.memory.read_u32(0x9000) == 9


def test_rdpmc_of_no_counter__faults() -> None:
    machine = counting_machine(read_counter(4) + EXIT_0)
    machine.cpu.state.idtr.limit = 0
    assert machine.run(max_instructions=1000).reason is StopReason.SHUTDOWN


def test_processor_without_counters__has_none_of_the_msrs() -> None:
    cpu = Machine(memory=1 << 20).cpu
    assert [cpu.msrs.read(index) for index in (PMC0, SELECT0, FIXED0, FIXED_CONTROL, GLOBAL_CONTROL)] == [None] * 5
    assert not cpu.msrs.write(DEBUGCTL, 1 << 12)


@pytest.mark.parametrize("freeze", [False, True])
def test_overflow__interrupts_through_the_local_apic(freeze: bool) -> None:
    """There is no IDT, so the NMI that it asks for is a shutdown."""
    code = SOFTWARE_ENABLE + store(LVT_PERFORMANCE, NMI_DELIVERY) + write_msr(DEBUGCTL, freeze << 12)
    code += write_msr(PMC0, 0xFFFF_F000) + write_msr(SELECT0, CYCLES | COUNT | INTERRUPT)
    machine = counting_machine(code + b"\xeb\xfe")
    machine.cpu.state.idtr.limit = 0
    result = machine.run(max_instructions=100_000)
    assert result.reason is StopReason.SHUTDOWN
    msrs = machine.cpu.msrs
    assert msrs.read(GLOBAL_STATUS) == 1
    assert msrs.read(GLOBAL_CONTROL) == (0 if freeze else 0b1111)
    assert 0x1000 <= result.ticks < 0x2000
    assert machine.cpu.socket.apic.mmio_read(0x340, 4) == 0x1_0000 | NMI_DELIVERY  # masked by its own interrupt


def test_snapshot__counts_on_from_where_it_was() -> None:
    machine = counting_machine(write_msr(SELECT0, INSTRUCTIONS | COUNT) + b"\x90" * 20 + read_counter(0) + EXIT_0)
    machine.run(max_instructions=12)
    snapshot = machine.snapshot()
    machine.run(max_instructions=1000)
    first = machine.memory.read_u32(0x9000)
    machine.restore(snapshot)
    machine.run(max_instructions=1000)
    assert machine.memory.read_u32(0x9000) == first == 22


def test_halted_processor__lets_no_cycle_pass() -> None:
    start = store(0xFEE0_0320, 0x1_0000) + write_msr(SELECT0, CYCLES | COUNT)
    machine = counting_machine(start + b"\xf4")  # HLT with nothing to wake it
    machine.run(max_instructions=1000)
    cpu = machine.cpu
    cycles = cpu.msrs.read(PMC0)
    cpu.sleep_until(cpu.now() + 50_000)
    assert cpu.msrs.read(PMC0) == cycles


def test_what_is_not_counted__ends_the_run_by_name() -> None:
    result = counting_machine(write_msr(SELECT0, INSTRUCTIONS | 0x41_0000) + EXIT_0).run(max_instructions=1000)
    assert result.reason is StopReason.NOT_MODELLED
    assert result.message == "not modelled: performance counter for one privilege level alone"
