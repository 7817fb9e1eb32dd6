"""VM entry: what each stage refuses, what is loaded, what is injected."""

from __future__ import annotations

import pytest
from vmx_machine import GUEST_RIP, HOST_RIP, UNUSABLE, launch, make_vmx, prepare

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import InstructionError, Reason
from vmcs.fields import Field
from vmcs.region import LaunchState
from vtx.vmx import Vmx
from vtx.vmx.outcome import EntryFailed, Outcome, VmEntered, VmFailValid
from vtx.x86.event import Event, EventKind
from vtx.x86.profile import load_profile
from vtx.x86.state import Activity, Shadow

ENTRY_FAILURE = 1 << 31
VALID = 1 << 31
PAE_GUEST_CR3 = 0x21000


def attempt(*controls: c.Control, fields: dict[Field, int]) -> tuple[Vmx, Outcome]:
    _, vmx = make_vmx()
    prepare(vmx, *controls, fields=fields)
    return vmx, vmx.vmlaunch()


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({f.PIN_BASED_CONTROLS: 0}, InstructionError.VM_ENTRY_WITH_INVALID_CONTROL_FIELDS),
        ({f.CR3_TARGET_COUNT: 5}, InstructionError.VM_ENTRY_WITH_INVALID_CONTROL_FIELDS),
        ({f.HOST_CR0: 0}, InstructionError.VM_ENTRY_WITH_INVALID_HOST_STATE_FIELDS),
        ({f.HOST_RIP: 1 << 63}, InstructionError.VM_ENTRY_WITH_INVALID_HOST_STATE_FIELDS),
        ({f.HOST_TR_SELECTOR: 0, f.GUEST_RFLAGS: 0}, InstructionError.VM_ENTRY_WITH_INVALID_HOST_STATE_FIELDS),
    ],
)
def test_invalid_controls_or_host_state__fail_the_instruction(
    fields: dict[Field, int], error: InstructionError
) -> None:
    vmx, outcome = attempt(fields=fields)
    assert outcome == VmFailValid(error)
    assert vmx.last_failure is not None
    assert vmx.last_failure.outcome == outcome
    (violation,) = vmx.last_failure.violations
    assert {field for field, _, _ in violation.values} & set(fields)
    assert not vmx.non_root


@pytest.mark.parametrize(
    ("fields", "qualification"),
    [
        ({f.GUEST_RFLAGS: 0}, 0),
        ({f.GUEST_RIP: 1 << 63}, 0),
        ({f.GUEST_TR_ACCESS_RIGHTS: UNUSABLE}, 0),
        ({f.VMCS_LINK_POINTER: 1}, 4),
    ],
)
def test_invalid_guest_state__fails_as_an_exit_that_loads_the_host(
    fields: dict[Field, int], qualification: int
) -> None:
    processor, vmx = make_vmx()
    vmcs = prepare(vmx, fields=fields)
    vmcs[f.VM_EXIT_INSTRUCTION_LENGTH] = 7
    reason = Reason.ENTRY_FAILURE_GUEST_STATE | ENTRY_FAILURE
    assert vmx.vmlaunch() == EntryFailed(reason, qualification)
    assert vmcs[f.EXIT_REASON] == reason
    assert vmcs[f.EXIT_QUALIFICATION] == qualification
    assert vmcs[f.VM_EXIT_INSTRUCTION_LENGTH] == 7
    assert vmcs.launch_state is LaunchState.CLEAR
    assert processor.state.rip == HOST_RIP
    assert processor.state.rflags == 2
    assert vmcs[f.GUEST_RIP] == fields.get(f.GUEST_RIP, GUEST_RIP)


def test_repaired_vmcs__enters() -> None:
    vmx, _ = attempt(fields={f.GUEST_RFLAGS: 0})
    vmx.vmwrite(f.GUEST_RFLAGS, 2)
    assert vmx.vmlaunch() == VmEntered()


