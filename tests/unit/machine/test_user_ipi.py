"""User interrupts in whole machines: from one processor to another, and across INIT, SMIs and snapshots."""

from __future__ import annotations

import pytest

from vtx.events import TraceEvent, UserInterruptDelivered, UserInterruptsRequested
from vtx.machine import Machine
from vtx.x86.state import Activity, DescriptorTable, Segment

RR, HANDLER, STACKADJUST, MISC, PD, TT = range(0x985, 0x98B)
UINTR, IF = 1 << 25, 1 << 9
UINV = 0xEC
TABLES, UPIDS, UITT, CODE, ENTRY, STACKS, FLAG = 0x1_0000, 0x8000, 0x9000, 0x1000, 0x2000, 0x4000, 0x5000
SEND_AND_WAIT = bytes.fromhex("31c0 f30fc7f0 f390 ebfc")  # xor eax,eax; senduipi rax; pause; jmp to it
WAIT = bytes.fromhex("f390 ebfc")
# pop rax; inc byte [FLAG + rax]; uiret
COUNT_AND_RETURN = bytes.fromhex("58 fe80 00500000 f30f01ec")
SMM_HANDLER = 0x3_8000
RSM = bytes.fromhex("0faa")


class Tracer(list[TraceEvent]):
    """Keeps the events of user interrupts."""

    def emit(self, event: TraceEvent) -> None:
        if isinstance(event, (UserInterruptsRequested, UserInterruptDelivered)):
            self.append(event)


def machine_of_users(*programs: bytes, tracer: Tracer | None = None) -> Machine:
    """Users in 64-bit mode, one on each processor, which can all be sent user interrupts."""
    machine = Machine(profile="everything", cpus=len(programs), memory=4 << 20, tracer=tracer)
    memory = machine.memory
    memory.write_u64(TABLES, TABLES + 0x1000 | 7)
    memory.write_u64(TABLES + 0x1000, TABLES + 0x2000 | 7)
    memory.write_u64(TABLES + 0x2000, 0x87)
    memory.write_u64(TABLES + 0x2008, 0x20_0000 | 0x87)
    memory.write(ENTRY, COUNT_AND_RETURN)
    for number, (cpu, program) in enumerate(zip(machine.cpus, programs, strict=True)):
        memory.write(CODE + 0x100 * number, program)
        state = cpu.state
        state.cr0, state.cr3, state.cr4, state.efer = 0x8001_0033, TABLES, 0x620 | UINTR, 0xD00
        state.segments = [Segment(0x13, 0, 0xFFFF_FFFF, 0xC0F3) for _ in range(6)]
        state.segments[1] = Segment(0x0B, 0, 0xFFFF_FFFF, 0xA0FB)
        state.tr, state.idtr = Segment(0x30, 0, 0x67, 0x8B), DescriptorTable(0, 0)
        state.rip, state.rflags, state.gpr[4] = CODE + 0x100 * number, 2 | IF, STACKS + 0x800 * number + 0x800
        state.activity, state.user_interrupt_flag = Activity.ACTIVE, True
        cpu.load_control_state()
        cpu.socket.apic.mmio_write(0xF0, 4, 0x1FF)
        upid = UPIDS + 0x40 * number
        values = {HANDLER: ENTRY, STACKADJUST: 128, MISC: UINV << 32, PD: upid, TT: UITT | 1}
        assert all(cpu.msrs.write(index, value) for index, value in values.items())
    return machine


def descriptor(machine: Machine, number: int, destination: int, requests: int = 0) -> None:
    """UPID of processor ``number``; its notifications go to the 8-bit APIC ID ``destination``."""
    machine.memory.write_u64(UPIDS + 0x40 * number, UINV << 16 | destination << 40)
    machine.memory.write_u64(UPIDS + 0x40 * number + 8, requests)


def target(machine: Machine, number: int, vector: int) -> None:
    """The first entry of the table that every sender uses."""
    machine.memory.write_u64(UITT, 1 | vector << 8)
    machine.memory.write_u64(UITT + 8, UPIDS + 0x40 * number)


