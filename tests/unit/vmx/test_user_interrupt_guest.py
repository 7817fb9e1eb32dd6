"""User interrupts and VMX: UINV across VM entry and VM exit, notifications and delivery in a guest, SENDUIPI there.

Spec: SDM Vol. 3, "User Interrupts", "VM Entries", "VM Exits", "APIC Virtualization and Virtual Interrupts".
"""

from __future__ import annotations

import pytest
from vmx_machine import GUEST_RIP, PAGE_TABLES, FakeProcessor, make_vmx, prepare, run_to_exit, vmx_pc

from vmcs import controls as c
from vmcs import fields as f
from vmcs.controls import Control
from vmcs.exits import Reason
from vmcs.fields import Field
from vmcs.region import Vmcs
from vtx.addresses import GuestPhysicalAddress, LinearAddress
from vtx.vmx import Vmx
from vtx.vmx.ept import EptViolation, PageModificationLogFull
from vtx.vmx.outcome import VmEntered, VmFailValid
from vtx.vmx.record import VmExit
from vtx.x86.decode import decode
from vtx.x86.operations import SendUserIpi
from vtx.x86.profile import load_profile
from vtx.x86.second_level import AccessKind, ReservedPageAccess
from vtx.x86.state import Activity

RR, HANDLER, STACKADJUST, MISC, PD, TT = range(0x985, 0x98B)
UINTR, IF = 1 << 25, 1 << 9
UINV, OTHER = 0xEC, 0x40
CPUID = 10
VALID = 1 << 31
ASYNCHRONOUS = 1 << 16
UPID, UITT, STACK, ENTRY, SERVICE = 0xA000, 0xB000, 0x5000, 0x4200, 0x4100
EPT = 0x2_0000
VIRTUAL, ACCESS, TABLE, POSTED = 0x3_5000, 0x3_7000, 0x3_6000, 0x3_8040
IDT = 0x6800
ICR_LOW, ICR_HIGH = 0x300, 0x310
VISR, VIRR = 0x100, 0x200
VMCALL, SENDUIPI = bytes.fromhex("0f01c1"), bytes.fromhex("f30fc7f0")  # of RAX
REQUESTS = 1 << 63 | 1 << 5


# UINV, alone.


def entered(*controls: Control, uinv: int = 0x55) -> tuple[FakeProcessor, Vmx, Vmcs]:
    processor, vmx = make_vmx(load_profile("everything"))
    assert processor.msrs.write(MISC, 0x33 << 32 | 0x1234)
    vmcs = prepare(vmx, *controls, fields={f.GUEST_UINV: uinv})
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    return processor, vmx, vmcs


@pytest.mark.parametrize("load", [False, True])
@pytest.mark.parametrize("clear", [False, True])
def test_uinv_across_entry_and_exit(load: bool, clear: bool) -> None:
    """UITTSZ, in the other half of the MSR, stays. The exit saves UINV whatever the controls."""
    processor, vmx, vmcs = entered(*[c.ENTRY_LOAD_UINV] * load, *[c.EXIT_CLEAR_UINV] * clear)
    assert processor.msrs.read(MISC) == (0x55 if load else 0x33) << 32 | 0x1234
    assert processor.msrs.write(MISC, 0x77 << 32 | 0x9999)
    vmx.exit(VmExit(CPUID))
    assert vmcs[f.GUEST_UINV] == 0x77
    assert processor.msrs.read(MISC) == (0 if clear else 0x77) << 32 | 0x9999


@pytest.mark.parametrize(("uinv", "enters"), [(0xFF, True), (0x100, False), (0x8000, False)])
def test_uinv_has_8_bits(uinv: int, enters: bool) -> None:
    _, vmx = make_vmx(load_profile("everything"))
    vmcs = prepare(vmx, c.ENTRY_LOAD_UINV, fields={f.GUEST_UINV: uinv})
    vmx.vmlaunch()
    assert vmx.non_root is enters
    if not enters:
        assert vmcs[f.EXIT_REASON] == 1 << 31 | Reason.ENTRY_FAILURE_GUEST_STATE


