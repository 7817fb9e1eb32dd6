"""Control-flow enforcement across VM entry and VM exit: the fields, their controls, and guests with shadow stacks."""

from __future__ import annotations

import pytest
from vmx_machine import FakeProcessor, make_vmx, prepare

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import Reason
from vmcs.region import Vmcs
from vtx.addresses import GuestPhysicalAddress, LinearAddress
from vtx.bench.hypervisor import GUEST_CODE, install
from vtx.bench.listing import code
from vtx.machine import Machine
from vtx.vmx import Vmx
from vtx.vmx.ept import EptViolation
from vtx.vmx.outcome import VmEntered
from vtx.vmx.record import VmExit
from vtx.x86.event import Event, EventKind
from vtx.x86.outcome import Fault, Vector
from vtx.x86.profile import load_profile

CPUID = 10
CR4_CET = 1 << 23
GUEST = {f.GUEST_IA32_S_CET: 0x14, f.GUEST_SSP: 0x4000, f.GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR: 0x5008}
HOST = {f.HOST_IA32_S_CET: 0x3, f.HOST_SSP: 0x6004, f.HOST_IA32_INTERRUPT_SSP_TABLE_ADDR: 0x7008}
OWN = (0x1, 0x8000, 0x9000)


def entered(*controls: c.Control) -> tuple[FakeProcessor, Vmx, Vmcs]:
    processor, vmx = make_vmx(load_profile("everything"))
    state = processor.state
    state.s_cet, state.ssp, state.interrupt_ssp_table = OWN
    vmcs = prepare(vmx, *controls, fields=GUEST | HOST)
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    return processor, vmx, vmcs


def loaded(processor: FakeProcessor) -> tuple[int, int, int]:
    return processor.state.s_cet, processor.state.ssp, processor.state.interrupt_ssp_table


def test_entry_and_exit_load_all_three_registers() -> None:
    processor, vmx, vmcs = entered(c.ENTRY_LOAD_CET_STATE, c.EXIT_LOAD_CET_STATE)
    assert loaded(processor) == (0x14, 0x4000, 0x5008)
    state = processor.state
    state.s_cet, state.ssp, state.interrupt_ssp_table = 0x24, 0x3FF8, 0x1110
    vmx.exit(VmExit(CPUID))
    assert [vmcs[field] for field in GUEST] == [0x24, 0x3FF8, 0x1110]
    assert loaded(processor) == (0x3, 0x6004, 0x7008)


def test_without_the_controls_they_are_saved_only() -> None:
    processor, vmx, vmcs = entered()
    assert loaded(processor) == OWN
    vmx.exit(VmExit(CPUID))
    assert [vmcs[field] for field in GUEST] == list(OWN)
    assert loaded(processor) == OWN


def test_a_processor_without_the_control_saves_nothing() -> None:
    processor, vmx = make_vmx(load_profile("skylake-server"))
    vmcs = prepare(vmx)
    assert vmx.vmlaunch() == VmEntered()
    vmx.exit(VmExit(CPUID))
    assert f.GUEST_SSP.encoding not in vmcs.values or vmcs.values[f.GUEST_SSP.encoding] == 0
    assert processor.state.ssp == 0


@pytest.mark.parametrize(
    ("controls", "busy", "reason"), [(True, True, 48 | 1 << 25), (True, False, 48), (False, True, 48)]
)
def test_prematurely_busy_shadow_stack(controls: bool, busy: bool, reason: int) -> None:
    processor, vmx = make_vmx(load_profile("everything"))
    secondary = {f.SECONDARY_VM_EXIT_CONTROLS: c.EXIT_PREMATURELY_BUSY_SHADOW_STACK.mask} if controls else {}
    vmcs = prepare(vmx, *((c.EXIT_ACTIVATE_SECONDARY_CONTROLS,) if controls else ()), fields=secondary)
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    fault = EptViolation(GuestPhysicalAddress(0), LinearAddress(0), 2, shadow_stack=True, shadow_stack_busy=busy)
    assert vmx.second_level_fault(fault, Event(0x40, EventKind.EXTERNAL_INTERRUPT))
    assert (vmcs[f.EXIT_REASON], vmcs[f.EXIT_QUALIFICATION]) == (reason, 1 << 13 | 2)
    assert not processor.state.ssp


