"""IRET and blocking by NMI in a guest: who ends it, and what an exit due to a fault of the IRET says."""

from __future__ import annotations

import pytest
from vmx_machine import GUEST_RIP, PAGE_TABLES, prepare, run_to_exit, vmx_pc

from vmcs import controls as c
from vmcs import fields as f
from vmcs.controls import Control
from vmcs.exits import Reason
from vmcs.fields import Field
from vtx.machine import Machine
from vtx.vmx.outcome import VmEntered

NMI_UNBLOCKING = 1 << 12
GP, BLOCKING_BY_NMI = 13, 1 << 3
BOTH = (c.NMI_EXITING, c.VIRTUAL_NMIS)


def run_iret(*controls: Control, code_selector: int) -> Machine:
    """A guest with blocking by NMI executes IRETQ to a VMCALL at 0x4100, with the given selector on the stack."""
    machine = vmx_pc()
    vmx = machine.cpu.vmx
    fields: dict[Field, int] = {
        f.GUEST_CR3: PAGE_TABLES,
        f.GUEST_INTERRUPTIBILITY_STATE: BLOCKING_BY_NMI,
        f.EXCEPTION_BITMAP: 1 << GP,
    }
    prepare(vmx, *controls, fields=fields)
    machine.memory.write(GUEST_RIP, bytes.fromhex("48cf"))
    machine.memory.write(0x4100, bytes.fromhex("0f01c1"))
    machine.memory.write_u64(0x6000 + 0x08, 0x00AF_9B00_0000_FFFF)
    machine.memory.write_u64(0x6000 + 0x10, 0x00CF_9300_0000_FFFF)
    for i, value in enumerate((0x4100, code_selector, 2, 0x5000, 0x10)):
        machine.memory.write_u64(0x5000 + 8 * i, value)
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    run_to_exit(machine)
    return machine


@pytest.mark.parametrize(("controls", "blocked"), [((), False), ((c.NMI_EXITING,), True), (BOTH, False)])
def test_iret_ends_blocking__unless_nmis_exit_without_virtual_nmis(
    controls: tuple[Control, ...], blocked: bool
) -> None:
    vmcs = run_iret(*controls, code_selector=0x08).cpu.vmx.current_vmcs
    assert vmcs is not None
    assert vmcs[f.EXIT_REASON] == Reason.VMCALL
    assert vmcs[f.GUEST_INTERRUPTIBILITY_STATE] == (BLOCKING_BY_NMI if blocked else 0)


@pytest.mark.parametrize(("controls", "noted"), [((), True), ((c.NMI_EXITING,), False), (BOTH, True)])
def test_exit_of_a_faulting_iret(controls: tuple[Control, ...], noted: bool) -> None:
    vmcs = run_iret(*controls, code_selector=0x7F8).cpu.vmx.current_vmcs
    assert vmcs is not None
    information = vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION]
    assert information & 0xFF == GP
    assert bool(information & NMI_UNBLOCKING) == noted
    assert vmcs[f.GUEST_INTERRUPTIBILITY_STATE] == (0 if noted else BLOCKING_BY_NMI)
