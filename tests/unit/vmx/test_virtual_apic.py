"""The virtual-APIC page: priorities, virtual interrupts, end of interrupt, self-IPIs, posted interrupts."""

from __future__ import annotations

import pytest
from vmx_machine import FakeProcessor, make_vmx, prepare

from vmcs import controls as c
from vmcs import fields as f
from vmcs.controls import Control
from vmcs.exits import Reason
from vmcs.fields import Field
from vtx.vmx import Vmx
from vtx.vmx.outcome import VmEntered
from vtx.x86.decode import decode
from vtx.x86.event import Event, EventKind
from vtx.x86.operations import MoveToControlRegister, ReadMsr, WriteMsr
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import Activity, Shadow

PAGE, DESCRIPTOR = 0x3_5000, 0x3_6040
VTPR, VPPR, VEOI, VISR, VIRR, VSELF_IPI = (
    PAGE + 0x80,
    PAGE + 0xA0,
    PAGE + 0xB0,
    PAGE + 0x100,
    PAGE + 0x200,
    PAGE + 0x3F0,
)
IF = 1 << 9
WRMSR = decode(bytes.fromhex("0f30"), 64)
MOV_CR8 = decode(bytes.fromhex("440f22c0"), 64)
NOTIFICATION = 0xF2
VID = (c.USE_TPR_SHADOW, c.VIRTUAL_INTERRUPT_DELIVERY, c.EXTERNAL_INTERRUPT_EXITING)
X2APIC = (*VID, c.VIRTUALIZE_X2APIC_MODE, c.USE_MSR_BITMAPS)
POSTED = (*VID, c.PROCESS_POSTED_INTERRUPTS, c.EXIT_ACKNOWLEDGE_INTERRUPT_ON_EXIT)


def guest(
    *controls: Control,
    rvi: int = 0,
    svi: int = 0,
    tpr: int = 0,
    rflags: int = 2 | IF,
    fields: dict[Field, int] | None = None,
) -> tuple[FakeProcessor, Vmx]:
    processor, vmx = make_vmx()
    processor.memory.write_u8(VTPR, tpr)
    values: dict[Field, int] = {
        f.VIRTUAL_APIC_ADDRESS: PAGE,
        f.GUEST_INTERRUPT_STATUS: svi << 8 | rvi,
        f.GUEST_RFLAGS: rflags,
        f.MSR_BITMAP_ADDRESS: 0x3_8000,
        f.POSTED_INTERRUPT_NOTIFICATION_VECTOR: NOTIFICATION,
        f.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS: DESCRIPTOR,
    }
    prepare(vmx, *(controls or VID), fields=values | (fields or {}))
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    return processor, vmx


def status(vmx: Vmx) -> tuple[int, int]:
    """RVI and SVI."""
    assert vmx.current_vmcs is not None
    value = vmx.current_vmcs[f.GUEST_INTERRUPT_STATUS]
    return value & 0xFF, value >> 8


def reason(vmx: Vmx) -> tuple[int, int]:
    assert vmx.current_vmcs is not None and not vmx.non_root
    return vmx.current_vmcs[f.EXIT_REASON], vmx.current_vmcs[f.EXIT_QUALIFICATION]


