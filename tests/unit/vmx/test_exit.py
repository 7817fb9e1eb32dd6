"""VM exit: what is saved, what is loaded, and when it cannot complete."""

from __future__ import annotations

import pytest
from attrs import evolve
from vmx_machine import BUSY_TSS, CODE_64, DATA, HOST_RIP, PAGE_TABLES, REGION_A, UNUSABLE, launch, make_vmx, prepare

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import AbortIndicator, Reason
from vmcs.fields import Field
from vtx.vmx import Vmx
from vtx.vmx.outcome import EntryFailed, VmEntered, VmExited, VmxAborted
from vtx.vmx.record import NMI_WORD, VmExit
from vtx.x86.monitor import Monitor
from vtx.x86.outcome import InstructionAborted
from vtx.x86.state import Activity, Segment, Shadow

AREA = 0x3_8000


def read(vmx: Vmx, *fields: Field) -> list[int]:
    assert vmx.current_vmcs is not None
    return [vmx.current_vmcs[field] for field in fields]


def test_saves_registers() -> None:
    processor, vmx, _ = launch()
    state = processor.state
    state.rip, state.gpr[4], state.rflags = 0x1111, 0x2222, 0x246
    state.cr0, state.cr3, state.cr4 = 0x8000_0033, 0x33000, 0x26A0
    state.segments[3] = Segment(0x23, 0x1000, 0xFFFF, 0x40F3)
    state.segments[0] = Segment(0x2B, 0x44, 0x55, UNUSABLE)
    state.ldtr = Segment(0x30, 0x3000, 0x7F, 0x82)
    state.gdtr.base, state.gdtr.limit = 0x7000, 0x37
    state.idtr.base, state.idtr.limit = 0x7100, 0x7FF
    processor.msrs.values.update({0x174: 0x18, 0x175: 0x5000, 0x176: 0x6000})
    vmx.vmcall()
    assert read(vmx, f.GUEST_RIP, f.GUEST_RSP, f.GUEST_RFLAGS) == [0x1111, 0x2222, 0x246]
    assert read(vmx, f.GUEST_CR0, f.GUEST_CR3, f.GUEST_CR4) == [0x8000_0033, 0x33000, 0x26A0]
    assert read(vmx, f.GUEST_DS_SELECTOR, f.GUEST_DS_BASE, f.GUEST_DS_LIMIT, f.GUEST_DS_ACCESS_RIGHTS) == [
        0x23,
        0x1000,
        0xFFFF,
        0x40F3,
    ]
    assert read(vmx, f.GUEST_ES_SELECTOR, f.GUEST_ES_ACCESS_RIGHTS) == [0x2B, UNUSABLE]
    assert read(vmx, f.GUEST_LDTR_SELECTOR, f.GUEST_LDTR_BASE, f.GUEST_LDTR_ACCESS_RIGHTS) == [0x30, 0x3000, 0x82]
    assert read(vmx, f.GUEST_GDTR_BASE, f.GUEST_GDTR_LIMIT, f.GUEST_IDTR_BASE, f.GUEST_IDTR_LIMIT) == [
        0x7000,
        0x37,
        0x7100,
        0x7FF,
    ]
    assert read(vmx, f.GUEST_IA32_SYSENTER_CS, f.GUEST_IA32_SYSENTER_ESP, f.GUEST_IA32_SYSENTER_EIP) == [
        0x18,
        0x5000,
        0x6000,
    ]


def test_address_range_monitoring__ends_with_entries_and_exits() -> None:
    processor, vmx = make_vmx()
    prepare(vmx)
    processor.monitor = Monitor(0x1000, bytes(64))
    assert vmx.vmlaunch() == VmEntered()
    assert processor.monitor is None
    processor.monitor = Monitor(0x1000, bytes(64))
    vmx.vmcall()
    assert processor.monitor is None


