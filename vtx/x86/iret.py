"""IRET: the return from an interrupt handler, in every mode.

Everything is popped and checked before anything is committed, so an IRET that faults has changed no register; it still
ends blocking by NMI.

Spec: SDM Vol. 2, "IRET/IRETD/IRETQ—Interrupt Return", operation; SDM Vol. 3, "Handling Multiple NMIs", "Exception
and Interrupt Handling in 64-bit Mode", "Entering Virtual-8086 Mode".
"""

from __future__ import annotations

from typing import Final

from attrs import evolve, frozen

from vtx.x86 import descriptors, shadow_stack
from vtx.x86.control_flow import has_shadow_stack
from vtx.x86.descriptors import Descriptor, is_null, null_segment, real_mode_segment, selector_fault
from vtx.x86.fred import is_enabled
from vtx.x86.linear import LinearMemory, is_canonical, linear_address_width, system_address
from vtx.x86.outcome import Vector, gp
from vtx.x86.stack import Stack
from vtx.x86.state import MASK32, CpuState, Cr4, Gpr, Rflags, Segment, SegmentRegister, Shadow
from vtx.x86.task import DEFINED_RFLAGS, NO_HOOKS, TaskSwitchHooks, TaskSwitchSource, task_switch

_IF: Final = Rflags.IF.value
_IOPL: Final = Rflags.IOPL.value
_NT: Final = Rflags.NT.value
_TF: Final = Rflags.TF.value
_VM: Final = Rflags.VM.value
_VIF: Final = Rflags.VIF.value
_VIP: Final = Rflags.VIP.value
_FIXED_1: Final = Rflags.FIXED_1.value
_LOW_WORD: Final = 0xFFFF
UNPRIVILEGED_FLAGS: Final = int(
    Rflags.CF
    | Rflags.PF
    | Rflags.AF
    | Rflags.ZF
    | Rflags.SF
    | Rflags.TF
    | Rflags.DF
    | Rflags.OF
    | Rflags.NT
    | Rflags.RF
    | Rflags.AC
    | Rflags.ID
)
"""What a return may change whatever the privilege level it is executed at."""

_V86_SEGMENTS: Final = (SegmentRegister.ES, SegmentRegister.DS, SegmentRegister.FS, SegmentRegister.GS)
_V86_RIGHTS: Final = 0xF3
_NO_SHADOW_STACK: Final = shadow_stack.SspChange()


@frozen
class _Frame:
    """The part of the frame every return pops."""

    rip: int
    cs: int
    rflags: int


def iret(
    state: CpuState,
    memory: LinearMemory,
    operand_size: int,
    *,
    instruction_length: int = 1,
    unblock_nmi: bool = True,
    hooks: TaskSwitchHooks = NO_HOOKS,
) -> None:
    """Execute IRET with ``operand_size`` 16, 32 or 64.

    ``instruction_length`` counts in a return to a nested task only: its TSS keeps the address of the next instruction.
    ``unblock_nmi`` is False where IRET leaves blocking by NMI alone. ``hooks`` are those of a task switch. Raises
    `InstructionAborted` with the fault; NMIs are unblocked all the same.
    """
    if unblock_nmi:
        state.nmi_blocked = False
    if not state.protected:
        _real_mode(state, memory, operand_size)
    elif state.virtual_8086:
        _from_virtual_8086(state, memory, operand_size)
    elif state.rflags & _NT:
        _nested_task(state, memory, instruction_length, hooks)
    else:
        _protected(state, memory, operand_size)
    state.shadow = Shadow.NONE


def _pop_frame(stack: Stack, size: int) -> _Frame:
    rip = stack.pop(size)
    cs = stack.pop(size) & 0xFFFF
    return _Frame(rip, cs, stack.pop(size))


def _replace(state: CpuState, image: int, mask: int, operand_size: int) -> int:
    """RFLAGS with the bits of ``mask`` taken from the popped ``image``; a 16-bit image reaches the low word only."""
    if operand_size == 16:
        mask &= _LOW_WORD
    return (state.rflags & ~mask | image & mask) & DEFINED_RFLAGS | _FIXED_1


# Real-address and virtual-8086 mode


