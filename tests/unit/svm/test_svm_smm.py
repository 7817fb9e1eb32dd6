"""System-management interrupts in guest mode: intercepted, or taken out of guest mode and back by RSM."""

from __future__ import annotations

import pytest
import svm_guest
from svm_machine import VMCB, VMMCALL

from vmcs.vmcb.intercepts import Exit
from vtx.machine import Machine, StopReason
from vtx.x86.state import Activity

HANDLER, SMBASE, GUEST_RIP = 0x3_8000, 0x3_0000, 0x4000
RSM, SPIN = b"\x0f\xaa", b"\xeb\xfe"
EXIT_CODE = 0x70  # of the control block


def guest_machine(code: bytes, *intercepts: int, nested: bool = False) -> Machine:
    """A machine in guest mode, about to execute ``code``, whose handler of SMIs just resumes."""
    machine = svm_guest.guest_machine(code, *intercepts, nested=nested)
    machine.memory.write(HANDLER, RSM)
    return machine


def run(machine: Machine, instructions: int) -> None:
    machine.run(max_instructions=machine.cpu.instructions + instructions)


def enter_smm(machine: Machine) -> None:
    machine.cpu.smi()
    for _ in range(5):
        if machine.cpu.state.smm is None:
            machine.cpu.run_once()
    assert machine.cpu.state.smm is not None


def exit_code(machine: Machine) -> int:
    return machine.memory.read_u64(VMCB + EXIT_CODE)


@pytest.mark.parametrize("nested", [False, True])
def test_guest__is_interrupted_and_goes_on(nested: bool) -> None:
    machine = guest_machine(b"\x90" + VMMCALL, nested=nested)
    second_level = machine.cpu.mmu.second_level
    enter_smm(machine)
    assert not machine.cpu.svm.non_root
    memory = machine.memory
    assert [memory.read_u64(SMBASE + offset) for offset in (0xFED8, 0xFEE0, 0xFF78)] == [1, VMCB, GUEST_RIP]
    run(machine, 1)
    assert machine.cpu.svm.non_root
    assert type(machine.cpu.mmu.second_level) is type(second_level)
    assert machine.cpu.mmu.asid == 1
    run(machine, 2)
    assert (machine.cpu.svm.non_root, exit_code(machine)) == (False, Exit.VMMCALL)


def test_intercepted__exits_instead() -> None:
    machine = guest_machine(SPIN, Exit.SMI)
    machine.cpu.smi()
    for _ in range(5):
        if machine.cpu.svm.non_root:
            machine.cpu.run_once()
    assert (exit_code(machine), machine.cpu.state.smm) == (Exit.SMI, None)


def test_intercepts__do_not_act_in_the_handler() -> None:
    machine = guest_machine(VMMCALL, Exit.CPUID)
    machine.memory.write(HANDLER, b"\x31\xc0\x0f\xa2" + RSM)  # XOR AX, AX; CPUID
    enter_smm(machine)
    run(machine, 2)
    assert machine.cpu.state.smm is not None
    run(machine, 2)
    assert exit_code(machine) == Exit.VMMCALL


def test_halted_guest__sleeps_on() -> None:
    machine = guest_machine(b"\xf4")
    machine.cpu.state.idtr.limit = 0
    run(machine, 1)
    assert machine.cpu.state.activity is Activity.HLT
    enter_smm(machine)
    run(machine, 1)
    assert (machine.cpu.svm.non_root, machine.cpu.state.activity) == (True, Activity.HLT)


def test_vmrun_in_the_handler__is_said_to_be_missing() -> None:
    machine = guest_machine(SPIN)
    enable = bytes.fromhex("66b9800000c0 0f32 660d00100000 0f30 6667b800200000 0f01d8")  # EFER.SVME; VMRUN
    machine.memory.write(HANDLER, bytes.fromhex("0f20c0 0c01 0f22c0") + enable)  # protected mode first
    enter_smm(machine)
    result = machine.run(max_instructions=machine.cpu.instructions + 20)
    assert result.reason is StopReason.NOT_MODELLED
    assert "interrupted a guest" in result.message


def test_snapshot_in_smm__of_a_guest() -> None:
    machine = guest_machine(b"\x90" + VMMCALL, nested=True)
    enter_smm(machine)
    other = Machine(memory=4 << 20, profile="zen-server")
    other.restore(machine.snapshot())
    run(other, 3)
    assert (other.cpu.svm.non_root, exit_code(other)) == (False, Exit.VMMCALL)
