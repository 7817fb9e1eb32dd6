"""Loads of segment registers: MOV, POP and the far pointers.

Those of SS are always the model's, because MOV and POP block interrupts and debug exceptions until the next instruction
is over; those of the others where the limits and rights loaded decide what is checked from then on.

Spec: SDM Vol. 2, "MOV—Move", "POP—Pop a Value From the Stack", "LDS/LES/LFS/LGS/LSS—Load Far Pointer"; Vol. 3, "Masking
Exceptions and Interrupts When Switching Stacks".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from attrs import evolve
from iced_x86 import Code, Mnemonic

from vtx.x86 import descriptors
from vtx.x86.decode import Instruction, write_register
from vtx.x86.descriptors import is_null, null_segment, real_mode_segment, selector_fault
from vtx.x86.instructions.common import read_far_pointer, read_operand
from vtx.x86.linear import LinearMemory
from vtx.x86.outcome import Vector, gp
from vtx.x86.stack import Stack
from vtx.x86.state import CpuState, Gpr, Segment, SegmentRegister, Shadow
from vtx.x86.watch import PENDING_SINGLE_STEP

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_SS: Final = SegmentRegister.SS
_VIRTUAL_8086: Final = 0xF3  # access rights of every segment in that mode
_FAR_POINTERS: Final[Mapping[int, SegmentRegister]] = {
    Mnemonic.LES: SegmentRegister.ES,
    Mnemonic.LSS: SegmentRegister.SS,
    Mnemonic.LDS: SegmentRegister.DS,
    Mnemonic.LFS: SegmentRegister.FS,
    Mnemonic.LGS: SegmentRegister.GS,
}
_MOVES_TO_SEGMENT: Final = (Code.MOV_SREG_RM16, Code.MOV_SREG_R32M16, Code.MOV_SREG_R64M16)


def _segment_8086(state: CpuState, selector: int, current: Segment) -> Segment:
    """A segment at 16 times ``selector``: in virtual-8086 mode a new one, in real-address mode else as ``current``."""
    if state.virtual_8086:
        return real_mode_segment(selector, _VIRTUAL_8086)
    return evolve(current, selector=selector, base=selector << 4)


def stack_segment(state: CpuState, memory: LinearMemory, selector: int) -> Segment:
    """What SS holds once loaded with ``selector`` at the current privilege level.

    Raises #GP, or #SS for a segment that is not present.
    """
    if not state.protected or state.virtual_8086:
        return _segment_8086(state, selector, state.ss)
    cpl = state.cpl
    if is_null(selector):
        if not state.in_64_bit_mode or cpl == 3 or selector != cpl:
            raise gp(0)
        return null_segment(selector, cpl)
    descriptor = descriptors.read_stack_descriptor(state, memory, selector, cpl, Vector.GP)
    return descriptors.set_accessed(state, memory, selector, descriptor).segment(selector)


def data_segment(state: CpuState, memory: LinearMemory, selector: int, current: Segment) -> Segment:
    """What DS, ES, FS or GS, now ``current``, holds once loaded with ``selector`` at the current privilege level.

    Raises #GP, or #NP for a segment that is not present.
    """
    if not state.protected or state.virtual_8086:
        return _segment_8086(state, selector, current)
    if is_null(selector):
        return null_segment(selector)
    descriptor = descriptors.read_descriptor(state, memory, selector)
    if descriptor is None or not descriptor.is_readable:
        raise selector_fault(Vector.GP, selector)
    if not descriptor.is_conforming and descriptor.dpl < max(state.cpl, selector & 3):
        raise selector_fault(Vector.GP, selector)
    if not descriptor.present:
        raise selector_fault(Vector.NP, selector)
    return descriptors.set_accessed(state, memory, selector, descriptor).segment(selector)


def _load(cpu: LogicalProcessor, register: int, selector: int) -> None:
    state = cpu.state
    if register == _SS:
        state.segments[_SS] = stack_segment(state, cpu.mmu, selector)
    else:
        state.segments[register] = data_segment(state, cpu.mmu, selector, state.segments[register])
    cpu.changed_system_state()


def _retire(cpu: LogicalProcessor, instruction: Instruction, register: int) -> None:
    """Retire the instruction; after SS, the single-step trap is not held back like data breakpoints, but lost."""
    cpu.retire(instruction)
    if register == _SS:
        cpu.state.pending_debug &= ~PENDING_SINGLE_STEP
        cpu.state.shadow = Shadow.MOV_SS


def is_segment_load(instruction: Instruction) -> bool:
    """Whether a MOV is one to a segment register that can be loaded."""
    return instruction.code in _MOVES_TO_SEGMENT and instruction.system_registers[0] != SegmentRegister.CS


def move(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """MOV to a segment register."""
    register = instruction.system_registers[0]
    assert register is not None
    _load(cpu, register, read_operand(cpu, instruction, 1, 2))
    _retire(cpu, instruction, register)


def pop(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """POP of a segment register."""
    register = instruction.system_registers[0]
    assert register is not None
    stack = Stack.of(cpu.state, cpu.mmu)
    _load(cpu, register, stack.pop(instruction.operand_size) & 0xFFFF)
    cpu.state.gpr[Gpr.RSP] = stack.pointer
    _retire(cpu, instruction, register)


def load_far_pointer(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """LDS, LES, LFS, LGS, LSS. LSS loads the stack pointer along with SS and therefore casts no shadow."""
    selector, offset = read_far_pointer(cpu, instruction)
    register = instruction.registers[0]
    assert register is not None
    _load(cpu, _FAR_POINTERS[instruction.mnemonic], selector)
    write_register(cpu.state, register, offset)
    cpu.retire(instruction)


HANDLERS: Final = {Mnemonic.POP: pop, **dict.fromkeys(_FAR_POINTERS, load_far_pointer)}
