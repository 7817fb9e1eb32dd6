"""MSRs that VM entry and VM exit switch through fields of their own."""

from __future__ import annotations

import pytest
from vmx_machine import GUEST_RIP, FakeProcessor, make_vmx, prepare

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import Reason
from vmcs.fields import Field
from vmcs.region import Vmcs
from vtx.machine import Machine
from vtx.vmx import Vmx
from vtx.vmx.outcome import VmEntered
from vtx.vmx.record import VmExit
from vtx.x86.decode import decode
from vtx.x86.operations import ReadMsr, WriteMsr
from vtx.x86.outcome import InstructionAborted
from vtx.x86.profile import load_profile

IA32_PKRS = 0x6E1
CPUID = 10


def test_pkrs__is_what_supervisor_pages_are_checked_against() -> None:
    machine = Machine(profile="everything", memory=2 << 20)
    assert machine.cpu.msrs.write(IA32_PKRS, 0x1234_5678)
    assert machine.cpu.mmu.pkrs == 0x1234_5678
    assert not machine.cpu.msrs.write(IA32_PKRS, 1 << 32)
    assert not Machine(memory=2 << 20).cpu.msrs.exists(IA32_PKRS)


def test_pkrs__is_loaded_by_entry_and_exit_and_saved_by_every_exit() -> None:
    processor, vmx = make_vmx(load_profile("everything"))
    fields = {f.GUEST_IA32_PKRS: 0xAAAA_0001, f.HOST_IA32_PKRS: 0x5555_0002}
    vmcs = prepare(vmx, c.ENTRY_LOAD_PKRS, c.EXIT_LOAD_PKRS, fields=fields)
    assert vmx.vmlaunch() == VmEntered()
    assert processor.msrs.read(IA32_PKRS) == 0xAAAA_0001
    processor.msrs.write(IA32_PKRS, 0xBBBB_0003)
    vmx.exit(VmExit(CPUID))
    assert vmcs[f.GUEST_IA32_PKRS] == 0xBBBB_0003
    assert processor.msrs.read(IA32_PKRS) == 0x5555_0002


def test_pkrs__stays_without_the_controls() -> None:
    processor, vmx = make_vmx(load_profile("everything"))
    processor.msrs.write(IA32_PKRS, 7)
    vmcs = prepare(vmx, fields={f.GUEST_IA32_PKRS: 1, f.HOST_IA32_PKRS: 2})
    assert vmx.vmlaunch() == VmEntered()
    assert processor.msrs.read(IA32_PKRS) == 7
    vmx.exit(VmExit(CPUID))
    assert (processor.msrs.read(IA32_PKRS), vmcs[f.GUEST_IA32_PKRS]) == (7, 7)


# ---- IA32_SPEC_CTRL: bits 0 (IBRS) alone on the profile

IA32_SPEC_CTRL = 0x48
RDMSR, WRMSR = decode(bytes.fromhex("0f32"), 64), decode(bytes.fromhex("0f30"), 64)


def spec_ctrl_guest(shadow: int, mask: int, now: int, *, virtualize: bool = True) -> tuple[FakeProcessor, Vmx, Vmcs]:
    processor, vmx = make_vmx(load_profile("everything"))
    processor.msrs.write(IA32_SPEC_CTRL, now)
    fields = {
        f.TERTIARY_PROCESSOR_BASED_CONTROLS: c.VIRTUALIZE_IA32_SPEC_CTRL.mask if virtualize else 0,
        f.IA32_SPEC_CTRL_MASK: mask,
        f.IA32_SPEC_CTRL_SHADOW: shadow,
        f.MSR_BITMAP_ADDRESS: 0x3_8000,
    }
    vmcs = prepare(vmx, c.ACTIVATE_TERTIARY_CONTROLS, c.USE_MSR_BITMAPS, fields=fields)
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    return processor, vmx, vmcs


def test_spec_ctrl__guest_reads_the_shadow() -> None:
    processor, vmx, _ = spec_ctrl_guest(shadow=0x1_0000_0001, mask=0, now=0)
    assert vmx.intercept(ReadMsr(IA32_SPEC_CTRL), RDMSR)
    assert (processor.state.gpr[0], processor.state.gpr[2]) == (1, 1)
    assert processor.state.rip == GUEST_RIP + 2
    assert vmx.non_root
    assert not vmx.intercept(ReadMsr(0x10), RDMSR)