def test_a_processor_without_user_interrupts_has_no_controls() -> None:
    _, vmx = make_vmx(load_profile("skylake-server"))
    prepare(vmx, c.ENTRY_LOAD_UINV)
    assert isinstance(vmx.vmlaunch(), VmFailValid)
    _, vmx = make_vmx(load_profile("skylake-server"))
    vmcs = prepare(vmx)
    assert vmx.vmlaunch() == VmEntered()
    vmx.exit(VmExit(CPUID))
    assert not vmcs.values.get(f.GUEST_UINV.encoding)


# A guest.


class Guest:
    """64-bit code of a guest that may use user interrupts, with EPT that maps everything to itself but ``absent``."""

    def __init__(
        self,
        code: bytes = VMCALL,
        *controls: Control,
        cpl: int = 0,
        absent: int | None = None,
        fields: dict[Field, int] | None = None,
        **msrs: int,
    ) -> None:
        self.machine = machine = vmx_pc("everything")
        self.cpu, self.vmx = machine.cpu, machine.cpu.vmx
        memory = machine.memory
        for address in (PAGE_TABLES, PAGE_TABLES + 0x1000, *(PAGE_TABLES + 0x2000 + 8 * i for i in range(512))):
            memory.write_u64(address, memory.read_u64(address) | 4)
        if absent is not None:
            self._map_ept(absent)
            controls = (*controls, c.ENABLE_EPT)
        values = {
            f.GUEST_CR3: PAGE_TABLES,
            f.GUEST_CR4: 0x2020 | UINTR,
            f.GUEST_RSP: STACK,
            f.GUEST_RFLAGS: 2 | IF,
            f.EPT_POINTER: EPT | 0x1E,
            f.VIRTUAL_APIC_ADDRESS: VIRTUAL,
            f.APIC_ACCESS_ADDRESS: ACCESS,
            f.PID_POINTER_TABLE_ADDRESS: TABLE,
            f.LAST_PID_POINTER_INDEX: 9,
        }
        for name in ("ES", "CS", "SS", "DS", "FS", "GS"):
            values[getattr(f, f"GUEST_{name}_SELECTOR")] = 0x10 | cpl
            values[getattr(f, f"GUEST_{name}_ACCESS_RIGHTS")] = (0xA09B if name == "CS" else 0xC093) | cpl << 5
        self.vmcs = prepare(self.vmx, *controls, fields=values | (fields or {}))
        for place in (GUEST_RIP, SERVICE, ENTRY):
            memory.write(place, code if place == GUEST_RIP else VMCALL)
        memory.write_u64(UPID, 3 | UINV << 16)
        memory.write_u64(UPID + 8, REQUESTS)
        memory.write_u64(0x6008, 0x00AF_9B00_0000_FFFF)
        memory.write_u64(0x6010, 0x00CF_9300_0000_FFFF)
        indices = {"rr": RR, "handler": HANDLER, "misc": MISC, "pd": PD, "tt": TT}
        for msr, value in ({"handler": ENTRY, "misc": UINV << 32, "pd": UPID, "tt": UITT | 1} | msrs).items():
            assert self.cpu.msrs.write(indices[msr], value), msr
        self.cpu.state.user_interrupt_flag = True

    def _map_ept(self, absent: int) -> None:
        memory = self.machine.memory
        for level in range(3):
            memory.write_u64(EPT + 0x1000 * level, EPT + 0x1000 * (level + 1) | 7)
        for page in range(512):
            memory.write_u64(EPT + 0x3000 + 8 * page, page << 12 | 6 << 3 | (7 if page != absent >> 12 else 0))

    def gate(self, vector: int) -> None:
        """An interrupt gate to `SERVICE`."""
        self.machine.memory.write_u64(IDT + 16 * vector, SERVICE & 0xFFFF | 8 << 16 | 0x8E << 40)
        self.machine.memory.write_u64(IDT + 16 * vector + 8, 0)

    def enter(self) -> Guest:
        assert self.vmx.vmlaunch() == VmEntered(), self.vmx.last_failure
        return self

    def run(self) -> Guest:
        self.enter()
        run_to_exit(self.machine)
        return self

    def interrupt(self, vector: int) -> None:
        """An interrupt arrives at the local APIC."""
        apic = self.cpu.socket.apic
        apic.mmio_write(0xF0, 4, 0x1FF)
        self.cpu.send_interrupt(vector, 0)
        assert self.cpu.platform.interrupt_pending()

    def in_service(self) -> bool:
        """Whether the local APIC holds interrupts of the lowest priority class back."""
        return any(self.cpu.socket.apic.mmio_read(0x100 + 16 * i, 4) for i in range(8))

    def exit(self) -> tuple[int, int, int]:
        """Reason, RIP, IDT-vectoring information."""
        vmcs = self.vmcs
        return vmcs[f.EXIT_REASON], vmcs[f.GUEST_RIP], vmcs[f.IDT_VECTORING_INFORMATION]

    @property
    def requests(self) -> int:
        return self.cpu.msrs.read(RR) or 0

    @property
    def posted(self) -> tuple[int, int]:
        return self.machine.memory.read_u64(UPID) & 0xFFFF, self.machine.memory.read_u64(UPID + 8)