def test_broken_after_a_good_entry__is_noticed() -> None:
    _, vmx, _ = launch()
    vmx.vmcall()
    vmx.vmwrite(f.HOST_CR4, 0)
    assert vmx.vmresume() == VmFailValid(InstructionError.VM_ENTRY_WITH_INVALID_HOST_STATE_FIELDS)
    assert vmx.vmresume() == VmFailValid(InstructionError.VM_ENTRY_WITH_INVALID_HOST_STATE_FIELDS)


def test_success__updates_the_launch_state_and_loads_the_guest() -> None:
    processor, vmx, vmcs = launch(
        c.ENTRY_LOAD_DEBUG_CONTROLS,
        c.ENTRY_LOAD_IA32_PAT,
        c.ENTRY_LOAD_IA32_EFER,
        fields={
            f.GUEST_IA32_PAT: 0x0606_0606_0606_0606,
            f.GUEST_IA32_EFER: 0x500,
            f.GUEST_DR7: 0x401,
            f.GUEST_IA32_DEBUGCTL: 1,
            f.GUEST_INTERRUPTIBILITY_STATE: 0b1010,
            f.GUEST_GS_BASE: 0xFFFF_9000_0000_0000,
        },
    )
    state = processor.state
    assert vmcs.launch_state is LaunchState.LAUNCHED
    assert (state.rip, state.gpr[4], state.rflags) == (GUEST_RIP, 0x5000, 2)
    assert (state.cr0, state.cr3, state.cr4, state.efer) == (0x8000_0031, 0x20000, 0x2020, 0x500)
    assert (state.dr7, processor.msrs.read(0x1D9), processor.msrs.read(0x277)) == (0x401, 1, 0x0606_0606_0606_0606)
    assert [processor.msrs.read(index) for index in (0x174, 0x175, 0x176)] == [0x10, 0x1000, 0x2000]
    assert (state.gdtr.base, state.gdtr.limit, state.idtr.base, state.idtr.limit) == (0x6000, 0x27, 0x6800, 0xFFF)
    assert state.segments[5].base == 0xFFFF_9000_0000_0000
    assert state.ldtr.access_rights == UNUSABLE
    assert state.shadow == Shadow.MOV_SS
    assert state.nmi_blocked
    assert vmx.transitions == 1


@pytest.mark.parametrize("ia32e", [True, False])
def test_efer_without_load__follows_the_mode_of_the_guest(ia32e: bool) -> None:
    processor, vmx = make_vmx()
    fields = {} if ia32e else {f.GUEST_CS_ACCESS_RIGHTS: 0xC09B, f.GUEST_CR3: PAE_GUEST_CR3}
    vmcs = prepare(vmx, fields=fields)
    if not ia32e:
        vmx.vmwrite(f.VM_ENTRY_CONTROLS, vmcs[f.VM_ENTRY_CONTROLS] & ~c.ENTRY_IA32E_MODE_GUEST.mask)
    assert vmx.vmlaunch() == VmEntered()
    assert processor.state.efer == (0xD01 if ia32e else 0x801)


def test_cr0__keeps_cd_nw_and_et_of_the_processor() -> None:
    processor, vmx = make_vmx()
    prepare(vmx, fields={f.GUEST_CR0: 0x8000_0021})
    processor.state.cr0 |= 1 << 30
    assert vmx.vmlaunch() == VmEntered()
    assert processor.state.cr0 == 0xC000_0031


def test_debug_controls_not_loaded__stay() -> None:
    processor, vmx = make_vmx()
    prepare(vmx, fields={f.GUEST_DR7: 0x4FF})
    processor.state.dr7 = 0x455
    assert vmx.vmlaunch() == VmEntered()
    assert processor.state.dr7 == 0x455


def test_reserved_bits_of_dr7__are_fixed_on_loading() -> None:
    processor, _, _ = launch(c.ENTRY_LOAD_DEBUG_CONTROLS, fields={f.GUEST_DR7: 0xFFFF_FFFF})
    assert processor.state.dr7 == 0xFFFF_2FFF


