"""Loads of SS: MOV, POP and LSS.

MOV and POP block interrupts and debug exceptions until the next instruction is over. That is why they are the model's:
an engine neither says which instruction cast the shadow nor knows all the checks of a null SS.

Spec: SDM Vol. 2, "MOV—Move", "POP—Pop a Value From the Stack", "LDS/LES/LFS/LGS/LSS—Load Far Pointer"; Vol. 3, "Masking
Exceptions and Interrupts When Switching Stacks".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attrs import evolve
from iced_x86 import Code, Mnemonic

from vtx.x86 import descriptors
from vtx.x86.decode import Instruction, write_register
from vtx.x86.descriptors import is_null, null_segment, selector_fault
from vtx.x86.instructions.common import operand_address, read_linear, read_operand
from vtx.x86.linear import LinearMemory
from vtx.x86.outcome import Vector, gp
from vtx.x86.stack import Stack
from vtx.x86.state import CpuState, Gpr, Segment, SegmentRegister, Shadow
from vtx.x86.watch import PENDING_SINGLE_STEP

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_SS: Final = SegmentRegister.SS
_MOVES_TO_SEGMENT: Final = (Code.MOV_SREG_RM16, Code.MOV_SREG_R32M16, Code.MOV_SREG_R64M16)


def stack_segment(state: CpuState, memory: LinearMemory, selector: int) -> Segment:
    """What SS holds once loaded with ``selector`` at the current privilege level.

    Raises #GP, or #SS for a segment that is not present.
    """
    if not state.protected or state.virtual_8086:
        return evolve(state.ss, selector=selector, base=selector << 4)
    cpl = state.cpl
    if is_null(selector):
        if not state.in_64_bit_mode or cpl == 3 or selector != cpl:
            raise gp(0)
        return null_segment(selector, cpl)
    descriptor = descriptors.read_descriptor(state, memory, selector)
    if descriptor is None or selector & 3 != cpl or not descriptor.is_writable_data or descriptor.dpl != cpl:
        raise selector_fault(Vector.GP, selector)
    if not descriptor.present:
        raise selector_fault(Vector.SS, selector)
    return descriptors.set_accessed(state, memory, selector, descriptor).segment(selector)


def _load(cpu: LogicalProcessor, selector: int) -> None:
    cpu.state.segments[_SS] = stack_segment(cpu.state, cpu.mmu, selector)
    cpu.changed_system_state()


def _cast_shadow(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """Retire the instruction, without the single-step trap: it is not held back like data breakpoints, but lost."""
    cpu.retire(instruction)
    cpu.state.pending_debug &= ~PENDING_SINGLE_STEP
    cpu.state.shadow = Shadow.MOV_SS


def is_stack_segment_load(instruction: Instruction) -> bool:
    """Whether a MOV is one to SS."""
    return instruction.code in _MOVES_TO_SEGMENT and instruction.system_registers[0] == _SS


def move(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """MOV to SS."""
    _load(cpu, read_operand(cpu, instruction, 1, 2))
    _cast_shadow(cpu, instruction)


def pop(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """POP SS, which does not exist in 64-bit mode."""
    stack = Stack.of(cpu.state, cpu.mmu)
    _load(cpu, stack.pop(instruction.operand_size) & 0xFFFF)
    cpu.state.gpr[Gpr.RSP] = stack.pointer
    _cast_shadow(cpu, instruction)


def load_far_pointer(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """LSS, which loads the stack pointer along with SS and therefore casts no shadow."""
    size = instruction.operand_size
    pointer = read_linear(cpu, operand_address(cpu, instruction, size + 2), size + 2)
    register = instruction.registers[0]
    assert register is not None
    _load(cpu, pointer >> 8 * size)
    write_register(cpu.state, register, pointer & ((1 << 8 * size) - 1))
    cpu.retire(instruction)


HANDLERS: Final = {Mnemonic.POP: pop, Mnemonic.LSS: load_far_pointer}
