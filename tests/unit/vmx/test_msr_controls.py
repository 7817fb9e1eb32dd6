"""MSRs that VM entry and VM exit switch through fields of their own."""

from __future__ import annotations

from vmx_machine import make_vmx, prepare

from vmcs import controls as c
from vmcs import fields as f
from vtx.machine import Machine
from vtx.vmx.outcome import VmEntered
from vtx.vmx.record import VmExit
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