class TestPdptes:
    """A guest with PAE paging."""

    FIELDS = {f.GUEST_CS_ACCESS_RIGHTS: 0xC09B, f.GUEST_CR3: PAE_GUEST_CR3}

    def enter(self, entry: int, *controls: c.Control, fields: dict[Field, int] | None = None) -> tuple[Vmx, Outcome]:
        processor, vmx = make_vmx()
        vmcs = prepare(vmx, *controls, fields=self.FIELDS | (fields or {}))
        vmx.vmwrite(f.VM_ENTRY_CONTROLS, vmcs[f.VM_ENTRY_CONTROLS] & ~c.ENTRY_IA32E_MODE_GUEST.mask)
        processor.memory.write_u64(PAE_GUEST_CR3 + 16, entry)
        return vmx, vmx.vmlaunch()

    def test_in_memory(self) -> None:
        vmx, outcome = self.enter(0x5001)
        assert outcome == VmEntered()
        assert vmx.operation.processor.state.pdptrs == [0, 0, 0x5001, 0]

    @pytest.mark.parametrize("entry", [0x5003, 0x5001 | 1 << 46, 0x5001 | 1 << 63])
    def test_reserved_bits_in_memory__fail_with_qualification_2(self, entry: int) -> None:
        _, outcome = self.enter(entry)
        assert outcome == EntryFailed(Reason.ENTRY_FAILURE_GUEST_STATE | ENTRY_FAILURE, 2)

    def test_not_present__is_not_checked(self) -> None:
        _, outcome = self.enter(0xFFFF_FFFF_FFFF_FFFE)
        assert outcome == VmEntered()

    EPT = {f.EPT_POINTER: 0x3001E}

    def test_with_ept__come_from_the_vmcs(self) -> None:
        vmx, outcome = self.enter(0x5003, c.ENABLE_EPT, fields=self.EPT | {f.GUEST_PDPTE1: 0x6001})
        assert outcome == VmEntered()
        assert vmx.operation.processor.state.pdptrs == [0, 0x6001, 0, 0]

    def test_with_ept__reserved_bits_fail_with_qualification_2(self) -> None:
        _, outcome = self.enter(0, c.ENABLE_EPT, fields=self.EPT | {f.GUEST_PDPTE3: 0x6003})
        assert outcome == EntryFailed(Reason.ENTRY_FAILURE_GUEST_STATE | ENTRY_FAILURE, 2)