@pytest.mark.parametrize("receiver", [0, 1, 2])
def test_from_one_to_another_or_to_itself(receiver: int) -> None:
    tracer = Tracer()
    machine = machine_of_users(SEND_AND_WAIT, WAIT, WAIT, tracer=tracer)
    descriptor(machine, receiver, receiver)
    target(machine, receiver, 7)
    machine.run(max_instructions=2000)
    assert machine.memory.read(FLAG, 64) == bytes(7) + b"\x01" + bytes(56)
    assert machine.memory.read_u64(UPIDS + 0x40 * receiver + 8) == 0
    assert machine.memory.read_u64(UPIDS + 0x40 * receiver) & 3 == 0
    assert [(type(event), event.vcpu) for event in tracer] == [
        (UserInterruptsRequested, receiver),
        (UserInterruptDelivered, receiver),
    ]
    requested, delivered = tracer
    assert isinstance(requested, UserInterruptsRequested) and requested.requests == 1 << 7
    assert isinstance(delivered, UserInterruptDelivered) and (delivered.vector, delivered.rip) == (7, ENTRY)
    assert all(cpu.state.user_interrupt_flag for cpu in machine.cpus)


def test_broadcast_of_xapic_mode() -> None:
    """The destination FFH is every processor; each finds what is in its own descriptor."""
    machine = machine_of_users(SEND_AND_WAIT, WAIT, WAIT)
    for number in range(3):
        descriptor(machine, number, 0xFF, requests=1 << 20 + number)
    target(machine, 0, 7)
    machine.run(max_instructions=2000)
    counts = machine.memory.read(FLAG, 64)
    assert {vector: count for vector, count in enumerate(counts) if count} == {7: 1, 20: 1, 21: 1, 22: 1}


def test_init_clears_the_flag_and_leaves_the_msrs() -> None:
    machine = machine_of_users(WAIT)
    cpu = machine.cpu
    assert cpu.msrs.write(RR, 5)
    before = [cpu.msrs.read(index) for index in range(RR, TT + 1)]
    cpu.init()
    cpu.run_once()
    assert (cpu.state.user_interrupt_flag, cpu.state.cr4) == (False, 0)
    assert [cpu.msrs.read(index) for index in range(RR, TT + 1)] == before


def test_reset_clears_the_msrs_too() -> None:
    cpu = machine_of_users(WAIT).cpu
    assert cpu.msrs.write(RR, 5)
    cpu.reset()
    assert not cpu.state.user_interrupt_flag
    assert [cpu.msrs.read(index) for index in range(RR, TT + 1)] == [0] * 6


def test_system_management_mode_holds_them_back() -> None:
    """An SMI that came first clears CR4; RSM restores it, and the request is delivered."""
    machine = machine_of_users(WAIT)
    machine.memory.write(SMM_HANDLER, RSM)
    cpu = machine.cpu
    cpu.smi()
    cpu.run_once()
    state = cpu.state
    assert state.smm is not None and state.user_interrupt_flag
    assert cpu.msrs.write(RR, 1 << 9)
    for _ in range(10):
        if state.rip != ENTRY:
            assert state.smm is None or not state.cr4
            cpu.run_once()
    assert (state.rip, state.user_interrupt_flag, state.cr4 & UINTR) == (ENTRY, False, UINTR)
    assert machine.memory.read_u64(state.gpr[4] + 8) == CODE


@pytest.mark.parametrize("uif", [False, True])
def test_snapshots_have_the_flag_and_the_msrs(uif: bool) -> None:
    machine = machine_of_users(WAIT)
    cpu = machine.cpu
    cpu.state.user_interrupt_flag = uif
    assert cpu.msrs.write(RR, 1 << 9)
    snapshot = machine.snapshot()
    machine.run(max_instructions=50)
    assert machine.memory.read_u8(FLAG + 9) == uif
    cpu.state.user_interrupt_flag = not uif
    machine.restore(snapshot)
    assert machine.cpu.state.user_interrupt_flag is uif
    assert machine.cpu.msrs.read(RR) == 1 << 9
    machine.run(max_instructions=50)
    assert machine.memory.read_u8(FLAG + 9) == uif