def test_loads_the_host() -> None:
    processor, vmx, _ = launch()
    state = processor.state
    state.segments = [Segment(0x99, 0x9999, 0x999, 0x40F3) for _ in range(6)]
    state.tr, state.idtr.limit, state.gdtr.limit = Segment(0x99, 0x9999, 0x999, 0x83), 9, 9
    state.cr0, state.cr3, state.cr4, state.rflags = 0x33, 0x9000, 0x26A0, 0x10246
    processor.state.dr7 = 0x4FF
    processor.state.debugctl = 3
    processor.state.activity = Activity.HLT
    processor.state.shadow = Shadow.STI
    processor.state.ldtr = Segment(0x30, 0x3000, 0x7F, 0x82)
    loads = processor.control_loads
    vmx.exit(VmExit(Reason.HLT))
    state = processor.state
    assert processor.control_loads == loads + 1
    assert (state.rip, state.gpr[4], state.rflags) == (HOST_RIP, 0xFFFF_8000_0000_8000, 2)
    assert (state.cr0, state.cr3, state.cr4, state.efer) == (0x8005_0033, 0x10000, 0x2020, 0xD01)
    assert (state.dr7, processor.msrs.read(0x1D9)) == (0x400, 0)
    assert [processor.msrs.read(index) for index in (0x174, 0x175, 0x176)] == [
        0x30,
        0xFFFF_8000_0006_0000,
        0xFFFF_8000_0007_0000,
    ]
    assert state.segments[1] == Segment(0x08, 0, 0xFFFF_FFFF, CODE_64)
    assert state.segments[2] == Segment(0x10, 0, 0xFFFF_FFFF, DATA)
    assert state.segments[4] == Segment(0x20, 0xFFFF_8000_0001_0000, 0xFFFF_FFFF, DATA)
    assert state.segments[5].base == 0xFFFF_8000_0002_0000
    assert state.segments[5].access_rights & UNUSABLE
    assert state.segments[0].access_rights & UNUSABLE
    assert state.tr == Segment(0x18, 0xFFFF_8000_0003_0000, 0x67, BUSY_TSS)
    assert (state.ldtr.selector, state.ldtr.access_rights) == (0, UNUSABLE)
    assert (state.gdtr.base, state.gdtr.limit) == (0xFFFF_8000_0004_0000, 0xFFFF)
    assert (state.idtr.base, state.idtr.limit) == (0xFFFF_8000_0005_0000, 0xFFFF)
    assert (state.activity, state.shadow) == (Activity.ACTIVE, Shadow.NONE)


def test_saved_guest_that_cannot_run__is_refused_at_the_next_entry() -> None:
    processor, vmx, _ = launch()
    processor.state.rip = 1 << 63
    vmx.vmcall()
    assert isinstance(vmx.vmresume(), EntryFailed)


def test_records_only_what_the_exit_defines() -> None:
    _, vmx, vmcs = launch()
    keep = (f.VM_EXIT_INSTRUCTION_LENGTH, f.VM_EXIT_INSTRUCTION_INFORMATION, f.GUEST_LINEAR_ADDRESS)
    for field in keep:
        vmcs[field] = 0x77
    vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] = vmcs[f.IDT_VECTORING_INFORMATION] = 1 << 31
    vmcs[f.EXIT_QUALIFICATION] = 0x77
    vmx.exit(VmExit(Reason.PREEMPTION_TIMER_EXPIRED))
    assert read(vmx, *keep) == [0x77, 0x77, 0x77]
    assert read(vmx, f.VM_EXIT_INTERRUPTION_INFORMATION, f.IDT_VECTORING_INFORMATION, f.EXIT_QUALIFICATION) == [0, 0, 0]


@pytest.mark.parametrize("save", [True, False])
def test_debug_controls__saved_if_asked_for(save: bool) -> None:
    processor, vmx, _ = launch(*((c.EXIT_SAVE_DEBUG_CONTROLS,) if save else ()))
    processor.state.dr7 = 0x4AA
    processor.state.debugctl = 1
    vmx.vmcall()
    assert read(vmx, f.GUEST_DR7, f.GUEST_IA32_DEBUGCTL) == ([0x4AA, 1] if save else [0x400, 0])