class TestMsrLoad:
    AREA = 0x3_8000

    def enter(self, *entries: tuple[int, int], count: int | None = None, area: int = AREA) -> tuple[Vmx, Outcome]:
        processor, vmx = make_vmx()
        fields = {f.VM_ENTRY_MSR_LOAD_COUNT: len(entries) if count is None else count}
        prepare(vmx, fields=fields | {f.VM_ENTRY_MSR_LOAD_ADDRESS: area})
        for number, (word, value) in enumerate(entries):
            processor.memory.write_u64(area + 16 * number, word)
            processor.memory.write_u64(area + 16 * number + 8, value)
        return vmx, vmx.vmlaunch()

    def test_loads_in_order(self) -> None:
        vmx, outcome = self.enter((0xC000_0082, 1), (0xC000_0102, 2), (0xC000_0082, 3))
        assert outcome == VmEntered()
        msrs = vmx.operation.processor.msrs
        assert (msrs.read(0xC000_0082), msrs.read(0xC000_0102)) == (3, 2)

    @pytest.mark.parametrize(
        "entry",
        [
            (0xC000_0100, 0),
            (0xC000_0101, 0),
            (0x802, 0),
            (0x8FF, 0),
            (1 << 32 | 0xC000_0082, 0),
            (0xC000_0082, 1 << 63),
            (0xDEAD, 0),
            (0x9B, 0),
        ],
        ids=["FS-base", "GS-base", "x2APIC", "x2APIC-end", "reserved-bits", "non-canonical", "absent", "SMM"],
    )
    def test_bad_entry__fails_with_its_number(self, entry: tuple[int, int]) -> None:
        vmx, outcome = self.enter((0xC000_0082, 1), entry, (0xC000_0082, 9))
        assert outcome == EntryFailed(Reason.ENTRY_FAILURE_MSR_LOADING | ENTRY_FAILURE, 2)
        assert vmx.operation.processor.state.rip == HOST_RIP
        assert vmx.operation.processor.msrs.read(0xC000_0082) == 1
        assert vmx.current_vmcs is not None
        assert vmx.current_vmcs.launch_state is LaunchState.CLEAR
        assert vmx.vmlaunch() == outcome

    @pytest.mark.parametrize(("host", "guest"), [(False, 8), (True, 0)])
    def test_failure__leaves_blocking_by_nmi_as_the_host_had_it(self, host: bool, guest: int) -> None:
        """The guest's has been loaded already: an entry that fails enters nothing."""
        processor, vmx = make_vmx()
        fields = {f.VM_ENTRY_MSR_LOAD_COUNT: 1, f.VM_ENTRY_MSR_LOAD_ADDRESS: self.AREA}
        prepare(vmx, fields=fields | {f.GUEST_INTERRUPTIBILITY_STATE: guest})
        processor.memory.write_u64(self.AREA, 0xDEAD)
        processor.state.nmi_blocked = host
        assert vmx.vmlaunch() == EntryFailed(Reason.ENTRY_FAILURE_MSR_LOADING | ENTRY_FAILURE, 1)
        assert processor.state.nmi_blocked == host

    def test_unbacked_area__fails_at_once(self) -> None:
        processor, vmx = make_vmx()
        prepare(vmx, fields={f.VM_ENTRY_MSR_LOAD_COUNT: 1, f.VM_ENTRY_MSR_LOAD_ADDRESS: 0x1337_0000})
        assert not processor.memory.is_backed(0x1337_0000)
        assert vmx.vmlaunch() == EntryFailed(Reason.ENTRY_FAILURE_MSR_LOADING | ENTRY_FAILURE, 1)

    def test_longer_than_the_recommended_maximum__fails_beyond_it(self) -> None:
        vmx, outcome = self.enter(*[(0xC000_0082, n) for n in range(513)], count=0xFFFF)
        assert outcome == EntryFailed(Reason.ENTRY_FAILURE_MSR_LOADING | ENTRY_FAILURE, 513)
        assert vmx.operation.processor.msrs.read(0xC000_0082) == 511


@pytest.mark.parametrize(
    ("word", "error", "length", "event"),
    [
        (VALID | 0x20, 0, 0, Event(0x20, EventKind.EXTERNAL_INTERRUPT)),
        (VALID | 2 << 8 | 2, 0, 0, Event(2, EventKind.NMI)),
        (VALID | 1 << 11 | 3 << 8 | 14, 5, 0, Event(14, EventKind.HARDWARE_EXCEPTION, 5)),
        (VALID | 3 << 8 | 6, 5, 0, Event(6, EventKind.HARDWARE_EXCEPTION)),
        (VALID | 4 << 8 | 0x80, 0, 2, Event(0x80, EventKind.SOFTWARE_INTERRUPT, None, 2)),
        (VALID | 5 << 8 | 1, 0, 1, Event(1, EventKind.PRIVILEGED_SOFTWARE_EXCEPTION, None, 1)),
        (VALID | 6 << 8 | 3, 0, 1, Event(3, EventKind.SOFTWARE_EXCEPTION, None, 1)),
    ],
)
def test_injection(word: int, error: int, length: int, event: Event) -> None:
    fields = {
        f.VM_ENTRY_INTERRUPTION_INFORMATION: word,
        f.VM_ENTRY_EXCEPTION_ERROR_CODE: error,
        f.VM_ENTRY_INSTRUCTION_LENGTH: length,
        f.GUEST_RFLAGS: 0x202,
    }
    processor, vmx, vmcs = launch(fields=fields)
    assert [(each.vector, each.kind, each.error_code) for each in processor.delivered] == [
        (event.vector, event.kind, event.error_code)
    ]
    if event.is_software:
        assert processor.delivered[0].instruction_length == length
    assert vmcs[f.VM_ENTRY_INTERRUPTION_INFORMATION] == word
    vmx.vmcall()
    assert vmcs[f.VM_ENTRY_INTERRUPTION_INFORMATION] == word & ~VALID
    vmx.vmresume()
    assert len(processor.delivered) == 1


