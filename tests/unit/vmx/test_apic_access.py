"""The APIC-access page: what is virtualized, what exits and how, and what a virtualized write leads to."""

from __future__ import annotations

import pytest
from attrs import define, field
from vmx_machine import GUEST_RIP, PAGE_TABLES, FakeProcessor, make_vmx, prepare, run_to_exit, vmx_pc

from vmcs import controls as c
from vmcs import fields as f
from vmcs.controls import Control
from vmcs.exits import Reason
from vmcs.fields import Field
from vtx.addresses import GuestPhysicalAddress, LinearAddress
from vtx.vmx import Vmx
from vtx.vmx.outcome import VmEntered
from vtx.x86.access import Operand
from vtx.x86.event import Event, EventKind
from vtx.x86.outcome import InstructionAborted
from vtx.x86.page_rights import Privilege
from vtx.x86.second_level import AccessKind, ReservedPageAccess

ACCESS, VIRTUAL = 0x3_7000, 0x3_5000
REGISTERS = (c.USE_TPR_SHADOW, c.VIRTUALIZE_APIC_ACCESSES, c.APIC_REGISTER_VIRTUALIZATION)
TPR_ONLY = (c.USE_TPR_SHADOW, c.VIRTUALIZE_APIC_ACCESSES)
DELIVERY = (*TPR_ONLY, c.VIRTUAL_INTERRUPT_DELIVERY, c.EXTERNAL_INTERRUPT_EXITING)
READ, WRITE, READ_WRITE = (True, False), (False, True), (True, True)
LINEAR_READ, LINEAR_WRITE, LINEAR_FETCH, LINEAR_EVENT = (kind << 12 for kind in range(4))


@define
class FakeInstruction:
    """An instruction with given operands; executing it writes ``value`` through the MMU, as the engine would."""

    processor: FakeProcessor
    access: ReservedPageAccess
    memory: list[Operand]
    value: int | None = None
    executed: list[int] = field(factory=list)

    def operands(self) -> list[Operand]:
        return self.memory

    def execute(self) -> bool:
        for operand in self.memory:
            if operand.reads:
                self.executed.append(self.processor.mmu.read(operand.linear, operand.size))
            if operand.writes and self.value is not None:
                self.processor.mmu.write(operand.linear, operand.size, self.value)
        return True


def guest(*controls: Control, fields: dict[Field, int] | None = None) -> tuple[FakeProcessor, Vmx]:
    processor, vmx = make_vmx()
    values: dict[Field, int] = {
        f.VIRTUAL_APIC_ADDRESS: VIRTUAL,
        f.APIC_ACCESS_ADDRESS: ACCESS,
        f.GUEST_CR3: PAGE_TABLES,
    }
    prepare(vmx, *controls, fields=values | (fields or {}))
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    processor.memory.write(processor.state.rip, bytes.fromhex("8903"))
    return processor, vmx


def access(
    processor: FakeProcessor, vmx: Vmx, how: tuple[bool, bool], offset: int, size: int = 4, value: int = 0
) -> FakeInstruction:
    """One operand at ``offset`` of the page, read, written or both."""
    linear = ACCESS + offset
    kind = AccessKind.READ if how[0] else AccessKind.WRITE
    refused = ReservedPageAccess(GuestPhysicalAddress(linear), LinearAddress(linear), kind)
    instruction = FakeInstruction(processor, refused, [Operand(linear, size, *how, stack=False)], value)
    vmx.virtualize_access(instruction)
    return instruction


def reason(vmx: Vmx) -> tuple[int, int]:
    assert vmx.current_vmcs is not None and not vmx.non_root
    return vmx.current_vmcs[f.EXIT_REASON], vmx.current_vmcs[f.EXIT_QUALIFICATION]


READABLE = {0x20, 0x30, 0x80, 0xB0, 0xD0, 0xE0, 0xF0, *range(0x100, 0x290, 0x10), *range(0x300, 0x390, 0x10), 0x3E0}
WRITTEN = {0x20, 0x80, 0xB0, 0xD0, 0xE0, 0xF0, 0x280, *range(0x300, 0x390, 0x10), 0x3E0}