def _real_mode(state: CpuState, memory: LinearMemory, operand_size: int) -> None:
    stack = Stack.of(state, memory)
    frame = _pop_frame(stack, operand_size // 8)
    if frame.rip > state.cs.limit:
        raise gp(0)
    rflags = _replace(state, frame.rflags, UNPRIVILEGED_FLAGS | _IF | _IOPL, operand_size)
    code = Segment(frame.cs, frame.cs << 4, state.cs.limit, state.cs.access_rights)
    _commit(state, code, frame.rip, rflags, stack.pointer)


def _from_virtual_8086(state: CpuState, memory: LinearMemory, operand_size: int) -> None:
    virtual_interrupts = (state.rflags & _IOPL) != _IOPL
    if virtual_interrupts and not (state.cr4 & Cr4.VME and operand_size == 16):
        raise gp(0)
    stack = Stack.of(state, memory)
    frame = _pop_frame(stack, operand_size // 8)
    if frame.rip > state.cs.limit:
        raise gp(0)
    if not virtual_interrupts:
        rflags = _replace(state, frame.rflags, UNPRIVILEGED_FLAGS | _IF, operand_size)
    else:
        if frame.rflags & _TF or (frame.rflags & _IF and state.rflags & _VIP):
            raise gp(0)
        rflags = _replace(state, frame.rflags, UNPRIVILEGED_FLAGS, operand_size) & ~_VIF
        rflags |= _VIF if frame.rflags & _IF else 0
    _commit(state, real_mode_segment(frame.cs, _V86_RIGHTS), frame.rip, rflags, stack.pointer)


def _to_virtual_8086(state: CpuState, memory: LinearMemory, frame: _Frame, stack: Stack) -> None:
    """From CPL 0, with VM set in the popped image: six segments and ESP follow on the stack."""
    pointer = stack.pop(4)
    selectors = {register: stack.pop(4) & 0xFFFF for register in (SegmentRegister.SS, *_V86_SEGMENTS)}
    if frame.rip > 0xFFFF:
        raise gp(0)
    if has_shadow_stack(state):
        shadow_stack.release(state, memory)
    for register, selector in selectors.items():
        state.segments[register] = real_mode_segment(selector, _V86_RIGHTS)
    code = real_mode_segment(frame.cs, _V86_RIGHTS)
    _commit(state, code, frame.rip, frame.rflags & DEFINED_RFLAGS | _FIXED_1, pointer)


# Protected mode and IA-32e mode


def _nested_task(state: CpuState, memory: LinearMemory, instruction_length: int, hooks: TaskSwitchHooks) -> None:
    if state.long_mode:
        raise gp(0)
    link = memory.read(system_address(state, state.tr.base, 0), 2)
    next_rip = (state.rip + instruction_length) & MASK32
    task_switch(state, memory, link, TaskSwitchSource.IRET, rip=next_rip, rflags=state.rflags, hooks=hooks)


def _protected(state: CpuState, memory: LinearMemory, operand_size: int) -> None:
    size = operand_size // 8
    stack = Stack.of(state, memory)
    if state.in_64_bit_mode:
        stack.read_ahead(5, size)
    frame = _pop_frame(stack, size)
    cpl = state.cpl
    if operand_size == 32 and frame.rflags & _VM and cpl == 0 and not state.long_mode:
        _to_virtual_8086(state, memory, frame, stack)
        return
    code = return_segment(state, memory, frame.cs, cpl)
    new_cpl = frame.cs & 3
    pointer, stack_segment = stack.pointer, state.ss
    if new_cpl > cpl or state.in_64_bit_mode:
        popped, selector = stack.pop(size), stack.pop(size) & 0xFFFF
        stack_segment = outer_stack_segment(state, memory, selector, code, new_cpl)
        pointer = loaded_pointer(state, popped, code, stack_segment)
    check_target(state, code, frame.rip)
    ssp = returned_shadow_stack(state, memory, frame.cs, code, frame.rip, event=True)
    code = descriptors.set_accessed(state, memory, frame.cs, code)

    ssp.commit(state)
    rflags = _replace(state, frame.rflags, _changeable(state), operand_size)
    state.segments[SegmentRegister.SS] = stack_segment
    _commit(state, code.segment(frame.cs), frame.rip, rflags, pointer)
    if new_cpl > cpl:
        drop_inner_segments(state, new_cpl)


def is_denied_by_fred(state: CpuState, code: Descriptor, cpl: int, target: int) -> bool:
    """Whether FRED forbids a transfer from privilege level ``cpl`` to ``code`` at level ``target``.

    There is no way to another level but by FRED itself, and no 32-bit code at level 0.
    """
    return is_enabled(state) and (target != cpl or (not cpl and not code.long))


def return_segment(
    state: CpuState, memory: LinearMemory, selector: int, cpl: int, *, by_fred: bool = False
) -> Descriptor:
    """The code segment that privilege level ``cpl`` may return to, ``by_fred`` by ERETU; raises #GP or #NP."""
    if is_null(selector):
        raise gp(0)
    code = descriptors.read_descriptor(state, memory, selector)
    rpl = selector & 3
    if code is None or not code.is_code or rpl < cpl:
        raise selector_fault(Vector.GP, selector)
    if code.dpl > rpl if code.is_conforming else code.dpl != rpl:
        raise selector_fault(Vector.GP, selector)
    if state.long_mode and code.long and code.big:
        raise selector_fault(Vector.GP, selector)
    if not by_fred and is_denied_by_fred(state, code, cpl, rpl):
        raise selector_fault(Vector.GP, selector)
    if not code.present:
        raise selector_fault(Vector.NP, selector)
    return code


def outer_stack_segment(state: CpuState, memory: LinearMemory, selector: int, code: Descriptor, cpl: int) -> Segment:
    """SS of the outer level; a null one is for 64-bit code below privilege level 3 only."""
    if is_null(selector):
        if not (state.long_mode and code.long) or cpl == 3:
            raise gp(0)
        if selector & 3 != cpl:
            raise selector_fault(Vector.GP, selector)
        return null_segment(selector, cpl)
    stack = descriptors.read_stack_descriptor(state, memory, selector, cpl, Vector.GP)
    return descriptors.set_accessed(state, memory, selector, stack).segment(selector)


def loaded_pointer(state: CpuState, popped: int, code: Descriptor, stack_segment: Segment) -> int:
    """RSP after loading a popped stack pointer: a 16-bit stack takes SP and keeps the rest of the old ESP."""
    if state.long_mode and code.long:
        return popped
    if stack_segment.big:
        return popped & MASK32
    return state.gpr[Gpr.RSP] & 0xFFFF_0000 | popped & 0xFFFF


def check_target(state: CpuState, code: Descriptor, rip: int) -> None:
    """Raise #GP(0) unless ``rip`` is in the segment, or canonical for 64-bit code."""
    if state.long_mode and code.long:
        if not is_canonical(rip, linear_address_width(state)):
            raise gp(0)
    elif rip > code.limit:
        raise gp(0)


def returned_shadow_stack(
    state: CpuState, memory: LinearMemory, selector: int, code: Descriptor, rip: int, *, event: bool = False
) -> shadow_stack.SspChange:
    """What a return to ``rip`` in ``code`` does to shadow stacks; raises #CP unless the call came from there."""
    if not state.cr4 & Cr4.CET:
        return _NO_SHADOW_STACK
    long = state.long_mode and code.long
    lip = rip if long else (code.base + rip) & MASK32
    return shadow_stack.leave(state, memory, selector & 3, cs=selector, lip=lip, long=long, event=event)


def _changeable(state: CpuState) -> int:
    """The RFLAGS bits the current privilege level may change."""
    cpl = state.cpl
    mask = UNPRIVILEGED_FLAGS
    if cpl <= (state.rflags & _IOPL) >> 12:
        mask |= _IF
    if cpl == 0:
        mask |= _IOPL | _VIF | _VIP
    return mask


def drop_inner_segments(state: CpuState, cpl: int) -> None:
    """Make unusable the data segments that the outer level may not use."""
    for register in (SegmentRegister.ES, SegmentRegister.DS, SegmentRegister.FS, SegmentRegister.GS):
        segment = state.segments[register]
        conforming = segment.access_rights & 0xC == 0xC
        if segment.usable and segment.dpl < cpl and not conforming:
            # The base survives, as software that sets it with WRMSR and never reloads the selector relies on.
            state.segments[register] = evolve(null_segment(), base=segment.base)


def _commit(state: CpuState, code: Segment, rip: int, rflags: int, pointer: int) -> None:
    state.segments[SegmentRegister.CS] = code
    state.rip = rip
    state.rflags = rflags
    state.gpr[Gpr.RSP] = pointer