WAYS = ("injected", "arrives")


def notified(way: str, code: bytes = VMCALL, *controls: Control, vector: int = UINV, **more: object) -> Guest:
    """A guest to which an interrupt is injected, or one arrives at the local APIC while it runs."""
    fields = dict(more.pop("fields", {}))  # type: ignore[call-overload]
    if way == "injected":
        fields[f.VM_ENTRY_INTERRUPTION_INFORMATION] = VALID | vector
    guest = Guest(code, *controls, fields=fields, **more)  # type: ignore[arg-type]
    if way != "injected":
        guest.interrupt(vector)
    return guest


@pytest.mark.parametrize("way", WAYS)
class TestNotification:
    def test_is_processed(self, way: str) -> None:
        """Not through the IDT, which is empty; nothing is left in service."""
        guest = notified(way).run()
        assert guest.exit() == (Reason.VMCALL, GUEST_RIP, 0)
        assert (guest.requests, guest.posted) == (REQUESTS, (2, 0))
        assert not guest.in_service()

    @pytest.mark.parametrize("reason", ["vector", "control register"])
    def test_other_interrupts_go_through_the_idt(self, way: str, reason: str) -> None:
        vector = OTHER if reason == "vector" else UINV
        guest = notified(way, vector=vector)
        if reason == "control register":
            guest.vmcs[f.GUEST_CR4] &= ~UINTR
        guest.gate(vector)
        guest.run()
        assert guest.exit() == (Reason.VMCALL, SERVICE, 0)
        assert (guest.requests, guest.posted) == (0, (3, REQUESTS))

    def test_ept_violation(self, way: str) -> None:
        """During delivery of an external interrupt, not asynchronous; the descriptor is as it was."""
        guest = notified(way, absent=UPID).run()
        assert guest.exit() == (Reason.EPT_VIOLATION, GUEST_RIP, VALID | UINV)
        qualification = guest.vmcs[f.EXIT_QUALIFICATION]
        assert qualification & (2 | 1 << 7 | 1 << 8 | ASYNCHRONOUS) == 2 | 1 << 7 | 1 << 8
        assert (guest.vmcs[f.GUEST_LINEAR_ADDRESS], guest.vmcs[f.GUEST_PHYSICAL_ADDRESS]) == (UPID, UPID)
        assert (guest.requests, guest.posted) == (0, (3, REQUESTS))

    def test_page_fault_that_exits(self, way: str) -> None:
        guest = notified(way, pd=0x4000_0040, fields={f.EXCEPTION_BITMAP: 1 << 14}).run()
        assert guest.exit() == (Reason.EXCEPTION_OR_NMI, GUEST_RIP, VALID | UINV)
        assert guest.vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] == VALID | 1 << 11 | 3 << 8 | 14
        assert (guest.vmcs[f.VM_EXIT_INTERRUPTION_ERROR_CODE], guest.vmcs[f.EXIT_QUALIFICATION]) == (2, 0x4000_0040)

    def test_page_fault_that_is_delivered(self, way: str) -> None:
        guest = notified(way, pd=0x4000_0040)
        guest.gate(14)
        guest.run()
        assert guest.exit() == (Reason.VMCALL, SERVICE, 0)
        frame = guest.machine.memory
        assert (frame.read_u64(STACK - 48), frame.read_u64(STACK - 40)) == (2, GUEST_RIP)

    def test_halted_guest_stays_halted(self, way: str) -> None:
        guest = notified(way, fields={f.GUEST_ACTIVITY_STATE: 1}).enter()
        if way == "arrives":
            guest.cpu.run_once()
        assert (guest.cpu.state.activity, guest.requests) == (Activity.HLT, REQUESTS)
        assert guest.vmx.non_root

    def test_exit_of_a_guest_that_would_have_halted_again(self, way: str) -> None:
        guest = notified(way, absent=UPID, fields={f.GUEST_ACTIVITY_STATE: 1}).run()
        assert guest.exit() == (Reason.EPT_VIOLATION, GUEST_RIP, VALID | UINV)
        assert guest.vmcs[f.GUEST_ACTIVITY_STATE] == 1

    def test_it_leads_to_delivery(self, way: str) -> None:
        guest = notified(way, cpl=3).run()
        assert guest.exit() == (Reason.VMCALL, ENTRY, 0)
        assert guest.requests == 1 << 5
        assert guest.machine.memory.read_u64(STACK - 32) == 63