@pytest.mark.parametrize(
    ("controls", "readable", "writable"),
    [
        ((c.VIRTUALIZE_APIC_ACCESSES,), set(), set()),
        (TPR_ONLY, {0x80}, {0x80}),
        (DELIVERY, {0x80}, {0x80, 0xB0, 0x300}),
        (REGISTERS, READABLE, WRITTEN),
    ],
)
def test_which_registers_are_virtualized(controls: tuple[Control, ...], readable: set[int], writable: set[int]) -> None:
    for offset in range(0, 0x1000, 0x10):
        processor, vmx = guest(*controls)
        processor.memory.write_u32(VIRTUAL + offset, 0x1234_5678)
        instruction = access(processor, vmx, READ, offset)
        assert instruction.executed == ([0x1234_5678] if offset in readable else []), hex(offset)
        if offset not in readable:
            assert reason(vmx) == (Reason.APIC_ACCESS, offset | LINEAR_READ)
        processor, vmx = guest(*controls)
        access(processor, vmx, WRITE, offset, value=0x1234_5678)
        if offset not in writable:
            assert reason(vmx) == (Reason.APIC_ACCESS, offset | LINEAR_WRITE)
            assert processor.memory.read_u32(VIRTUAL + offset) == 0


@pytest.mark.parametrize(
    ("offset", "size", "virtualized"),
    [(0x80, 4, True), (0x81, 1, True), (0x82, 2, True), (0x82, 4, False), (0x84, 1, False), (0x80, 8, False)],
)
def test_alignment_with_register_virtualization(offset: int, size: int, virtualized: bool) -> None:
    processor, vmx = guest(*REGISTERS)
    instruction = access(processor, vmx, READ, offset, size)
    assert bool(instruction.executed) == virtualized == vmx.non_root


@pytest.mark.parametrize(("size", "virtualized"), [(1, True), (2, True), (4, True), (8, False)])
def test_size_without_register_virtualization(size: int, virtualized: bool) -> None:
    """At the task priority alone; bytes of it that do not begin there are not it."""
    for kind in (READ, WRITE):
        processor, vmx = guest(*TPR_ONLY)
        access(processor, vmx, kind, 0x80, size, value=0)
        assert vmx.non_root == virtualized, kind
        processor, vmx = guest(*TPR_ONLY)
        access(processor, vmx, kind, 0x81, 1, value=0)
        assert not vmx.non_root, kind


def test_exit__saves_length_and_resume_flag() -> None:
    processor, vmx = guest(*TPR_ONLY)
    access(processor, vmx, READ, 0x20)
    vmcs = vmx.current_vmcs
    assert vmcs is not None
    assert vmcs[f.VM_EXIT_INSTRUCTION_LENGTH] == 2
    assert vmcs[f.GUEST_RFLAGS] & 1 << 16


def test_read_modify_write__needs_both() -> None:
    processor, vmx = guest(*REGISTERS)
    processor.memory.write_u32(VIRTUAL + 0x80, 0x20)
    assert access(processor, vmx, READ_WRITE, 0x80, value=0x30).executed == [0x20]
    assert processor.memory.read_u32(VIRTUAL + 0x80) == 0x30
    access(processor, vmx, READ_WRITE, 0x30)
    assert reason(vmx) == (Reason.APIC_ACCESS, 0x30 | LINEAR_WRITE)


def test_two_operands_on_the_page__the_second_exits() -> None:
    processor, vmx = guest(*REGISTERS)
    refused = ReservedPageAccess(GuestPhysicalAddress(ACCESS), LinearAddress(ACCESS + 0x80), AccessKind.READ)
    operands = [Operand(ACCESS + 0x310, 4, *WRITE, stack=False), Operand(ACCESS + 0x80, 4, *READ, stack=False)]
    instruction = FakeInstruction(processor, refused, operands)
    vmx.virtualize_access(instruction)
    assert instruction.executed == []
    assert reason(vmx) == (Reason.APIC_ACCESS, 0x310 | LINEAR_WRITE)