@pytest.mark.parametrize("save", [True, False])
def test_efer_and_pat__saved_and_loaded_if_asked_for(save: bool) -> None:
    controls = (
        (c.EXIT_SAVE_IA32_EFER, c.EXIT_SAVE_IA32_PAT, c.EXIT_LOAD_IA32_EFER, c.EXIT_LOAD_IA32_PAT) if save else ()
    )
    processor, vmx, _ = launch(*controls, fields={f.HOST_IA32_EFER: 0x500, f.HOST_IA32_PAT: 0x0101_0101_0101_0101})
    processor.state.efer = 0xD01
    processor.msrs.values[0x277] = 0x0606_0606_0606_0606
    vmx.vmcall()
    if save:
        assert read(vmx, f.GUEST_IA32_EFER, f.GUEST_IA32_PAT) == [0xD01, 0x0606_0606_0606_0606]
        assert (processor.state.efer, processor.msrs.read(0x277)) == (0x500, 0x0101_0101_0101_0101)
    else:
        assert read(vmx, f.GUEST_IA32_EFER, f.GUEST_IA32_PAT) == [0, 0]
        assert (processor.state.efer, processor.msrs.read(0x277)) == (0xD01, 0x0606_0606_0606_0606)


def test_mode_of_the_guest__is_stored_into_the_entry_controls() -> None:
    processor, vmx, vmcs = launch()
    processor.state.efer = 0x901
    processor.state.cr0 &= ~(1 << 31)
    vmx.exit(VmExit(Reason.CPUID))
    assert not vmcs[f.VM_ENTRY_CONTROLS] & c.ENTRY_IA32E_MODE_GUEST.mask
    assert f.VM_ENTRY_CONTROLS.encoding in vmcs.changed


def test_interruptibility_and_activity() -> None:
    processor, vmx, _ = launch()
    processor.state.shadow = Shadow.MOV_SS
    processor.state.nmi_blocked = True
    processor.state.activity = Activity.HLT
    vmx.exit(VmExit(Reason.PREEMPTION_TIMER_EXPIRED))
    assert read(vmx, f.GUEST_INTERRUPTIBILITY_STATE, f.GUEST_ACTIVITY_STATE) == [0b1010, 1]


@pytest.mark.parametrize(
    ("record", "shadow", "saved"),
    [
        (VmExit(Reason.CPUID), Shadow.NONE, False),
        (VmExit(Reason.CPUID), Shadow.MOV_SS, True),
        (VmExit(Reason.CPUID), Shadow.STI, False),
        (VmExit(Reason.MONITOR_TRAP_FLAG), Shadow.NONE, True),
        (VmExit(Reason.TPR_BELOW_THRESHOLD), Shadow.NONE, True),
        (VmExit(Reason.EXCEPTION_OR_NMI, interruption=1 << 31 | 3 << 8 | 1), Shadow.MOV_SS, False),
        (VmExit(Reason.EXCEPTION_OR_NMI, interruption=1 << 31 | 3 << 8 | 6), Shadow.MOV_SS, True),
    ],
)
def test_pending_debug_exceptions(record: VmExit, shadow: Shadow, saved: bool) -> None:
    processor, vmx, _ = launch()
    processor.state.pending_debug = 0x4000
    processor.state.shadow = shadow
    vmx.exit(record)
    assert read(vmx, f.GUEST_PENDING_DEBUG_EXCEPTIONS) == [0x4000 if saved else 0]
    assert processor.state.pending_debug == 0


