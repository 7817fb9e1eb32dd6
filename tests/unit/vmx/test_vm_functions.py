"""VMFUNC, virtualization exceptions and PAUSE-loop exiting."""

from __future__ import annotations

import pytest
from vmx_machine import GUEST_RIP, PAGE_TABLES, FakeProcessor, make_vmx, prepare

from vmcs import controls as c
from vmcs import fields as f
from vmcs.controls import Control
from vmcs.exits import Reason
from vmcs.fields import Field
from vtx.addresses import GuestPhysicalAddress, LinearAddress
from vtx.vmx import Vmx
from vtx.vmx.ept import EptMisconfiguration, EptViolation
from vtx.vmx.outcome import Completed, VmEntered, VmExited
from vtx.x86.decode import decode
from vtx.x86.event import Event, EventKind
from vtx.x86.operations import Plain, Simple
from vtx.x86.outcome import Fault, Vector
from vtx.x86.page_rights import Privilege
from vtx.x86.second_level import AccessKind, SecondLevelFault

EPT_A, EPT_B, LIST, AREA = 0x30_0000, 0x31_0000, 0x3_6000, 0x3_7000
EPTP_BITS = 0x1E
PAUSE = decode(bytes.fromhex("f390"), 64)


def guest(*controls: Control, fields: dict[Field, int] | None = None) -> tuple[FakeProcessor, Vmx]:
    """A guest with two sets of EPT tables: A maps memory to itself, B the first 2 MBytes to the second."""
    processor, vmx = make_vmx()
    for root, first in ((EPT_A, 0), (EPT_B, 1)):
        processor.memory.write_u64(root, root + 0x1000 | 7)
        processor.memory.write_u64(root + 0x1000, root + 0x2000 | 7)
        for i in range(512):
            processor.memory.write_u64(root + 0x2000 + 8 * i, (first if i == 0 else i) << 21 | 0xB7)
    processor.memory.write(0x20_0000, processor.memory.read(0, 0x10_0000))
    values: dict[Field, int] = {
        f.EPT_POINTER: EPT_A | EPTP_BITS,
        f.GUEST_CR3: PAGE_TABLES,
        f.VM_FUNCTION_CONTROLS: 1,
        f.EPTP_LIST_ADDRESS: LIST,
        f.VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS: AREA,
        f.EPTP_INDEX: 7,
    }
    prepare(vmx, c.ENABLE_EPT, *controls, fields=values | (fields or {}))
    processor.memory.write_u64(LIST, EPT_A | EPTP_BITS)
    processor.memory.write_u64(LIST + 8, EPT_B | EPTP_BITS)
    processor.memory.write_u64(LIST + 8 * 511, EPT_B | EPTP_BITS)
    processor.memory.write_u64(LIST + 16, EPT_B)  # no page-walk length
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    return processor, vmx