def test_interrupts_that_exit_are_no_notifications() -> None:
    guest = notified("arrives", VMCALL, c.EXTERNAL_INTERRUPT_EXITING, c.EXIT_ACKNOWLEDGE_INTERRUPT_ON_EXIT).run()
    assert guest.exit() == (Reason.EXTERNAL_INTERRUPT, GUEST_RIP, 0)
    assert guest.vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] == VALID | UINV
    assert (guest.requests, guest.posted) == (0, (3, REQUESTS))


@pytest.mark.parametrize("uinv", [UINV, OTHER])
def test_injection_looks_at_the_uinv_that_entry_loads(uinv: int) -> None:
    guest = notified("injected", VMCALL, c.ENTRY_LOAD_UINV, misc=0, fields={f.GUEST_UINV: uinv})
    guest.gate(UINV)
    guest.run()
    assert guest.exit() == (Reason.VMCALL, GUEST_RIP if uinv == UINV else SERVICE, 0)


class TestDelivery:
    def test_request_that_was_pending_before_entry(self) -> None:
        guest = Guest(cpl=3, rr=REQUESTS).run()
        assert guest.exit() == (Reason.VMCALL, ENTRY, 0)
        assert (guest.requests, guest.cpu.state.user_interrupt_flag) == (1 << 5, False)
        assert guest.vmcs[f.GUEST_RSP] == STACK - 32
        assert guest.machine.memory.read_u64(STACK - 24) == GUEST_RIP

    @pytest.mark.parametrize("hold", ["control register", "privilege", "blocking by MOV SS"])
    def test_held_back(self, hold: str) -> None:
        shadow = {f.GUEST_INTERRUPTIBILITY_STATE: 2} if hold.startswith("blocking") else {}
        guest = Guest(cpl=0 if hold == "privilege" else 3, rr=1, fields=shadow)
        if hold == "control register":
            guest.vmcs[f.GUEST_CR4] &= ~UINTR
        guest.run()
        assert (guest.exit()[:2], guest.requests) == ((Reason.VMCALL, GUEST_RIP), 1)

    def test_shutdown_is_not_left(self) -> None:
        guest = Guest(cpl=3, rr=1, fields={f.GUEST_ACTIVITY_STATE: 2}).enter()
        guest.cpu.run_once()
        state = guest.cpu.state
        assert (state.activity, state.rip, guest.requests) == (Activity.SHUTDOWN, GUEST_RIP, 1)

    def test_ept_violation_is_asynchronous(self) -> None:
        guest = Guest(cpl=3, rr=1, absent=STACK - 8).run()
        assert guest.exit() == (Reason.EPT_VIOLATION, GUEST_RIP, 0)
        assert guest.vmcs[f.EXIT_QUALIFICATION] & (ASYNCHRONOUS | 2) == ASYNCHRONOUS | 2
        assert guest.vmcs[f.GUEST_LINEAR_ADDRESS] == STACK - 8
        assert (guest.requests, guest.vmcs[f.GUEST_RSP], guest.cpu.state.user_interrupt_flag) == (1, STACK, True)

    def test_fault_that_exits(self) -> None:
        """It is no fault during delivery of an event through the IDT."""
        guest = Guest(cpl=3, rr=1, fields={f.GUEST_RSP: 1 << 50, f.EXCEPTION_BITMAP: 1 << 12}).run()
        assert guest.exit() == (Reason.EXCEPTION_OR_NMI, GUEST_RIP, 0)
        assert guest.vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] & 0xFF == 12
        assert guest.requests == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_qualifications_tell_of_asynchrony(asynchronous: bool) -> None:
    """EPT violations, a full log and accesses to the APIC-access page; the last has a length only for instructions."""
    for fault, reason in (
        (EptViolation(GuestPhysicalAddress(0), LinearAddress(0), 2, asynchronous=asynchronous), Reason.EPT_VIOLATION),
        (
            PageModificationLogFull(GuestPhysicalAddress(0), LinearAddress(0), asynchronous=asynchronous),
            Reason.PAGE_MODIFICATION_LOG_FULL,
        ),
        (
            ReservedPageAccess(
                GuestPhysicalAddress(ACCESS), LinearAddress(ACCESS), AccessKind.WRITE, asynchronous=asynchronous
            ),
            Reason.APIC_ACCESS,
        ),
    ):
        _, vmx, vmcs = entered()
        assert vmx.second_level_fault(fault, None)
        assert vmcs[f.EXIT_REASON] == reason
        assert bool(vmcs[f.EXIT_QUALIFICATION] & ASYNCHRONOUS) is asynchronous