@pytest.mark.parametrize(("debugctl", "saved"), [(0, 0x4000), (2, 0)], ids=["each instruction", "branches"])
def test_single_step_in_the_shadow_of_mov_ss__is_saved_as_pending(debugctl: int, saved: int) -> None:
    """VM entry demands it of a guest in that state."""
    processor, vmx, _ = launch()
    processor.state.shadow, processor.state.debugctl = Shadow.MOV_SS, debugctl
    processor.state.rflags |= 1 << 8
    vmx.exit(VmExit(Reason.CPUID))
    assert read(vmx, f.GUEST_PENDING_DEBUG_EXCEPTIONS) == [saved]


@pytest.mark.parametrize("flag", [None, 0, 1])
def test_resume_flag(flag: int | None) -> None:
    processor, vmx, _ = launch()
    for before in (0, 1 << 16):
        processor.state.rflags = 2 | before
        vmx.exit(VmExit(Reason.CPUID, resume_flag=flag))
        assert read(vmx, f.GUEST_RFLAGS) == [2 | (before if flag is None else flag << 16)]
        assert vmx.vmresume() == VmEntered()


class TestNmiBlocking:
    def test_exit_due_to_nmi__blocks(self) -> None:
        processor, vmx, _ = launch()
        vmx.exit(VmExit(Reason.EXCEPTION_OR_NMI, interruption=NMI_WORD))
        assert processor.state.nmi_blocked

    def test_other_exit__leaves_it(self) -> None:
        processor, vmx, _ = launch(fields={f.GUEST_INTERRUPTIBILITY_STATE: 8})
        vmx.vmcall()
        assert processor.state.nmi_blocked

    def test_virtual_nmi_blocking__ends_with_the_guest(self) -> None:
        fields = {f.GUEST_INTERRUPTIBILITY_STATE: 8}
        processor, vmx, vmcs = launch(c.NMI_EXITING, c.VIRTUAL_NMIS, fields=fields)
        assert processor.state.nmi_blocked
        vmx.vmcall()
        assert not processor.state.nmi_blocked
        assert vmcs[f.GUEST_INTERRUPTIBILITY_STATE] == 8


class TestPdptes:
    def test_saved_with_ept_and_pae_paging(self) -> None:
        processor, vmx, vmcs = launch(c.ENABLE_EPT, fields={f.EPT_POINTER: 0x3001E})
        processor.state.efer = 0
        processor.state.pdptrs = [0x1001, 0x2001, 0x3001, 0x4001]
        vmx.exit(VmExit(Reason.CPUID))
        assert read(vmx, f.GUEST_PDPTE0, f.GUEST_PDPTE1, f.GUEST_PDPTE2, f.GUEST_PDPTE3) == [
            0x1001,
            0x2001,
            0x3001,
            0x4001,
        ]
        assert vmcs[f.GUEST_CR3] == 0x20000

    def test_not_saved_without_ept(self) -> None:
        processor, vmx, _ = launch()
        processor.state.efer = 0
        processor.state.pdptrs = [0x1001, 0x2001, 0x3001, 0x4001]
        vmx.exit(VmExit(Reason.CPUID))
        assert read(vmx, f.GUEST_PDPTE0, f.GUEST_PDPTE3) == [0, 0]

    def test_not_saved_without_pae_paging(self) -> None:
        processor, vmx, _ = launch(c.ENABLE_EPT, fields={f.EPT_POINTER: 0x3001E})
        processor.state.pdptrs = [0x1001, 0x2001, 0x3001, 0x4001]
        vmx.exit(VmExit(Reason.CPUID))
        assert read(vmx, f.GUEST_PDPTE0) == [0]