class TestVmfunc:
    @pytest.mark.parametrize("index", [1, 511, 1 << 32 | 1])
    def test_switches_the_ept_pointer(self, index: int) -> None:
        processor, vmx = guest(c.ENABLE_VM_FUNCTIONS)
        flags = processor.state.rflags = 0x8D7
        before = processor.mmu.resolve(0x1234, AccessKind.READ, Privilege.SUPERVISOR)
        assert vmx.vmfunc(0, index) == Completed()
        after = processor.mmu.resolve(0x1234, AccessKind.READ, Privilege.SUPERVISOR)
        assert not isinstance(before, Fault | SecondLevelFault) and not isinstance(after, Fault | SecondLevelFault)
        assert (before.physical, after.physical) == (0x1000, 0x20_1000)
        assert processor.state.rflags == flags
        assert vmx.current_vmcs is not None
        assert vmx.current_vmcs[f.EPT_POINTER] == EPT_B | EPTP_BITS
        assert vmx.current_vmcs[f.EPTP_INDEX] == 7  # changes only with "EPT-violation #VE"

    def test_the_pointer_stays_for_the_next_entry(self) -> None:
        processor, vmx = guest(c.ENABLE_VM_FUNCTIONS)
        assert vmx.vmfunc(0, 1) == Completed()
        vmx.vmcall()
        assert vmx.vmresume() == VmEntered()
        found = processor.mmu.resolve(0x1234, AccessKind.READ, Privilege.SUPERVISOR)
        assert not isinstance(found, Fault | SecondLevelFault)
        assert found.physical == 0x20_1000

    def test_records_the_index_for_virtualization_exceptions(self) -> None:
        _, vmx = guest(c.ENABLE_VM_FUNCTIONS, c.EPT_VIOLATION_VE)
        assert vmx.vmfunc(0, 511) == Completed()
        assert vmx.current_vmcs is not None
        assert vmx.current_vmcs[f.EPTP_INDEX] == 511

    @pytest.mark.parametrize(("function", "index"), [(0, 512), (0, 2), (0, 3), (1, 1), (63, 1), (1 << 32 | 1, 1)])
    def test_exits(self, function: int, index: int) -> None:
        processor, vmx = guest(c.ENABLE_VM_FUNCTIONS)
        processor.memory.write_u64(LIST + 8 * 512, EPT_B | EPTP_BITS)  # a good one, but beyond the list
        assert vmx.vmfunc(function, index) == VmExited(Reason.VMFUNC, 0)

    def test_exits_for_a_disabled_function(self) -> None:
        _, vmx = guest(c.ENABLE_VM_FUNCTIONS, fields={f.VM_FUNCTION_CONTROLS: 0})
        assert vmx.vmfunc(0, 1) == VmExited(Reason.VMFUNC, 0)

    def test_invalid_opcode(self) -> None:
        _, vmx = guest(c.ENABLE_VM_FUNCTIONS)
        assert vmx.vmfunc(64, 1) == Fault(Vector.UD)
        vmx.vmcall()
        assert vmx.vmfunc(0, 1) == Fault(Vector.UD)
        _, vmx = guest()
        assert vmx.vmfunc(0, 1) == Fault(Vector.UD)

    def test_needs_no_privilege__as_machine_code(self) -> None:
        processor, vmx = guest(c.ENABLE_VM_FUNCTIONS)
        for number in (1, 2):
            processor.state.segments[number].access_rights |= 3 << 5
        processor.state.gpr[0], processor.state.gpr[1] = 0, 1
        instruction = decode(bytes.fromhex("0f01d4"), 64)
        assert instruction is not None
        assert vmx.execute(instruction)
        assert processor.state.rip == GUEST_RIP + 3
        assert vmx.non_root


class TestVirtualizationException:
    violation = EptViolation(GuestPhysicalAddress(0x1234), LinearAddress(0x5678), 0x181)

    def test_fills_the_area_and_is_delivered(self) -> None:
        processor, vmx = guest(c.EPT_VIOLATION_VE)
        assert not vmx.second_level_fault(self.violation, None)
        assert vmx.non_root
        assert [(event.vector, event.kind, event.error_code) for event in processor.delivered] == [
            (20, EventKind.HARDWARE_EXCEPTION, None)
        ]
        memory = processor.memory
        assert (memory.read_u32(AREA), memory.read_u32(AREA + 4)) == (48, 0xFFFF_FFFF)
        assert [memory.read_u64(AREA + offset) for offset in (8, 16, 24)] == [0x181, 0x5678, 0x1234]
        assert memory.read_u16(AREA + 32) == 7

    def test_area_in_use__exits(self) -> None:
        processor, vmx = guest(c.EPT_VIOLATION_VE)
        processor.memory.write_u32(AREA + 4, 1)
        assert vmx.second_level_fault(self.violation, None)
        assert vmx.current_vmcs is not None
        assert vmx.current_vmcs[f.EXIT_REASON] == Reason.EPT_VIOLATION
        assert processor.memory.read_u32(AREA) == 0

    def test_exception_bitmap__exits_with_the_area_filled(self) -> None:
        processor, vmx = guest(c.EPT_VIOLATION_VE, fields={f.EXCEPTION_BITMAP: 1 << 20})
        assert vmx.second_level_fault(self.violation, None)
        assert vmx.current_vmcs is not None
        assert vmx.current_vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] == 1 << 31 | 3 << 8 | 20
        assert processor.memory.read_u32(AREA + 4) == 0xFFFF_FFFF

    @pytest.mark.parametrize(
        ("fault", "delivering"),
        [
            (EptViolation(GuestPhysicalAddress(0x1234), None, 1, suppressed=True), None),
            (EptMisconfiguration(GuestPhysicalAddress(0x1234), None), None),
            (violation, Event(0x41, EventKind.EXTERNAL_INTERRUPT)),
        ],
    )
    def test_not_convertible__exits(self, fault: SecondLevelFault, delivering: Event | None) -> None:
        processor, vmx = guest(c.EPT_VIOLATION_VE)
        assert vmx.second_level_fault(fault, delivering)
        assert processor.delivered == []
        assert processor.memory.read_u32(AREA + 4) == 0

    def test_without_the_control__exits(self) -> None:
        _, vmx = guest()
        assert vmx.second_level_fault(self.violation, None)

    @pytest.mark.parametrize("present", [True, False])
    @pytest.mark.parametrize("suppress", [True, False])
    def test_bit_63_of_the_last_entry_suppresses(self, present: bool, suppress: bool) -> None:
        processor, _ = guest(c.EPT_VIOLATION_VE)
        entry = (5 << 21 | 0xB1 if present else 0) | suppress << 63
        processor.memory.write_u64(EPT_A + 0x2000 + 8 * 5, entry)
        found = processor.mmu.resolve(0xA0_0000, AccessKind.WRITE, Privilege.SUPERVISOR)
        assert isinstance(found, EptViolation)
        assert found.suppressed == suppress