def test_failed_entry__keeps_the_event_to_inject() -> None:
    word = VALID | 3 << 8 | 6
    vmx, _ = attempt(fields={f.VM_ENTRY_INTERRUPTION_INFORMATION: word, f.GUEST_RFLAGS: 0})
    assert vmx.current_vmcs is not None
    assert vmx.current_vmcs[f.VM_ENTRY_INTERRUPTION_INFORMATION] == word


@pytest.mark.parametrize("activity", [each for each in Activity if each is not Activity.MWAIT])
def test_activity_states(activity: Activity) -> None:
    processor, _, vmcs = launch(fields={f.GUEST_ACTIVITY_STATE: activity})
    assert processor.state.activity is activity
    assert vmcs[f.GUEST_ACTIVITY_STATE] == activity


@pytest.mark.parametrize(("controls", "vpid"), [((), 0), ((c.ENABLE_VPID,), 5)], ids=["without-VPID", "with-VPID"])
def test_tlb_tags_follow_the_vpid(controls: tuple[c.Control, ...], vpid: int) -> None:
    processor, vmx, _ = launch(*controls, fields={f.VPID: vpid})
    assert processor.mmu.asid == vpid
    vmx.vmcall()
    assert processor.mmu.asid == 0


def test_ept__is_the_second_level_of_the_guest_alone() -> None:
    processor, vmx, _ = launch(c.ENABLE_EPT, fields={f.EPT_POINTER: 0x3001E})
    assert processor.mmu.second_level.tag == 0x3001E
    vmx.vmcall()
    assert processor.mmu.second_level.tag is None


@pytest.mark.parametrize(("cr0", "efer"), [(0x31, 0x901), (0x8000_0031, 0x801)])
def test_guest_outside_ia_32e_mode__keeps_lme_unless_it_pages(cr0: int, efer: int) -> None:
    """Without "load IA32_EFER", LMA is that of the control, and so is LME if CR0.PG is loaded with 1."""
    processor, vmx = make_vmx()
    vmcs = prepare(vmx, c.ENABLE_EPT, c.UNRESTRICTED_GUEST, fields={f.EPT_POINTER: 0x3001E, f.GUEST_CR0: cr0})
    vmcs[f.VM_ENTRY_CONTROLS] &= ~c.ENTRY_IA32E_MODE_GUEST.mask
    vmcs[f.GUEST_CS_ACCESS_RIGHTS], vmcs[f.GUEST_CR4] = 0xC09B, 0x2000
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    assert processor.state.efer == efer  # the host's is D01H


LAM_U48 = 1 << 62


def test_linear_address_masking__in_the_cr3_of_guest_and_host() -> None:
    processor, vmx = make_vmx(load_profile("everything"))
    vmcs = prepare(vmx)
    vmcs[f.GUEST_CR3] |= LAM_U48
    vmcs[f.HOST_CR3] |= LAM_U48
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    assert processor.state.cr3 & LAM_U48


def test_linear_address_masking__not_of_other_processors() -> None:
    _, vmx = make_vmx(load_profile("skylake-server"))
    prepare(vmx)[f.GUEST_CR3] |= LAM_U48
    outcome = vmx.vmlaunch()
    assert isinstance(outcome, EntryFailed)
    assert vmx.last_failure is not None
    assert [violation.rule.id for violation in vmx.last_failure.violations] == ["guest.cr3-width"]