def test_operand_that_begins_on_the_page_before__exits_at_its_start() -> None:
    processor, vmx = guest(*REGISTERS)
    linear = LinearAddress(ACCESS)
    refused = ReservedPageAccess(GuestPhysicalAddress(linear), linear, AccessKind.READ)
    vmx.virtualize_access(FakeInstruction(processor, refused, [Operand(ACCESS - 2, 4, *READ, stack=False)]))
    assert reason(vmx) == (Reason.APIC_ACCESS, 0 | LINEAR_READ)


def test_fetch_and_event_delivery() -> None:
    processor, vmx = guest(*REGISTERS)
    refused = ReservedPageAccess(GuestPhysicalAddress(ACCESS), LinearAddress(ACCESS + 0x80), AccessKind.EXECUTE)
    vmx.virtualize_access(FakeInstruction(processor, refused, []))
    assert reason(vmx) == (Reason.APIC_ACCESS, 0x80 | LINEAR_FETCH)

    processor, vmx = guest(*REGISTERS)
    refused = ReservedPageAccess(GuestPhysicalAddress(ACCESS), LinearAddress(ACCESS + 0x80), AccessKind.WRITE)
    assert vmx.second_level_fault(refused, Event(0x41, EventKind.EXTERNAL_INTERRUPT))
    assert reason(vmx) == (Reason.APIC_ACCESS, 0x80 | LINEAR_EVENT)
    assert vmx.current_vmcs is not None
    assert vmx.current_vmcs[f.IDT_VECTORING_INFORMATION] == 1 << 31 | 0x41


@pytest.mark.parametrize(("delivering", "kind"), [(None, 15), (Event(0x41, EventKind.EXTERNAL_INTERRUPT), 10)])
def test_guest_physical_access(delivering: Event | None, kind: int) -> None:
    _, vmx = guest(*REGISTERS)
    assert vmx.second_level_fault(ReservedPageAccess(GuestPhysicalAddress(ACCESS), None, AccessKind.READ), delivering)
    assert reason(vmx) == (Reason.APIC_ACCESS, kind << 12)


class TestMmu:
    def test_refuses_the_page_in_a_guest_only(self) -> None:
        processor, vmx = guest(*TPR_ONLY)
        for kind in AccessKind:
            found = processor.mmu.resolve(ACCESS + 0x123, kind, Privilege.SUPERVISOR)
            assert found == ReservedPageAccess(
                GuestPhysicalAddress(ACCESS + 0x123), LinearAddress(ACCESS + 0x123), kind
            )
        assert processor.mmu.read(ACCESS - 4, 4) == 0
        with pytest.raises(InstructionAborted):
            processor.mmu.read(ACCESS - 2, 4)
        vmx.vmcall()
        assert processor.mmu.reserved_page is None

    def test_refuses_paging_structures_on_the_page(self) -> None:
        ept, tables = 0x30_0000, PAGE_TABLES + 0x2000
        processor, vmx = make_vmx()
        processor.memory.write_u64(ept, ept + 0x1000 | 7)
        processor.memory.write_u64(ept + 0x1000, 0x87 | 6 << 3)
        fields: dict[Field, int] = {
            f.VIRTUAL_APIC_ADDRESS: VIRTUAL,
            f.APIC_ACCESS_ADDRESS: tables,
            f.GUEST_CR3: PAGE_TABLES,
            f.EPT_POINTER: ept | 0x1E,
        }
        prepare(vmx, *TPR_ONLY, c.ENABLE_EPT, fields=fields)
        assert vmx.vmlaunch() == VmEntered()
        found = processor.mmu.resolve(0x1234, AccessKind.READ, Privilege.SUPERVISOR)
        assert found == ReservedPageAccess(GuestPhysicalAddress(tables), None, AccessKind.READ)