class TestPauseLoop:
    GAP, WINDOW = 50, 1000

    def guest(self, cpl: int = 0) -> tuple[FakeProcessor, Vmx]:
        processor, vmx = guest(c.PAUSE_LOOP_EXITING, fields={f.PLE_GAP: self.GAP, f.PLE_WINDOW: self.WINDOW})
        for number in (1, 2):
            processor.state.segments[number].access_rights |= cpl << 5
        return processor, vmx

    def pause(self, vmx: Vmx) -> bool:
        assert PAUSE is not None
        return vmx.intercept(Simple(Plain.PAUSE), PAUSE)

    def spin(self, processor: FakeProcessor, vmx: Vmx, ticks: int, most: int = 1000) -> int:
        """Execute PAUSE every ``ticks`` until it exits, at most ``most`` times; the time this took."""
        start = processor.ticks
        for _ in range(most):
            assert self.pause(vmx)
            if not vmx.non_root:
                break
            processor.ticks += ticks
        return processor.ticks - start

    def test_a_tight_loop_exits_once_the_window_is_over(self) -> None:
        processor, vmx = self.guest()
        taken = self.spin(processor, vmx, self.GAP)
        assert self.WINDOW < taken < self.WINDOW + 500
        assert vmx.current_vmcs is not None
        assert vmx.current_vmcs[f.EXIT_REASON] == Reason.PAUSE
        assert vmx.current_vmcs[f.VM_EXIT_INSTRUCTION_LENGTH] == 2

    def test_a_loose_loop_does_not(self) -> None:
        processor, vmx = self.guest()
        self.spin(processor, vmx, self.GAP + 1, most=100)
        assert vmx.non_root

    def test_a_gap_begins_a_new_loop__so_does_an_entry(self) -> None:
        processor, vmx = self.guest()
        self.spin(processor, vmx, self.GAP, most=4)
        processor.ticks += self.GAP + 1
        assert self.spin(processor, vmx, self.GAP) > self.WINDOW
        assert vmx.vmresume() == VmEntered()
        assert self.spin(processor, vmx, self.GAP) > self.WINDOW

    def test_above_cpl_0__is_no_concern(self) -> None:
        _, vmx = self.guest(cpl=3)
        assert not self.pause(vmx)

    def test_pause_exiting_comes_first(self) -> None:
        _, vmx = guest(c.PAUSE_LOOP_EXITING, c.PAUSE_EXITING)
        assert self.pause(vmx)
        assert not vmx.non_root


def test_tsc_scaling() -> None:
    fields: dict[Field, int] = {f.TSC_MULTIPLIER: 5 << 47, f.TSC_OFFSET: 100}
    _, vmx = guest(c.USE_TSC_OFFSETTING, c.USE_TSC_SCALING, fields=fields)
    assert vmx.guest_tsc(1001) == 2502 + 100
    assert vmx.guest_tsc((1 << 64) - 1) == (((1 << 64) - 1) * 5 // 2 + 100) % (1 << 64)
    _, vmx = guest(c.USE_TSC_SCALING, fields=fields)  # counts only together with offsetting
    assert vmx.guest_tsc(1001) == 1001
