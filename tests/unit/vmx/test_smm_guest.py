"""System-management interrupts in VMX root and non-root operation: out of VMX operation, and back by RSM."""

from __future__ import annotations

import pytest
from vmx_machine import GUEST_RIP, PAGE_TABLES, REGION_A, VMXON_REGION, prepare, run_to_exit, vmx_pc

from vmcs import controls as c
from vmcs import fields as f
from vmcs.controls import Control
from vmcs.exits import Reason
from vmcs.fields import Field
from vtx.machine import Machine
from vtx.vmx.outcome import VmEntered, VmSucceed
from vtx.x86.state import Shadow

HANDLER, AREA = 0x3_8000, 0x3_8000
RSM, SPIN, VMCALL = b"\x0f\xaa", b"\xeb\xfe", b"\x0f\x01\xc1"
CR4_ROW, EPT_ROW, EPTP_ROW, RIP_ROW, CS_ROW = 0x7E40, 0x7EE0, 0x7ED8, 0x7FD8, 0x7FAC
VMXE = 1 << 13
EPT_TABLES = 0x2_0000


def vmx_machine() -> Machine:
    """A machine whose processor may execute VMXON, and whose handler of SMIs does nothing."""
    machine = vmx_pc()
    machine.memory.write(HANDLER, RSM)
    return machine


def guest_machine(code: bytes, *controls: Control, **fields: int) -> Machine:
    """A guest about to execute ``code``; ``fields`` by the names of `vmcs.fields`."""
    machine = vmx_machine()
    values: dict[Field, int] = {f.GUEST_CR3: PAGE_TABLES}
    values |= {getattr(f, name): value for name, value in fields.items()}
    prepare(machine.cpu.vmx, *controls, fields=values)
    machine.memory.write(GUEST_RIP, code)
    assert machine.cpu.vmx.vmlaunch() == VmEntered(), machine.cpu.vmx.last_failure
    return machine


def row(machine: Machine, offset: int, size: int = 8) -> int:
    return int.from_bytes(machine.memory.read(AREA + offset, size), "little")


def enter_smm(machine: Machine) -> None:
    machine.cpu.smi()
    for _ in range(5):
        if machine.cpu.state.smm is None:
            machine.cpu.run_once()
    assert machine.cpu.state.smm is not None


def leave_smm(machine: Machine) -> None:
    result = machine.run(max_instructions=machine.cpu.instructions + 1)  # the handler is one RSM
    assert machine.cpu.state.smm is None, result


def test_root_operation__is_left_and_returned_to() -> None:
    machine = vmx_machine()
    vmx, state = machine.cpu.vmx, machine.cpu.state
    assert vmx.vmxon(VMXON_REGION) == VmSucceed()
    assert vmx.vmclear(REGION_A) == VmSucceed()
    assert vmx.vmptrld(REGION_A) == VmSucceed()
    enter_smm(machine)
    assert (vmx.in_vmx_operation, vmx.current_vmcs) == (False, None)
    assert row(machine, CR4_ROW, 4) & VMXE == 0
    leave_smm(machine)
    assert (vmx.in_vmx_operation, vmx.current_pointer) == (True, REGION_A)
    assert state.cr4 & VMXE


def test_outside_vmx_operation__cr4_vmxe_is_kept_inside() -> None:
    machine = vmx_machine()
    enter_smm(machine)
    assert (row(machine, CR4_ROW, 4) & VMXE, machine.cpu.state.cr4) == (0, 0)
    leave_smm(machine)
    assert machine.cpu.state.cr4 & VMXE
    assert not machine.cpu.vmx.in_vmx_operation


def test_guest__is_interrupted_and_goes_on() -> None:
    machine = guest_machine(b"\x90" + VMCALL)
    enter_smm(machine)
    assert not machine.cpu.vmx.non_root
    assert (row(machine, RIP_ROW), row(machine, EPT_ROW, 4), row(machine, EPTP_ROW)) == (GUEST_RIP, 0, 0)
    assert run_to_exit_after_rsm(machine) == Reason.VMCALL


def run_to_exit_after_rsm(machine: Machine) -> int:
    leave_smm(machine)
    run_to_exit(machine)
    assert machine.cpu.vmx.current_vmcs is not None
    return machine.cpu.vmx.current_vmcs[f.EXIT_REASON]


