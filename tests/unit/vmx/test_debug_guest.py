"""Debug registers, breakpoints and single-stepping of guest code: what exits, and when."""

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

DB, BS, TF, CR4_DE, MOV_SS_BLOCKING = 1, 1 << 14, 1 << 8, 1 << 3, 1 << 1
ENABLED_BREAKPOINT = 1 << 12
OPERAND = 0x5800


def run_guest(code: str, *controls: Control, dr0: int = 0, **fields: int) -> Machine:
    """Run ``code`` as a guest until it exits; ``fields`` by the names of `vmcs.fields`."""
    machine = vmx_pc()
    cpu, vmx = machine.cpu, machine.cpu.vmx
    values: dict[Field, int] = {f.GUEST_CR3: PAGE_TABLES, f.EXCEPTION_BITMAP: 1 << DB}
    values |= {getattr(f, name): value for name, value in fields.items()}
    prepare(vmx, *controls, fields=values)
    machine.memory.write(GUEST_RIP, bytes.fromhex(code))
    cpu.state.gpr[7], cpu.state.gpr[0] = OPERAND, 0x10
    machine.memory.write_u64(OPERAND, 0x10)
    machine.memory.write_u64(0x6000 + 0x10, 0x00CF_9300_0000_FFFF)  # data segment
    cpu.state.dr[0] = dr0
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    run_to_exit(machine)
    return machine


def exit_of(machine: Machine, *fields: Field) -> list[int]:
    vmcs = machine.cpu.vmx.current_vmcs
    assert vmcs is not None
    return [vmcs[field] for field in fields]


@pytest.mark.parametrize(
    ("code", "number", "direction", "cr4"),
    [("0f23e0", 4, 0, CR4_DE), ("0f21e8", 5, 1 << 4, CR4_DE), ("0f23e0", 4, 0, 0), ("0f21f0", 6, 1 << 4, 0)],
)
def test_mov_dr__exits_before_its_own_faults(code: str, number: int, direction: int, cr4: int) -> None:
    machine = run_guest(code, c.MOV_DR_EXITING, GUEST_CR4=0x2020 | cr4, EXCEPTION_BITMAP=1 << 6)
    assert exit_of(machine, f.EXIT_REASON, f.EXIT_QUALIFICATION) == [Reason.DR_ACCESS, number | direction]


def test_mov_dr__that_does_not_exit_faults() -> None:
    machine = run_guest("0f23e0", GUEST_CR4=0x2028, EXCEPTION_BITMAP=1 << 6)
    assert exit_of(machine, f.EXIT_REASON, f.VM_EXIT_INTERRUPTION_INFORMATION) == [0, 1 << 31 | 3 << 8 | 6]


def test_data_breakpoint_of_an_instruction_that_exits__is_not_the_hosts() -> None:
    """OUTS reads its operand only if it does not exit."""
    controls = (c.UNCONDITIONAL_IO_EXITING, c.ENTRY_LOAD_DEBUG_CONTROLS)
    machine = run_guest("6e", *controls, GUEST_DR7=0x000F_0402, dr0=OPERAND)
    assert exit_of(machine, f.EXIT_REASON) == [Reason.IO_INSTRUCTION]
    assert machine.cpu.state.pending_debug == 0


def test_data_breakpoint_held_back_by_mov_ss__is_saved_by_the_exit() -> None:
    machine = run_guest(
        "8e170f01c1", c.ENTRY_LOAD_DEBUG_CONTROLS, GUEST_DR7=0x000F_0402, dr0=OPERAND
    )  # MOV SS, [RDI]; VMCALL
    assert exit_of(machine, f.EXIT_REASON, f.GUEST_INTERRUPTIBILITY_STATE) == [Reason.VMCALL, MOV_SS_BLOCKING]
    assert exit_of(machine, f.GUEST_PENDING_DEBUG_EXCEPTIONS) == [ENABLED_BREAKPOINT | 1]


def test_single_step_in_the_shadow_of_mov_ss__comes_after_the_instruction_that_exited_and_was_resumed() -> None:
    machine = run_guest("8ed00f01c19090", GUEST_RFLAGS=2 | TF)  # MOV SS, AX; VMCALL; NOP
    vmx = machine.cpu.vmx
    assert exit_of(machine, f.EXIT_REASON, f.GUEST_PENDING_DEBUG_EXCEPTIONS) == [Reason.VMCALL, BS]
    machine.memory.write(GUEST_RIP + 2, bytes.fromhex("909090"))
    assert vmx.vmresume() == VmEntered(), vmx.last_failure
    for _ in range(5):
        if vmx.non_root:
            machine.cpu.run_once()
    assert exit_of(machine, f.EXIT_QUALIFICATION, f.GUEST_RIP) == [BS, GUEST_RIP + 3]