# SENDUIPI.

X2APIC_DESTINATION = 0x12_0034_56


def sender(*controls: Control, **more: object) -> Guest:
    """A guest about to send vector 7 to a descriptor whose notification goes to an APIC of its own."""
    guest = Guest(SENDUIPI + VMCALL, *controls, **more)  # type: ignore[arg-type]
    memory = guest.machine.memory
    memory.write_u64(UITT, 1 | 7 << 8)
    memory.write_u64(UITT + 8, UPID)
    memory.write_u64(UPID, UINV << 16 | X2APIC_DESTINATION << 32)
    memory.write_u64(UPID + 8, 0)
    guest.cpu.state.gpr[0] = 0
    return guest


def test_sending_without_a_tpr_shadow_uses_the_local_apic() -> None:
    guest = sender()
    guest.machine.memory.write_u64(UPID, OTHER << 16)  # to itself, APIC ID 0
    guest.cpu.socket.apic.mmio_write(0xF0, 4, 0x1FF)
    guest.vmcs[f.GUEST_RFLAGS] &= ~IF
    guest.run()
    assert guest.exit()[:2] == (Reason.VMCALL, GUEST_RIP + 4)
    assert guest.posted == (1, 1 << 7)
    assert guest.cpu.platform.acknowledge_interrupt() == OTHER


@pytest.mark.parametrize("mode", [c.VIRTUALIZE_APIC_ACCESSES, None])
def test_sending_with_a_tpr_shadow_writes_the_virtual_icr(mode: Control | None) -> None:
    """As in xAPIC mode if APIC accesses are virtualized, else as in x2APIC mode. The exit is like a trap."""
    guest = sender(c.USE_TPR_SHADOW, *([mode] if mode else [])).run()
    assert guest.exit() == (Reason.APIC_WRITE, GUEST_RIP + 4, 0)
    assert guest.vmcs[f.EXIT_QUALIFICATION] == ICR_LOW
    assert guest.posted == (1, 1 << 7)
    memory = guest.machine.memory
    if mode is None:
        assert memory.read_u64(VIRTUAL + ICR_LOW) == X2APIC_DESTINATION << 32 | UINV
    else:
        assert (memory.read_u32(VIRTUAL + ICR_HIGH), memory.read_u32(VIRTUAL + ICR_LOW)) == (0x34 << 24, UINV)
    assert not guest.cpu.platform.interrupt_pending()