def test_prematurely_busy_shadow_stack_of_a_page_fault() -> None:
    _, vmx = make_vmx(load_profile("everything"))
    fields = {
        f.SECONDARY_VM_EXIT_CONTROLS: c.EXIT_PREMATURELY_BUSY_SHADOW_STACK.mask,
        f.EXCEPTION_BITMAP: 1 << 14,
    }
    vmcs = prepare(vmx, c.EXIT_ACTIVATE_SECONDARY_CONTROLS, fields=fields)
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    fault = Fault(Vector.PF, 0x43, 0x1000, shadow_stack_busy=True)
    assert vmx.delivery_fault(Event(0x40, EventKind.EXTERNAL_INTERRUPT), fault)
    assert vmcs[f.EXIT_REASON] == Reason.EXCEPTION_OR_NMI | 1 << 25


SSP_PAGE = 0x40_0000
CALL = code("""\
e8 01 00 00 00                  ; call over
f4                              ; hlt
58                              ; over: pop rax
f4                              ; hlt
""")


def guest_with_shadow_stack() -> tuple[Machine, Vmcs]:
    """A guest at ring 0 with a shadow stack in a page that is none of one."""
    machine = Machine(profile="everything", memory=16 << 20)
    vmcs = install(
        machine,
        guest=CALL,
        controls=(c.HLT_EXITING, c.ENTRY_LOAD_CET_STATE, c.EXIT_LOAD_CET_STATE),
        fields={f.EXCEPTION_BITMAP: 1 << 14 | 1 << 21, f.GUEST_IA32_S_CET: 1, f.GUEST_SSP: SSP_PAGE + 0x800},
    )
    vmcs[f.GUEST_CR0] |= 1 << 16
    vmcs[f.GUEST_CR4] |= CR4_CET
    return machine, vmcs


def test_page_fault_of_a_guest_without_a_shadow_stack_page() -> None:
    """The page is an ordinary one: error code with the bit for shadow-stack accesses; SSP as before the CALL."""
    machine, vmcs = guest_with_shadow_stack()
    assert machine.run(max_instructions=1000).exit_value == 0
    assert vmcs[f.EXIT_REASON] == Reason.EXCEPTION_OR_NMI
    assert vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] & 0xFF == 14
    assert vmcs[f.VM_EXIT_INTERRUPTION_ERROR_CODE] == 0b100_0011
    assert vmcs[f.EXIT_QUALIFICATION] == SSP_PAGE + 0x7F8
    assert (vmcs[f.GUEST_RIP], vmcs[f.GUEST_SSP]) == (GUEST_CODE, SSP_PAGE + 0x800)


@pytest.mark.parametrize("waiting", [False, True])
def test_a_tracker_that_waits_at_entry(waiting: bool) -> None:
    """The first instruction of the guest must be ENDBR64 then."""
    machine = Machine(profile="everything", memory=16 << 20)
    vmcs = install(
        machine,
        guest=b"\x90\xf4",
        controls=(c.HLT_EXITING, c.ENTRY_LOAD_CET_STATE),
        fields={f.EXCEPTION_BITMAP: 1 << 21, f.GUEST_IA32_S_CET: 4 | waiting << 11},
    )
    vmcs[f.GUEST_CR0] |= 1 << 16
    vmcs[f.GUEST_CR4] |= CR4_CET
    assert machine.run(max_instructions=1000).exit_value == 0
    if waiting:
        assert vmcs[f.EXIT_REASON] == Reason.EXCEPTION_OR_NMI
        assert vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] == 0x8000_0B15
        assert (vmcs[f.VM_EXIT_INTERRUPTION_ERROR_CODE], vmcs[f.GUEST_RIP]) == (3, GUEST_CODE)
        assert vmcs[f.GUEST_IA32_S_CET] == 4 | 1 << 11
    else:
        assert vmcs[f.EXIT_REASON] == Reason.HLT
