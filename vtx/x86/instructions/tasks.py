"""Task switches, as the processor and its virtualization extension see them; far CALL, JMP, which may be one, and RET.

Spec: SDM Vol. 3, "Task Switching"; SDM Vol. 2, "CALL—Call Procedure", "JMP—Jump".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attrs import evolve
from iced_x86 import Mnemonic

from vtx.x86 import descriptors, operations
from vtx.x86.decode import Instruction, decode
from vtx.x86.descriptors import AVAILABLE_TSS_TYPES, BUSY_TSS_TYPES, Descriptor, SystemType, is_null, selector_fault
from vtx.x86.event import Event
from vtx.x86.far_transfer import far_call, far_jump, far_return
from vtx.x86.instructions.common import read_far_pointer
from vtx.x86.outcome import Exited, InstructionAborted, Vector, gp
from vtx.x86.paging import PagingMode
from vtx.x86.state import MASK32, MASK64, CpuState, Rflags
from vtx.x86.task import TaskSwitchHooks, TaskSwitchSource, task_switch

if TYPE_CHECKING:
    from vtx.x86.core import ProcessorCore
    from vtx.x86.processor import LogicalProcessor

_NOP: Final = decode(b"\x90", 32)
_TASK_TYPES: Final = AVAILABLE_TSS_TYPES | BUSY_TSS_TYPES | {SystemType.TASK_GATE}
_TF: Final = int(Rflags.TF)


def task_switch_hooks(
    cpu: ProcessorCore, instruction: Instruction | None, delivering: Event | None = None
) -> TaskSwitchHooks:
    """What a task switch by ``instruction``, or while ``delivering`` an event, means for the processor around it."""

    def intercept(selector: int, source: TaskSwitchSource) -> None:
        operation = operations.TaskSwitch(selector, operations.TaskSwitchSource(int(source)), delivering)
        if cpu.intercepts(operation, instruction or _of_event(delivering)):
            raise InstructionAborted(Exited())

    def load_cr3(state: CpuState, value: int) -> None:
        state.cr3 = value
        if cpu.mmu.context.mode is PagingMode.PAE:
            state.pdptrs[:] = cpu.mmu.load_pdptrs(value)
        cpu.mmu.cr3_written(state)

    return TaskSwitchHooks(intercept, load_cr3)


def _of_event(delivering: Event | None) -> Instruction:
    """Something of the length of the instruction that asked for the event, if one did."""
    assert _NOP is not None
    return evolve(_NOP, length=delivering.instruction_length if delivering is not None else 0)


def _target(cpu: LogicalProcessor, instruction: Instruction) -> tuple[int, int]:
    """The selector and the offset of a far CALL or JMP."""
    size = instruction.operand_size
    if instruction.memory is None:
        return int.from_bytes(instruction.encoding[-2:], "little"), _immediate_offset(instruction, size)
    return read_far_pointer(cpu, instruction)


def _immediate_offset(instruction: Instruction, size: int) -> int:
    """The offset in a far pointer that is part of the instruction, ``size`` bytes wide."""
    return int.from_bytes(instruction.encoding[-2 - size : -2], "little")


def far_transfer(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """Far CALL and JMP. Those of real-address and virtual-8086 mode check nothing and are left to the engine."""
    state = cpu.state
    if not state.protected or state.virtual_8086:
        cpu.native(instruction)
        return
    selector, offset = _target(cpu, instruction)
    descriptor = None
    if not state.long_mode and not is_null(selector):
        descriptor = descriptors.read_descriptor(state, cpu.mmu, selector)
    if descriptor is None or descriptor.system_type not in _TASK_TYPES:
        _transfer(cpu, instruction, selector, offset)
    else:
        _switch_task(cpu, instruction, selector, descriptor)


def _transfer(cpu: LogicalProcessor, instruction: Instruction, selector: int, offset: int) -> None:
    state = cpu.state
    single_step = bool(state.rflags & _TF)
    if instruction.mnemonic == Mnemonic.CALL:
        next_rip = (state.rip + instruction.length) & (MASK64 if state.in_64_bit_mode else MASK32)
        far_call(state, cpu.mmu, selector, offset, operand_size=instruction.operand_size, next_rip=next_rip)
    else:
        far_jump(state, cpu.mmu, selector, offset)
    cpu.load_control_state()
    cpu.completed(single_step=single_step)


def _switch_task(cpu: LogicalProcessor, instruction: Instruction, selector: int, descriptor: Descriptor) -> None:
    state = cpu.state
    if descriptor.dpl < max(state.cpl, selector & 3):
        raise selector_fault(Vector.GP, selector)
    source = TaskSwitchSource.CALL if instruction.mnemonic == Mnemonic.CALL else TaskSwitchSource.JMP
    single_step = bool(state.rflags & _TF)
    next_rip = (state.rip + instruction.length) & MASK32
    try:
        task_switch(
            state,
            cpu.mmu,
            _tss_selector(selector, descriptor),
            source,
            rip=next_rip,
            rflags=state.rflags,
            hooks=task_switch_hooks(cpu, instruction),
        )
    finally:
        cpu.load_control_state()  # the new task is entered even where one of its segments faults
    cpu.completed(single_step=single_step)


def _tss_selector(selector: int, descriptor: Descriptor) -> int:
    if descriptor.system_type != SystemType.TASK_GATE:
        return selector
    if not descriptor.present:
        raise selector_fault(Vector.NP, selector)
    target = descriptor.base & 0xFFFF  # where a gate has a selector, a segment has the low part of its base
    if is_null(target):
        raise gp(0)
    return target


def far_ret(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """Far RET."""
    state = cpu.state
    if not state.protected or state.virtual_8086:
        cpu.native(instruction)
        return
    single_step = bool(state.rflags & _TF)
    far_return(state, cpu.mmu, instruction.operand_size, instruction.immediate)
    cpu.load_control_state()
    cpu.completed(single_step=single_step)


HANDLERS: Final = {Mnemonic.RETF: far_ret}