def bit(processor: FakeProcessor, base: int, vector: int) -> int:
    return processor.memory.read_u8(base + (vector // 32) * 16 + vector % 32 // 8) >> vector % 8 & 1


def set_bit(processor: FakeProcessor, base: int, vector: int) -> None:
    address = base + (vector // 32) * 16 + vector % 32 // 8
    processor.memory.write_u8(address, processor.memory.read_u8(address) | 1 << vector % 8)


def external(vector: int) -> Event:
    return Event(vector, EventKind.EXTERNAL_INTERRUPT)


class TestPriorities:
    @pytest.mark.parametrize(
        ("tpr", "svi", "ppr"), [(0, 0, 0), (0x35, 0, 0x35), (0x35, 0x34, 0x35), (0x35, 0x41, 0x40), (0x3F, 0x30, 0x3F)]
    )
    def test_entry_virtualizes_the_processor_priority(self, tpr: int, svi: int, ppr: int) -> None:
        processor, _ = guest(tpr=tpr, svi=svi)
        assert processor.memory.read_u32(VPPR) == ppr

    def test_entry_without_virtual_interrupt_delivery_leaves_it(self) -> None:
        processor, _ = guest(c.USE_TPR_SHADOW, tpr=0x50)
        assert processor.memory.read_u32(VPPR) == 0

    @pytest.mark.parametrize(
        ("rvi", "tpr", "svi", "delivered"),
        [
            (0x41, 0x30, 0, True),
            (0x41, 0x40, 0, False),
            (0x4F, 0x40, 0, False),
            (0x41, 0, 0x40, False),
            (0x51, 0, 0x4F, True),
        ],
    )
    def test_priority_class_decides(self, rvi: int, tpr: int, svi: int, delivered: bool) -> None:
        processor, vmx = guest(rvi=rvi, tpr=tpr, svi=svi)
        set_bit(processor, VIRR, rvi)
        assert vmx.boundary() == delivered
        assert processor.delivered == ([external(rvi)] if delivered else [])


class TestDelivery:
    def test_moves_the_request_into_service(self) -> None:
        processor, vmx = guest(rvi=0x61)
        for vector in (0x61, 0x52):
            set_bit(processor, VIRR, vector)
        assert vmx.boundary()
        assert processor.delivered == [external(0x61)]
        assert status(vmx) == (0x52, 0x61)
        assert (bit(processor, VIRR, 0x61), bit(processor, VIRR, 0x52), bit(processor, VISR, 0x61)) == (0, 1, 1)
        assert processor.memory.read_u32(VPPR) == 0x60
        assert not vmx.boundary()  # 52H is below the priority now

    def test_waits_for_the_interrupt_flag(self) -> None:
        processor, vmx = guest(rvi=0x61, rflags=2)
        assert not vmx.boundary()
        assert vmx.wants_interrupt_window() and not vmx.wants_boundary()
        processor.state.rflags |= IF
        assert vmx.wants_boundary()
        assert vmx.boundary()

    @pytest.mark.parametrize("shadow", [Shadow.STI, Shadow.MOV_SS])
    def test_waits_for_the_end_of_a_shadow(self, shadow: Shadow) -> None:
        processor, vmx = guest(rvi=0x61)
        processor.state.shadow = shadow
        assert not vmx.boundary()
        processor.state.shadow = Shadow.NONE
        assert vmx.boundary()

    def test_interrupt_window_exiting_has_it_exit_instead(self) -> None:
        processor, vmx = guest(*VID, c.INTERRUPT_WINDOW_EXITING, rvi=0x61)
        assert vmx.boundary()
        assert processor.delivered == []
        assert reason(vmx)[0] == Reason.INTERRUPT_WINDOW

    def test_comes_before_external_interrupts__after_nmis(self) -> None:
        processor, vmx = guest(rvi=0x61)
        processor.interrupt = 0x99
        assert vmx.boundary()
        assert processor.delivered == [external(0x61)]
        processor, vmx = guest(*VID, c.NMI_EXITING, rvi=0x61)
        processor.nmi = True
        assert vmx.boundary()
        assert reason(vmx)[0] == Reason.EXCEPTION_OR_NMI

    def test_wakes_from_hlt__not_from_shutdown(self) -> None:
        _, vmx = guest(rvi=0x61, fields={f.GUEST_ACTIVITY_STATE: 1})
        assert vmx.boundary()
        processor, vmx = guest(rvi=0x61)
        processor.state.activity = Activity.SHUTDOWN
        assert not vmx.boundary()

    def test_rvi_alone_is_no_request_while_running(self) -> None:
        processor, vmx = guest()
        assert vmx.current_vmcs is not None
        vmx.current_vmcs[f.GUEST_INTERRUPT_STATUS] = 0x61
        assert not vmx.boundary()
        assert processor.delivered == []


class TestTaskPriority:
    def test_lowering_it_by_mov_cr8_lets_a_request_in(self) -> None:
        processor, vmx = guest(rvi=0x61, tpr=0xFF)
        assert not vmx.boundary()
        assert MOV_CR8 is not None
        assert vmx.intercept(MoveToControlRegister(8, 0, 5), MOV_CR8)
        assert processor.memory.read_u32(VPPR) == 0x50
        assert vmx.boundary()

    def test_entry_with_the_tpr_below_its_threshold(self) -> None:
        controls = (c.USE_TPR_SHADOW, c.VIRTUALIZE_APIC_ACCESSES)
        fields: dict[Field, int] = {f.APIC_ACCESS_ADDRESS: 0x3_7000, f.TPR_THRESHOLD: 5}
        _, vmx = guest(*controls, tpr=0x4F, fields=fields)
        assert vmx.boundary()
        assert reason(vmx) == (Reason.TPR_BELOW_THRESHOLD, 0)
        _, vmx = guest(*controls, tpr=0x50, fields=fields)
        assert not vmx.boundary()

    @pytest.mark.parametrize("activity", [Activity.SHUTDOWN, Activity.WAIT_FOR_SIPI])
    def test_threshold_at_entry__not_in_shutdown(self, activity: Activity) -> None:
        controls = (c.USE_TPR_SHADOW, c.VIRTUALIZE_APIC_ACCESSES)
        fields: dict[Field, int] = {f.APIC_ACCESS_ADDRESS: 0x3_7000, f.TPR_THRESHOLD: 5}
        processor, vmx = guest(*controls, fields=fields)
        processor.state.activity = activity
        assert not vmx.boundary()

    def test_threshold_at_entry__before_all_that_is_pending(self) -> None:
        """Debug exceptions, which stay pending, an NMI window, an expired timer."""
        controls = (c.USE_TPR_SHADOW, c.VIRTUALIZE_APIC_ACCESSES, c.NMI_EXITING, c.VIRTUAL_NMIS, c.NMI_WINDOW_EXITING)
        fields: dict[Field, int] = {
            f.APIC_ACCESS_ADDRESS: 0x3_7000,
            f.TPR_THRESHOLD: 5,
            f.GUEST_PENDING_DEBUG_EXCEPTIONS: 1 << 12 | 1,
        }
        _, vmx = guest(*controls, c.ACTIVATE_VMX_PREEMPTION_TIMER, fields=fields)
        assert vmx.boundary()
        assert reason(vmx) == (Reason.TPR_BELOW_THRESHOLD, 0)
        assert vmx.current_vmcs is not None
        assert vmx.current_vmcs[f.GUEST_PENDING_DEBUG_EXCEPTIONS] == 1 << 12 | 1

    def test_single_step_is_pending_after_mov_cr8(self) -> None:
        processor, vmx = guest(c.USE_TPR_SHADOW, rflags=2 | 1 << 8)
        assert MOV_CR8 is not None
        assert vmx.intercept(MoveToControlRegister(8, 0, 5), MOV_CR8)
        assert processor.state.pending_debug == 1 << 14


class TestMsrs:
    def write(self, vmx: Vmx, index: int, value: int) -> bool:
        assert WRMSR is not None
        return vmx.intercept(WriteMsr(index, value), WRMSR)

    def test_tpr(self) -> None:
        processor, vmx = guest(*X2APIC, rvi=0x61, tpr=0x60)
        assert self.write(vmx, 0x808, 0x3C)
        assert processor.memory.read_u32(VTPR) == 0x3C
        assert vmx.boundary()

    def test_end_of_interrupt__lets_the_next_request_in(self) -> None:
        processor, vmx = guest(*X2APIC, svi=0x61, rvi=0x52)
        for vector in (0x61, 0x31):
            set_bit(processor, VISR, vector)
        set_bit(processor, VIRR, 0x52)
        assert not vmx.boundary()
        assert self.write(vmx, 0x80B, 0)
        assert status(vmx) == (0x52, 0x31)
        assert bit(processor, VISR, 0x61) == 0
        assert processor.memory.read_u32(VPPR) == 0x30
        assert vmx.boundary()
        assert processor.delivered == [external(0x52)]

    @pytest.mark.parametrize("vector", [0x3F, 0x40, 0x80, 0xFF])
    def test_end_of_interrupt__exits_for_vectors_in_the_bitmap(self, vector: int) -> None:
        bitmaps = (f.EOI_EXIT_BITMAP_0, f.EOI_EXIT_BITMAP_1, f.EOI_EXIT_BITMAP_2, f.EOI_EXIT_BITMAP_3)
        for selected in (True, False):
            chosen = dict.fromkeys(bitmaps, 0 if selected else (1 << 64) - 1)
            chosen[bitmaps[vector // 64]] ^= 1 << vector % 64
            processor, vmx = guest(*X2APIC, svi=vector, fields=dict(chosen))
            rip = processor.state.rip
            assert self.write(vmx, 0x80B, 0)
            assert vmx.non_root != selected
            if selected:
                assert reason(vmx) == (Reason.VIRTUALIZED_EOI, vector)
                assert vmx.current_vmcs is not None
                assert vmx.current_vmcs[f.GUEST_RIP] == rip + 2  # trap-like
                assert status(vmx) == (0, 0)

    def test_self_ipi(self) -> None:
        processor, vmx = guest(*X2APIC)
        assert self.write(vmx, 0x83F, 0x61)
        assert status(vmx) == (0x61, 0)
        assert bit(processor, VIRR, 0x61)
        assert vmx.boundary()

    def test_self_ipi__to_a_reserved_vector_exits(self) -> None:
        processor, vmx = guest(*X2APIC)
        assert self.write(vmx, 0x83F, 0x0F)
        assert reason(vmx) == (Reason.APIC_WRITE, 0x3F0)
        assert processor.memory.read_u32(VSELF_IPI) == 0x0F

    @pytest.mark.parametrize(("index", "value"), [(0x808, 0x100), (0x80B, 1), (0x83F, 1 << 32)])
    def test_reserved_bits_fault(self, index: int, value: int) -> None:
        processor, vmx = guest(*X2APIC)
        with pytest.raises(InstructionAborted) as aborted:
            self.write(vmx, index, value)
        assert aborted.value.cause == Fault(Vector.GP, 0)
        assert processor.memory.read_u64(PAGE + ((index & 0xFF) << 4)) == 0

    def test_other_registers_are_the_local_apics(self) -> None:
        assert WRMSR is not None
        _, vmx = guest(*X2APIC)
        assert not self.write(vmx, 0x80D, 0)
        assert not vmx.intercept(ReadMsr(0x80B), WRMSR)
        _, vmx = guest(c.USE_TPR_SHADOW, c.VIRTUALIZE_X2APIC_MODE, c.USE_MSR_BITMAPS)
        assert not self.write(vmx, 0x80B, 0)
        assert not self.write(vmx, 0x83F, 0x61)
        assert self.write(vmx, 0x808, 0)

    def test_register_virtualization_reads_the_page(self) -> None:
        assert WRMSR is not None
        processor, vmx = guest(*X2APIC, c.APIC_REGISTER_VIRTUALIZATION)
        processor.memory.write_u64(PAGE + 0x300, 0x1234_5678_9ABC_DEF0)
        assert vmx.intercept(ReadMsr(0x830), WRMSR)
        assert (processor.state.gpr[0], processor.state.gpr[2]) == (0x9ABC_DEF0, 0x1234_5678)
        assert not vmx.intercept(ReadMsr(0x900), WRMSR)

    def test_bitmap_comes_first(self) -> None:
        processor, vmx = guest(*X2APIC)
        processor.memory.write_u8(0x3_8000 + 0x800 + 0x808 // 8, 1 << 0x808 % 8)
        assert self.write(vmx, 0x808, 0x100)
        assert reason(vmx)[0] == Reason.WRMSR


class TestPostedInterrupts:
    def test_notification__moves_the_requests(self) -> None:
        processor, vmx = guest(*POSTED)
        processor.memory.write_u64(DESCRIPTOR + 8, 1 << 1 | 1 << 63)  # 41H and 7FH
        processor.memory.write_u64(DESCRIPTOR + 32, 0b11)
        processor.interrupt = NOTIFICATION
        assert vmx.boundary() is True
        assert processor.dismissed == 1
        assert processor.delivered == [external(0x7F)]
        assert status(vmx) == (0x41, 0x7F)
        assert processor.memory.read_u64(DESCRIPTOR + 8) == 0
        assert processor.memory.read_u64(DESCRIPTOR + 32) == 0b10  # ON is cleared, its neighbours are not

    def test_notification__without_the_interrupt_flag(self) -> None:
        processor, vmx = guest(*POSTED, rflags=2)
        processor.memory.write_u64(DESCRIPTOR + 8, 1 << 1)
        processor.interrupt = NOTIFICATION
        assert not vmx.boundary()
        assert vmx.non_root and processor.delivered == []
        assert status(vmx) == (0x41, 0) and bit(processor, VIRR, 0x41)
        assert vmx.wants_interrupt_window()

    def test_other_vectors_exit_acknowledged(self) -> None:
        processor, vmx = guest(*POSTED)
        processor.interrupt = NOTIFICATION - 1
        assert vmx.boundary()
        assert reason(vmx)[0] == Reason.EXTERNAL_INTERRUPT
        assert vmx.current_vmcs is not None
        assert vmx.current_vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] == 1 << 31 | NOTIFICATION - 1
        assert processor.dismissed == 0

    def test_requests_do_not_lower_rvi(self) -> None:
        processor, vmx = guest(*POSTED, rvi=0x61, rflags=2)
        processor.memory.write_u64(DESCRIPTOR + 8, 1 << 1)
        processor.interrupt = NOTIFICATION
        assert not vmx.boundary()
        assert status(vmx) == (0x61, 0)
