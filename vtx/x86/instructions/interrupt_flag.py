"""CLI, STI, PUSHF and POPF, which work on the virtual interrupt flag where there is one.

That is in virtual-8086 mode with CR4.VME, and for CLI and STI at privilege level 3 with CR4.PVI, while IOPL does not
allow access to IF itself. Everywhere else CLI, STI and POPF are the engine's.

Spec: SDM Vol. 2, "CLI—Clear Interrupt Flag", "STI—Set Interrupt Flag", "PUSHF/PUSHFD/PUSHFQ—Push EFLAGS Register Onto
the Stack", "POPF/POPFD/POPFQ—Pop Stack Into EFLAGS Register"; Vol. 3, "Protected-Mode Virtual Interrupts".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86.decode import Instruction
from vtx.x86.instructions.common import intercepts_flow
from vtx.x86.operations import SIMPLE, Plain
from vtx.x86.outcome import gp
from vtx.x86.stack import Stack
from vtx.x86.state import CpuState, Cr4, Gpr, Rflags, Shadow

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_USER_FLAGS: Final = int(
    Rflags.CF | Rflags.PF | Rflags.AF | Rflags.ZF | Rflags.SF | Rflags.TF | Rflags.DF | Rflags.OF | Rflags.NT
    | Rflags.AC | Rflags.ID
)  # fmt: skip
_IOPL: Final = int(Rflags.IOPL)
_IF, _VIF, _VIP, _TF = int(Rflags.IF), int(Rflags.VIF), int(Rflags.VIP), int(Rflags.TF)
_NOT_PUSHED: Final = int(Rflags.VM | Rflags.RF)
_LOW_WORD: Final = 0xFFFF


def _may_change_if(state: CpuState) -> bool:
    return not state.protected or state.cpl <= (state.rflags & _IOPL) >> 12


def _require_virtual_flag(state: CpuState) -> None:
    """#GP(0) unless CLI and STI have a virtual interrupt flag to work on."""
    if state.cpl != 3 or not state.cr4 & (Cr4.VME if state.virtual_8086 else Cr4.PVI):
        raise gp(0)


def clear_interrupt_flag(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """CLI."""
    state = cpu.state
    if _may_change_if(state):
        state.rflags &= ~_IF
    else:
        _require_virtual_flag(state)
        state.rflags &= ~_VIF
    cpu.retire(instruction)


def set_interrupt_flag(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """STI; a virtual interrupt that is pending makes it fault."""
    state = cpu.state
    if _may_change_if(state):
        shadow = Shadow.NONE if state.rflags & _IF else Shadow.STI
        state.rflags |= _IF
        cpu.retire(instruction)
        state.shadow = shadow
        return
    _require_virtual_flag(state)
    if state.rflags & _VIP:
        raise gp(0)
    state.rflags |= _VIF
    cpu.retire(instruction)


def _size(instruction: Instruction) -> int:
    return 8 if instruction.bits == 64 and instruction.operand_size == 4 else instruction.operand_size


def _uses_virtual_flag(state: CpuState, size: int) -> bool:
    """Whether PUSHF and POPF see the virtual interrupt flag; #GP(0) where they are not allowed at all."""
    if not state.virtual_8086 or state.rflags & _IOPL == _IOPL:
        return False
    if not state.cr4 & Cr4.VME or size != 2:
        raise gp(0)
    return True


def push_flags(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """PUSHF in all its sizes: the engine's own would push RF and VM, which read as zero."""
    if intercepts_flow(cpu, SIMPLE[Plain.PUSHF], instruction):
        return
    state, size = cpu.state, _size(instruction)
    image = state.rflags & ~_NOT_PUSHED
    if _uses_virtual_flag(state, size):
        image = image & ~_IF | _IOPL | (_IF if state.rflags & _VIF else 0)
    stack = Stack.of(state, cpu.mmu)
    stack.push(image, size=size)
    state.gpr[Gpr.RSP] = stack.pointer
    cpu.retire(instruction)


def pop_flags(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """POPF in all its sizes."""
    if intercepts_flow(cpu, SIMPLE[Plain.POPF], instruction):
        return
    state, size = cpu.state, _size(instruction)
    virtual = _uses_virtual_flag(state, size)
    stack = Stack.of(state, cpu.mmu)
    value = stack.pop(size)
    changeable = _USER_FLAGS
    if virtual:
        if value & _TF or (value & _IF and state.rflags & _VIP):
            raise gp(0)
    else:
        changeable |= (_IOPL if state.cpl == 0 else 0) | (_IF if _may_change_if(state) else 0)
    if size == 2:
        changeable &= _LOW_WORD
    state.gpr[Gpr.RSP] = stack.pointer
    cpu.retire(instruction)
    state.rflags = state.rflags & ~changeable | value & changeable
    if virtual:
        state.rflags = state.rflags & ~_VIF | (_VIF if value & _IF else 0)


HANDLERS: Final = {
    Mnemonic.CLI: clear_interrupt_flag,
    Mnemonic.STI: set_interrupt_flag,
    Mnemonic.PUSHF: push_flags,
    Mnemonic.PUSHFD: push_flags,
    Mnemonic.PUSHFQ: push_flags,
    Mnemonic.POPF: pop_flags,
    Mnemonic.POPFD: pop_flags,
    Mnemonic.POPFQ: pop_flags,
}