def test_guest_with_ept__shows_its_ept_pointer_and_is_translated_again() -> None:
    eptp = EPT_TABLES | 0x1E
    machine = vmx_machine()
    memory = machine.memory
    memory.write_u64(EPT_TABLES, EPT_TABLES + 0x1000 | 7)
    memory.write_u64(EPT_TABLES + 0x1000, EPT_TABLES + 0x2000 | 7)
    for i in range(2):
        memory.write_u64(EPT_TABLES + 0x2000 + 8 * i, i << 21 | 0xB7)
    fields = {f.GUEST_CR3: PAGE_TABLES, f.EPT_POINTER: eptp}
    prepare(machine.cpu.vmx, c.ENABLE_EPT, c.ENABLE_VPID, fields=fields | {f.VPID: 5})
    memory.write(GUEST_RIP, b"\x48\xa1" + (0x40_0000).to_bytes(8, "little"))  # MOV RAX, [400000H]: not mapped by EPT
    assert machine.cpu.vmx.vmlaunch() == VmEntered(), machine.cpu.vmx.last_failure
    enter_smm(machine)
    assert (row(machine, EPT_ROW, 4), row(machine, EPTP_ROW)) == (1, eptp)
    assert run_to_exit_after_rsm(machine) == Reason.EPT_VIOLATION


def test_exits_in_smm__are_disabled() -> None:
    """CPUID exits in any guest; HLT would, too."""
    machine = guest_machine(VMCALL, c.HLT_EXITING)
    machine.memory.write(HANDLER, b"\x31\xc0\x0f\xa2" + RSM)  # XOR AX, AX; CPUID
    enter_smm(machine)
    machine.run(max_instructions=machine.cpu.instructions + 2)
    assert machine.cpu.state.smm is not None
    assert run_to_exit_after_rsm(machine) == Reason.VMCALL


def test_vmx_instruction_in_smm__is_invalid() -> None:
    machine = guest_machine(SPIN)
    machine.memory.write(HANDLER, b"\x0f\x01\xc4")  # VMXOFF
    machine.cpu.state.idtr.limit = 0
    enter_smm(machine)
    for _ in range(5):
        if machine.cpu.halt is None:
            machine.cpu.run_once()
    assert machine.cpu.halt is not None
    assert machine.cpu.halt.shutdown


def test_preemption_timer__that_expires_in_smm_exits_after_rsm() -> None:
    fields = {"VMX_PREEMPTION_TIMER_VALUE": 1000}
    machine = guest_machine(SPIN, c.ACTIVATE_VMX_PREEMPTION_TIMER, **fields)
    enter_smm(machine)
    machine.cpu.charge(100_000)
    assert run_to_exit_after_rsm(machine) == Reason.PREEMPTION_TIMER_EXPIRED


def test_monitor_trap_flag__is_pending_after_rsm_if_it_was() -> None:
    machine = guest_machine(b"\x90" * 8 + VMCALL, c.MONITOR_TRAP_FLAG)
    operation = machine.cpu.vmx.operation
    for _ in range(5):
        if not operation.pending_trap:
            machine.cpu.run_once()
    assert operation.pending_trap
    rip = machine.cpu.state.rip
    enter_smm(machine)
    assert not operation.pending_trap
    assert run_to_exit_after_rsm(machine) == Reason.MONITOR_TRAP_FLAG
    vmcs = machine.cpu.vmx.current_vmcs
    assert vmcs is not None
    assert vmcs[f.GUEST_RIP] == rip


@pytest.mark.parametrize("blocked", [False, True])
def test_blocking_by_nmi__is_what_it_was(blocked: bool) -> None:
    machine = guest_machine(SPIN, GUEST_INTERRUPTIBILITY_STATE=blocked << 3)
    enter_smm(machine)
    assert machine.cpu.state.nmi_blocked
    leave_smm(machine)
    assert machine.cpu.state.nmi_blocked == blocked


def test_privilege_level__is_in_the_selectors_after_rsm() -> None:
    machine = guest_machine(SPIN)
    enter_smm(machine)
    machine.memory.write(AREA + CS_ROW, (0xFFFF).to_bytes(4, "little"))  # not to be changed: without effect
    leave_smm(machine)
    state = machine.cpu.state
    assert (state.cs.selector & 3, state.ss.selector & 3, state.shadow) == (0, 0, Shadow.NONE)
    assert state.cs.selector != 0xFFFF


def test_snapshot_in_smm__of_a_guest() -> None:
    machine = guest_machine(b"\x90" + VMCALL)
    enter_smm(machine)
    snapshot = machine.snapshot()
    other = Machine(memory=4 << 20)
    other.restore(snapshot)
    assert other.cpu.state.smm is not None
    assert run_to_exit_after_rsm(other) == Reason.VMCALL
