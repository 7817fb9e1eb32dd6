"""Software interrupts, IRET, SYSCALL and SYSENTER.

Spec: SDM Vol. 2, "INT n/INTO/INT3/INT1—Call to Interrupt Procedure" and the other instructions' pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86 import fred
from vtx.x86.decode import Instruction
from vtx.x86.event import BREAKPOINTS, Event, EventKind
from vtx.x86.instructions.common import intercepts_flow
from vtx.x86.instructions.tasks import task_switch_hooks
from vtx.x86.iret import iret
from vtx.x86.msr_table import (
    IA32_CSTAR,
    IA32_FMASK,
    IA32_LSTAR,
    IA32_STAR,
    IA32_SYSENTER_CS,
    IA32_SYSENTER_EIP,
    IA32_SYSENTER_ESP,
)
from vtx.x86.operations import SIMPLE, Plain, SoftwareInterrupt
from vtx.x86.outcome import Vector, gp, ud
from vtx.x86.state import Cr4, Rflags
from vtx.x86.syscall import SyscallMsrs, SysenterMsrs, syscall, sysenter, sysexit, sysret

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_IOPL: Final = int(Rflags.IOPL)


def interrupt(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """INT n. The fault of one that virtual-8086 mode forbids is the instruction's, not of the interrupt's delivery."""
    vector, state = instruction.immediate & 0xFF, cpu.state
    if not intercepts_flow(cpu, SoftwareInterrupt(vector), instruction):
        if state.virtual_8086 and not state.cr4 & Cr4.VME and state.rflags & _IOPL != _IOPL:
            raise gp(0)
        cpu.raise_software(Event(vector, EventKind.SOFTWARE_INTERRUPT, instruction_length=instruction.length))


def breakpoint_trap(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """INT3."""
    cpu.raise_software(Event(Vector.BP, EventKind.SOFTWARE_EXCEPTION, instruction_length=instruction.length))


def debug_trap(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """INT1. Data breakpoints that MOV SS holds back are reported by its debug exception: there is one, not two."""
    if intercepts_flow(cpu, SIMPLE[Plain.ICEBP], instruction):
        return
    kind, held_back = EventKind.PRIVILEGED_SOFTWARE_EXCEPTION, cpu.state.pending_debug & BREAKPOINTS
    cpu.state.pending_debug = 0
    cpu.raise_software(Event(Vector.DB, kind, instruction_length=instruction.length, debug=held_back))


def overflow_trap(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """INTO."""
    if cpu.state.rflags & Rflags.OF:
        cpu.raise_software(Event(Vector.OF, EventKind.SOFTWARE_EXCEPTION, instruction_length=instruction.length))
    else:
        cpu.retire(instruction)


def interrupt_return(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """IRET in all its sizes."""
    if intercepts_flow(cpu, SIMPLE[Plain.IRET], instruction):
        return
    cpu.changed_system_state()
    traps = cpu.state.rflags & Rflags.TF
    extension = cpu.virtualization
    unblocks = extension is None or not extension.non_root or extension.iret_unblocks_nmi()
    if extension is not None:
        extension.iret_unblocked_nmi = unblocks and cpu.state.nmi_blocked
    try:
        iret(
            cpu.state,
            cpu.mmu,
            8 * instruction.operand_size,
            instruction_length=instruction.length,
            unblock_nmi=unblocks,
            hooks=task_switch_hooks(cpu, instruction),
        )
    finally:
        cpu.load_control_state()  # a nested task is left even where a segment of the one before faults
    cpu.completed(single_step=bool(traps))


def _syscall_msrs(cpu: LogicalProcessor) -> SyscallMsrs:
    values = cpu.msrs.values
    return SyscallMsrs(values[IA32_STAR], values[IA32_LSTAR], values[IA32_CSTAR], values[IA32_FMASK])


def _sysenter_msrs(cpu: LogicalProcessor) -> SysenterMsrs:
    values = cpu.msrs.values
    return SysenterMsrs(values[IA32_SYSENTER_CS], values[IA32_SYSENTER_ESP], values[IA32_SYSENTER_EIP])


def _trap_flag(cpu: LogicalProcessor) -> bool:
    """Whether SYSCALL or SYSRET traps: the flag that counts is the one it leaves behind."""
    return bool(cpu.state.rflags & Rflags.TF)


def _by_fred(cpu: LogicalProcessor, instruction: Instruction, vector: int) -> bool:
    """Deliver SYSCALL or SYSENTER as an event if FRED is enabled; whether it is."""
    enabled = fred.is_enabled(cpu.state)
    if enabled:
        cpu.raise_software(Event(vector, EventKind.OTHER, instruction_length=instruction.length))
    return enabled


def fast_call(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """SYSCALL."""
    if cpu.state.in_64_bit_mode and _by_fred(cpu, instruction, fred.SYSCALL):
        return
    syscall(cpu.state, _syscall_msrs(cpu), instruction.length, amd=cpu.profile.is_amd)
    cpu.changed_system_state()
    cpu.completed(single_step=_trap_flag(cpu))


def _forbidden_by_fred(cpu: LogicalProcessor) -> None:
    if fred.is_enabled(cpu.state):
        raise ud()


def fast_return(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """SYSRET where the engine does not execute it."""
    _forbidden_by_fred(cpu)
    size = 64 if instruction.mnemonic == Mnemonic.SYSRETQ else 32
    sysret(cpu.state, _syscall_msrs(cpu), size, amd=cpu.profile.is_amd)
    cpu.changed_system_state()
    cpu.completed(single_step=_trap_flag(cpu))


def fast_enter(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """SYSENTER."""
    if _by_fred(cpu, instruction, fred.SYSENTER):
        return
    sysenter(cpu.state, _sysenter_msrs(cpu), amd=cpu.profile.is_amd)
    cpu.changed_system_state()
    cpu.completed(single_step=False)


def fast_exit(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """SYSEXIT where the engine does not execute it."""
    _forbidden_by_fred(cpu)
    size = 64 if instruction.mnemonic == Mnemonic.SYSEXITQ else 32
    sysexit(cpu.state, _sysenter_msrs(cpu), size, amd=cpu.profile.is_amd)
    cpu.changed_system_state()
    cpu.completed(single_step=False)


HANDLERS: Final = {
    Mnemonic.INT: interrupt,
    Mnemonic.INT3: breakpoint_trap,
    Mnemonic.INT1: debug_trap,
    Mnemonic.INTO: overflow_trap,
    Mnemonic.IRET: interrupt_return,
    Mnemonic.IRETD: interrupt_return,
    Mnemonic.IRETQ: interrupt_return,
    Mnemonic.SYSCALL: fast_call,
    Mnemonic.SYSRET: fast_return,
    Mnemonic.SYSRETQ: fast_return,
    Mnemonic.SYSENTER: fast_enter,
    Mnemonic.SYSEXIT: fast_exit,
    Mnemonic.SYSEXITQ: fast_exit,
}