@pytest.mark.parametrize(("mask", "now", "value", "then"), [(0, 0, 1, 1), (1, 0, 1, 0), (1, 1, 0, 1), (0, 1, 0, 0)])
def test_spec_ctrl__masked_bits_stay_the_hosts(mask: int, now: int, value: int, then: int) -> None:
    processor, vmx, vmcs = spec_ctrl_guest(shadow=0, mask=mask, now=now)
    assert vmx.intercept(WriteMsr(IA32_SPEC_CTRL, value), WRMSR)
    assert processor.msrs.read(IA32_SPEC_CTRL) == then
    assert vmcs[f.IA32_SPEC_CTRL_SHADOW] == value


def test_spec_ctrl__what_the_msr_would_not_take_faults() -> None:
    processor, vmx, vmcs = spec_ctrl_guest(shadow=0, mask=1 << 63, now=0)
    with pytest.raises(InstructionAborted):
        vmx.intercept(WriteMsr(IA32_SPEC_CTRL, 1 << 62), WRMSR)
    assert (processor.msrs.read(IA32_SPEC_CTRL), vmcs[f.IA32_SPEC_CTRL_SHADOW]) == (0, 0)
    assert vmx.intercept(WriteMsr(IA32_SPEC_CTRL, 1 << 63), WRMSR)  # a bit that is masked off does no harm
    assert vmcs[f.IA32_SPEC_CTRL_SHADOW] == 1 << 63


def test_spec_ctrl__bitmap_comes_first() -> None:
    processor, vmx, vmcs = spec_ctrl_guest(shadow=0, mask=0, now=0)
    processor.memory.write_u8(0x3_8000 + (IA32_SPEC_CTRL >> 3), 1 << (IA32_SPEC_CTRL & 7))
    assert vmx.intercept(ReadMsr(IA32_SPEC_CTRL), RDMSR)
    assert vmcs[f.EXIT_REASON] == Reason.RDMSR


def test_spec_ctrl__without_the_control() -> None:
    _, vmx, _ = spec_ctrl_guest(shadow=1, mask=0, now=0, virtualize=False)
    assert not vmx.intercept(ReadMsr(IA32_SPEC_CTRL), RDMSR)
    assert not vmx.intercept(WriteMsr(IA32_SPEC_CTRL, 1), WRMSR)


def test_spec_ctrl__is_loaded_by_entry_and_exit() -> None:
    processor, vmx = make_vmx(load_profile("everything"))
    fields = {
        f.GUEST_IA32_SPEC_CTRL: 1,
        f.HOST_IA32_SPEC_CTRL: 0,
        f.SECONDARY_VM_EXIT_CONTROLS: c.EXIT_LOAD_IA32_SPEC_CTRL.mask,
    }
    vmcs = prepare(vmx, c.ENTRY_LOAD_IA32_SPEC_CTRL, c.EXIT_ACTIVATE_SECONDARY_CONTROLS, fields=fields)
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    assert processor.msrs.read(IA32_SPEC_CTRL) == 1
    vmx.exit(VmExit(CPUID))
    assert (processor.msrs.read(IA32_SPEC_CTRL), vmcs[f.GUEST_IA32_SPEC_CTRL]) == (0, 1)


@pytest.mark.parametrize(("field", "rule"), [(f.GUEST_IA32_SPEC_CTRL, "guest"), (f.HOST_IA32_SPEC_CTRL, "host")])
def test_spec_ctrl__reserved_bits_are_those_of_the_msr(field: Field, rule: str) -> None:
    _, vmx = make_vmx(load_profile("everything"))
    fields = {field: 2, f.SECONDARY_VM_EXIT_CONTROLS: c.EXIT_LOAD_IA32_SPEC_CTRL.mask}
    prepare(vmx, c.ENTRY_LOAD_IA32_SPEC_CTRL, c.EXIT_ACTIVATE_SECONDARY_CONTROLS, fields=fields)
    assert [violation.rule.id for violation in vmx.explain()] == [f"{rule}.spec-ctrl-reserved"]