class TestMsrAreas:
    def test_stored_then_loaded(self) -> None:
        processor, vmx, vmcs = launch(
            fields={
                f.VM_EXIT_MSR_STORE_COUNT: 1,
                f.VM_EXIT_MSR_STORE_ADDRESS: AREA,
                f.VM_EXIT_MSR_LOAD_COUNT: 1,
                f.VM_EXIT_MSR_LOAD_ADDRESS: AREA + 0x100,
            }
        )
        processor.memory.write_u64(AREA, 0xC000_0082)
        processor.memory.write_u64(AREA + 0x100, 0xC000_0082)
        processor.memory.write_u64(AREA + 0x108, 0x9999)
        processor.msrs.write(0xC000_0082, 0x1234)
        vmx.vmcall()
        assert processor.memory.read_u64(AREA + 8) == 0x1234
        assert processor.msrs.read(0xC000_0082) == 0x9999
        assert vmcs[f.EXIT_REASON] == Reason.VMCALL

    @pytest.mark.parametrize("word", [0xDEAD, 0x808, 1 << 40 | 0xC000_0082, 0x9E])
    def test_store_failure__aborts(self, word: int) -> None:
        processor, vmx, _ = launch(fields={f.VM_EXIT_MSR_STORE_COUNT: 1, f.VM_EXIT_MSR_STORE_ADDRESS: AREA})
        processor.memory.write_u64(AREA, word)
        assert vmx.vmcall() == VmxAborted(AbortIndicator.SAVING_GUEST_MSRS)
        assert processor.memory.read_u32(REGION_A + 4) == 1
        assert processor.shutdown is not None
        assert "VMX abort 1" in processor.shutdown

    @pytest.mark.parametrize("word", [0xC000_0100, 0xC000_0101, 0x808, 1 << 40 | 0xC000_0082])
    def test_load_failure__aborts(self, word: int) -> None:
        processor, vmx, _ = launch(fields={f.VM_EXIT_MSR_LOAD_COUNT: 1, f.VM_EXIT_MSR_LOAD_ADDRESS: AREA})
        processor.memory.write_u64(AREA, word)
        assert vmx.vmcall() == VmxAborted(AbortIndicator.LOADING_HOST_MSRS)
        assert processor.memory.read_u32(REGION_A + 4) == 4
        assert processor.shutdown is not None


def test_timer_value__saved_if_asked_for() -> None:
    controls = (c.ACTIVATE_VMX_PREEMPTION_TIMER, c.EXIT_SAVE_VMX_PREEMPTION_TIMER_VALUE)
    processor, vmx, vmcs = launch(*controls, fields={f.VMX_PREEMPTION_TIMER_VALUE: 1000})
    processor.ticks += 400
    vmx.vmcall()
    assert vmcs[f.VMX_PREEMPTION_TIMER_VALUE] == 600
    vmx.vmresume()
    processor.ticks += 700
    vmx.vmcall()
    assert vmcs[f.VMX_PREEMPTION_TIMER_VALUE] == 0


@pytest.mark.parametrize(("controls", "survive"), [((), False), ((c.ENABLE_VPID,), True)])
def test_translations_of_the_host__survive_a_guest_with_a_vpid(controls: tuple[c.Control, ...], survive: bool) -> None:
    processor, vmx = make_vmx()
    prepare(vmx, *controls, fields={f.VPID: 7})
    entry = PAGE_TABLES + 0x2000 + 8  # maps 2 to 4 MiB
    assert processor.mmu.read(0x20_0000, 8) == 0
    old = processor.memory.read_u64(entry)
    processor.memory.write_u64(entry, 0)
    assert processor.mmu.read(0x20_0000, 8) == 0  # the stale translation is still there
    assert vmx.vmlaunch() == VmEntered()
    assert vmx.vmcall() == VmExited(Reason.VMCALL, 0)
    if survive:
        assert processor.mmu.read(0x20_0000, 8) == 0
    else:
        with pytest.raises(InstructionAborted):
            processor.mmu.read(0x20_0000, 8)
    processor.memory.write_u64(entry, old)


def test_translations_of_the_host__do_not_reach_a_guest_without_vpid() -> None:
    processor, vmx = make_vmx()
    prepare(vmx, fields={f.GUEST_CR3: PAGE_TABLES})
    assert processor.mmu.read(0x20_0000, 8) == 0
    processor.memory.write_u64(PAGE_TABLES + 0x2000 + 8, 0)
    assert vmx.vmlaunch() == VmEntered()
    with pytest.raises(InstructionAborted):
        processor.mmu.read(0x20_0000, 8)