@pytest.mark.parametrize("held", [1, 2])
def test_no_notification_no_exit(held: int) -> None:
    guest = sender(c.USE_TPR_SHADOW)
    guest.machine.memory.write_u64(UPID, UINV << 16 | held)
    guest.run()
    assert guest.exit()[:2] == (Reason.VMCALL, GUEST_RIP + 4)
    assert guest.machine.memory.read_u64(VIRTUAL + ICR_LOW) == 0


@pytest.mark.parametrize("mode", [c.VIRTUALIZE_APIC_ACCESSES, None])
@pytest.mark.parametrize("last", [9, 4])
def test_sending_with_ipi_virtualization(mode: Control | None, last: int) -> None:
    """Posted for the virtual processor whose APIC ID is the destination, 5; without an entry for it, an exit."""
    guest = sender(
        *(c.USE_TPR_SHADOW, c.ACTIVATE_TERTIARY_CONTROLS),
        *([mode] if mode else []),
        fields={f.TERTIARY_PROCESSOR_BASED_CONTROLS: c.IPI_VIRTUALIZATION.mask, f.LAST_PID_POINTER_INDEX: last},
    )
    memory = guest.machine.memory
    memory.write_u64(UPID, UINV << 16 | (5 << 8 if mode else 5) << 32)
    memory.write_u64(TABLE + 8 * 5, POSTED | 1)
    memory.write_u64(POSTED + 32, 2)  # SN: nobody is to be notified of what is posted
    guest.run()
    posted = int.from_bytes(memory.read(POSTED, 32), "little")
    if last < 5:
        assert (guest.exit()[:2], posted) == ((Reason.APIC_WRITE, GUEST_RIP + 4), 0)
    else:
        assert (guest.exit()[:2], posted) == ((Reason.VMCALL, GUEST_RIP + 4), 1 << UINV)


def test_sending_to_a_descriptor_that_ept_does_not_map() -> None:
    """An access of the instruction, with nothing of it done."""
    guest = sender(absent=UPID).run()
    assert guest.exit() == (Reason.EPT_VIOLATION, GUEST_RIP, 0)
    assert guest.vmcs[f.EXIT_QUALIFICATION] & (2 | ASYNCHRONOUS) == 2
    assert guest.posted[1] == 0


def test_sending_is_never_intercepted() -> None:
    _, vmx, _ = entered()
    assert not vmx.intercept(SendUserIpi(UINV, 0), decode(SENDUIPI, 64))
    assert vmx.non_root


# Virtual interrupts.


@pytest.mark.parametrize("second", [0, OTHER])
@pytest.mark.parametrize("eoi_exit", [False, True])
def test_virtual_interrupt_that_is_a_notification(second: int, eoi_exit: bool) -> None:
    """Its service ends at once: the one behind it is not held back, and the EOI-exit bitmap is not looked at."""
    bitmap = {f.EOI_EXIT_BITMAP_3: 1 << (UINV & 63)} if eoi_exit else {}
    guest = Guest(
        VMCALL,
        *(c.USE_TPR_SHADOW, c.VIRTUAL_INTERRUPT_DELIVERY, c.EXTERNAL_INTERRUPT_EXITING),
        fields={f.GUEST_INTERRUPT_STATUS: UINV} | bitmap,
    )
    memory = guest.machine.memory
    for vector in (UINV, second):
        if vector:
            address = VIRTUAL + VIRR + vector // 32 * 16
            memory.write_u32(address, memory.read_u32(address) | 1 << vector % 32)
    guest.gate(OTHER)
    guest.run()
    assert guest.exit() == (Reason.VMCALL, SERVICE if second else GUEST_RIP, 0)
    assert (guest.requests, guest.posted) == (REQUESTS, (2, 0))
    assert guest.vmcs[f.GUEST_INTERRUPT_STATUS] == second << 8
    assert memory.read_u32(VIRTUAL + VISR + UINV // 32 * 16) == 0