class TestWrites:
    @pytest.mark.parametrize("offset", sorted(WRITTEN - {0x80, 0x310}))
    def test_exit_after_the_write(self, offset: int) -> None:
        processor, vmx = guest(*REGISTERS)
        access(processor, vmx, WRITE, offset, value=0xDEAD_BEEF)
        assert reason(vmx) == (Reason.APIC_WRITE, offset)
        assert processor.memory.read_u32(VIRTUAL + offset) == 0xDEAD_BEEF

    def test_task_priority__keeps_its_byte_and_compares_the_threshold(self) -> None:
        processor, vmx = guest(*TPR_ONLY, fields={f.TPR_THRESHOLD: 0})
        access(processor, vmx, WRITE, 0x80, value=0xDEAD_BE2F)
        assert processor.memory.read_u32(VIRTUAL + 0x80) == 0x2F
        assert vmx.current_vmcs is not None
        vmx.current_vmcs[f.TPR_THRESHOLD] = 3
        access(processor, vmx, WRITE, 0x80, value=0x2F)
        assert reason(vmx) == (Reason.TPR_BELOW_THRESHOLD, 0)

    def test_high_half_of_the_command__keeps_the_destination(self) -> None:
        processor, vmx = guest(*REGISTERS)
        access(processor, vmx, WRITE, 0x310, value=0xDEAD_BEEF)
        assert vmx.non_root
        assert processor.memory.read_u32(VIRTUAL + 0x310) == 0xDE00_0000

    def test_end_of_interrupt(self) -> None:
        processor, vmx = guest(*DELIVERY, fields={f.GUEST_INTERRUPT_STATUS: 0x6100})
        access(processor, vmx, WRITE, 0xB0, value=5)
        assert vmx.non_root and vmx.current_vmcs is not None
        assert vmx.current_vmcs[f.GUEST_INTERRUPT_STATUS] == 0
        assert processor.memory.read_u32(VIRTUAL + 0xB0) == 0

    @pytest.mark.parametrize("extra", [0, 1 << 14, 1 << 11])
    def test_command_to_self(self, extra: int) -> None:
        processor, vmx = guest(*DELIVERY)
        access(processor, vmx, WRITE, 0x300, value=1 << 18 | 0x61 | extra)
        assert vmx.non_root and vmx.current_vmcs is not None
        assert vmx.current_vmcs[f.GUEST_INTERRUPT_STATUS] == 0x61

    @pytest.mark.parametrize(
        "command",
        [0x61, 2 << 18 | 0x61, 3 << 18 | 0x61, 1 << 18 | 0x0F]
        + [1 << 18 | 0x61 | 1 << number for number in (8, 9, 10, 12, 13, 15, 16, 17, 20, 31)],
    )
    def test_other_commands_exit(self, command: int) -> None:
        processor, vmx = guest(*DELIVERY)
        access(processor, vmx, WRITE, 0x300, value=command)
        assert reason(vmx) == (Reason.APIC_WRITE, 0x300)


def test_engine_executes_on_the_virtual_page() -> None:
    """Machine code: read-modify-write of the task priority, a read of it, and a write that exits once it is done."""
    machine = vmx_pc()
    cpu, vmx = machine.cpu, machine.cpu.vmx
    fields: dict[Field, int] = {
        f.VIRTUAL_APIC_ADDRESS: VIRTUAL,
        f.APIC_ACCESS_ADDRESS: ACCESS,
        f.GUEST_CR3: PAGE_TABLES,
    }
    prepare(vmx, *REGISTERS, fields=fields)
    # or byte [ACCESS + 0x80], 0x30; mov eax, [ACCESS + 0x80]; mov dword [ACCESS + 0xD0], 7
    code = "800c2580700300308b042580700300c70425d070030007000000"
    machine.memory.write(GUEST_RIP, bytes.fromhex(code))
    machine.memory.write_u32(VIRTUAL + 0x80, 0x41)
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    run_to_exit(machine)
    assert reason(vmx) == (Reason.APIC_WRITE, 0xD0)
    assert vmx.current_vmcs is not None
    assert vmx.current_vmcs[f.GUEST_RIP] == GUEST_RIP + len(code) // 2
    assert cpu.state.gpr[0] == 0x71
    assert machine.memory.read_u32(VIRTUAL + 0xD0) == 7
    assert machine.memory.read_u32(ACCESS + 0x80) == machine.memory.read_u32(ACCESS + 0xD0) == 0