def test_translations_of_a_guest_without_vpid__do_not_reach_the_host() -> None:
    processor, vmx = make_vmx()
    prepare(vmx, fields={f.GUEST_CR3: PAGE_TABLES})
    assert vmx.vmlaunch() == VmEntered()
    assert processor.mmu.read(0x20_0000, 8) == 0
    processor.memory.write_u64(PAGE_TABLES + 0x2000 + 8, 0)
    assert vmx.vmcall() == VmExited(Reason.VMCALL, 0)
    with pytest.raises(InstructionAborted):
        processor.mmu.read(0x20_0000, 8)


def test_32_bit_host__with_invalid_pdptes__aborts() -> None:
    processor, vmx = make_vmx()
    vmcs = prepare(vmx)
    # A 32-bit host can only have entered a 32-bit guest, from outside IA-32e mode.
    state = processor.state
    state.efer = 0
    state.segments[1].access_rights = 0xC09B
    vmx.vmwrite(f.VM_EXIT_CONTROLS, vmcs[f.VM_EXIT_CONTROLS] & ~c.EXIT_HOST_ADDRESS_SPACE_SIZE.mask)
    vmx.vmwrite(f.VM_ENTRY_CONTROLS, vmcs[f.VM_ENTRY_CONTROLS] & ~c.ENTRY_IA32E_MODE_GUEST.mask)
    vmx.vmwrite(f.GUEST_CS_ACCESS_RIGHTS, 0xC09B)
    vmx.vmwrite(f.HOST_RIP, 0x1000)
    for field in (f.HOST_FS_BASE, f.HOST_GS_BASE, f.HOST_TR_BASE, f.HOST_GDTR_BASE, f.HOST_IDTR_BASE):
        vmx.vmwrite(field, 0x5000)
    vmx.vmwrite(f.HOST_CR3, 0x22000)
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    assert vmx.vmcall() == VmExited(Reason.VMCALL, 0)
    assert (state.efer, state.segments[1].access_rights) == (0, 0xC09B)
    assert vmx.vmresume() == VmEntered()
    processor.memory.write_u64(0x22000 + 8, 0x5003)
    assert vmx.vmcall() == VmxAborted(AbortIndicator.HOST_PDPTES)
    assert processor.shutdown is not None


def test_injected_event__is_injected_once() -> None:
    """An exit clears the valid bit, whatever the exit is for; the rest of the field stays."""
    _, vmx, vmcs = launch(fields={f.VM_ENTRY_INTERRUPTION_INFORMATION: 0x8000_0030, f.GUEST_RFLAGS: 0x202})
    assert vmcs[f.VM_ENTRY_INTERRUPTION_INFORMATION] == 0x8000_0030
    vmx.exit(VmExit(Reason.CPUID))
    assert vmcs[f.VM_ENTRY_INTERRUPTION_INFORMATION] == 0x30


def test_32_bit_host__has_no_pcids_and_what_else_the_field_says() -> None:
    """CR4.PCIDE is cleared, CR4.PAE is as in the field; a 64-bit host has PAE set."""
    processor, vmx, vmcs = launch()
    vmcs[f.VM_EXIT_CONTROLS] &= ~c.EXIT_HOST_ADDRESS_SPACE_SIZE.mask
    vmcs[f.HOST_CR4], vmcs[f.HOST_CR0] = 0x2_2010, 0x33
    view = vmx.operation.view
    assert view is not None
    vmx.operation.view = evolve(view, exit=vmcs[f.VM_EXIT_CONTROLS])
    vmx.exit(VmExit(Reason.CPUID))
    assert (processor.state.cr4, processor.state.efer & 0x500) == (0x2010, 0)
