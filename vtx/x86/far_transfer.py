"""Far CALL, JMP and RET in protected mode and IA-32e mode, task switches apart.

Everything is checked, and pushed or popped, before anything is committed: a transfer that faults changes no register.

Spec: SDM Vol. 2, "CALL—Call Procedure", "JMP—Jump", "RET—Return From Procedure"; SDM Vol. 3, "Privilege Level Checking
When Transferring Program Control Between Code Segments", "Stack Switching", "IA-32e Mode Call Gates".
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vtx.x86 import control_flow, descriptors, iret, shadow_stack
from vtx.x86.descriptors import Descriptor, Gate, SystemType, is_null, null_segment, selector_fault
from vtx.x86.fred import is_enabled
from vtx.x86.inner_stack import ia32e_stack_pointer, tss_stack
from vtx.x86.linear import LinearMemory, is_canonical, linear_address_width, linear_code_address
from vtx.x86.outcome import Fault, InstructionAborted, Vector, gp
from vtx.x86.stack import Stack
from vtx.x86.state import MASK32, MASK64, CpuState, Gpr, SegmentRegister, Shadow

_GATE_WORDS: Final = {SystemType.CALL_GATE_16: 2, SystemType.CALL_GATE_32: 4}


@frozen
class _Target:
    """Where a transfer goes; ``cpl`` is the privilege level there, ``gate`` the one it goes through."""

    selector: int
    code: Descriptor
    offset: int
    cpl: int
    gate: Gate | None = None

    def is_long(self, state: CpuState) -> bool:
        """Whether it is 64-bit code."""
        return state.long_mode and self.code.long


def far_jump(state: CpuState, memory: LinearMemory, selector: int, offset: int) -> None:
    """JMP to ``offset`` in the code segment of ``selector``, or through its call gate. Raises the fault."""
    target = _target(state, memory, selector, offset, call=False)
    _check_offset(state, target)
    shadow_stack.check_mode(state, target.cpl, long=target.is_long(state))
    _enter(state, memory, target)


def far_call(
    state: CpuState, memory: LinearMemory, selector: int, offset: int, *, operand_size: int, next_rip: int
) -> None:
    """CALL likewise; ``operand_size`` in bytes is that of the return address, except through a gate."""
    target = _target(state, memory, selector, offset, call=True)
    if target.cpl != state.cpl:
        _call_inner(state, memory, target, next_rip)
        return
    size = operand_size
    if target.gate is not None:
        size = 8 if state.long_mode else _GATE_WORDS[SystemType(target.gate.type)]
    wide = state.long_mode and target.gate is not None
    stack = Stack.of(state, memory, bits=64 if wide else None)
    stack.check_room(2, size)
    _check_offset(state, target)
    shadow_stack.check_mode(state, target.cpl, long=target.is_long(state))
    stack.push(state.cs.selector, next_rip, size=size)
    ssp = _shadow_stack(state, memory, target, next_rip)
    _enter(state, memory, target)
    ssp.commit(state)
    state.gpr[Gpr.RSP] = stack.pointer


def far_return(state: CpuState, memory: LinearMemory, operand_size: int, released: int) -> None:
    """RET with ``operand_size`` in bytes, releasing ``released`` bytes of parameters. Raises the fault."""
    stack = Stack.of(state, memory)
    rip = stack.pop(operand_size)
    selector = stack.pop(operand_size) & 0xFFFF
    cpl = state.cpl
    code = iret.return_segment(state, memory, selector, cpl)
    stack.release(released)
    pointer, stack_segment = stack.pointer, state.ss
    outer = selector & 3 > cpl
    if outer:
        popped = stack.pop(operand_size)
        outer_selector = stack.pop(operand_size) & 0xFFFF
        stack_segment = iret.outer_stack_segment(state, memory, outer_selector, code, selector & 3)
        pointer = iret.loaded_pointer(state, popped, code, stack_segment)
    iret.check_target(state, code, rip)
    ssp = iret.returned_shadow_stack(state, memory, selector, code, rip)
    code = descriptors.set_accessed(state, memory, selector, code)
    ssp.commit(state)
    state.segments[SegmentRegister.SS] = stack_segment
    state.segments[SegmentRegister.CS] = code.segment(selector)
    state.rip = rip
    state.gpr[Gpr.RSP] = pointer
    if outer:
        iret.drop_inner_segments(state, selector & 3)
        outer_stack = Stack.of(state, memory)
        outer_stack.release(released)
        state.gpr[Gpr.RSP] = outer_stack.pointer
    state.shadow = Shadow.NONE


# Where to


def _target(state: CpuState, memory: LinearMemory, selector: int, offset: int, *, call: bool) -> _Target:
    if is_null(selector):
        raise gp(0)
    descriptor = descriptors.read_descriptor(state, memory, selector)
    if descriptor is None:
        raise selector_fault(Vector.GP, selector)
    gates = (SystemType.CALL_GATE_32,) if state.long_mode else (SystemType.CALL_GATE_32, SystemType.CALL_GATE_16)
    if descriptor.system_type in gates and not is_enabled(state):
        return _through_gate(state, memory, selector, call=call)
    cpl = state.cpl
    if not descriptor.is_code:
        raise selector_fault(Vector.GP, selector)
    if descriptor.dpl > cpl if descriptor.is_conforming else (selector & 3 > cpl or descriptor.dpl != cpl):
        raise selector_fault(Vector.GP, selector)
    if state.long_mode and descriptor.long and descriptor.big:
        raise selector_fault(Vector.GP, selector)
    if iret.is_denied_by_fred(state, descriptor, cpl, cpl):
        raise selector_fault(Vector.GP, selector)
    if not descriptor.present:
        raise selector_fault(Vector.NP, selector)
    return _Target(selector, descriptor, offset, cpl)


def _through_gate(state: CpuState, memory: LinearMemory, selector: int, *, call: bool) -> _Target:
    gate = _gate(state, memory, selector)
    if is_null(gate.selector):
        raise gp(0)
    code = descriptors.read_descriptor(state, memory, gate.selector)
    cpl = state.cpl
    if code is None or not code.is_code or code.dpl > cpl:
        raise selector_fault(Vector.GP, gate.selector)
    if not call and not code.is_conforming and code.dpl != cpl:
        raise selector_fault(Vector.GP, gate.selector)
    if state.long_mode and (not code.long or code.big):
        raise selector_fault(Vector.GP, gate.selector)
    if not code.present:
        raise selector_fault(Vector.NP, gate.selector)
    return _Target(gate.selector, code, gate.offset, cpl if code.is_conforming else code.dpl, gate)


def _gate(state: CpuState, memory: LinearMemory, selector: int) -> Gate:
    """The call gate of ``selector``, which the current privilege level may use."""
    address = descriptors.descriptor_address(state, selector, 16 if state.long_mode else 8)
    if address is None:
        raise selector_fault(Vector.GP, selector)
    high = memory.read(address + 8, 8) if state.long_mode else 0
    gate = descriptors.parse_gate(memory.read(address, 8), high)
    if high >> 40 & 0x1F or gate.dpl < max(state.cpl, selector & 3):
        raise selector_fault(Vector.GP, selector)
    if not gate.present:
        raise selector_fault(Vector.NP, selector)
    return gate


def _check_offset(state: CpuState, target: _Target) -> None:
    iret.check_target(state, target.code, target.offset)


# Through a call gate to an inner level


def _call_inner(state: CpuState, memory: LinearMemory, target: _Target, next_rip: int) -> None:
    gate = target.gate
    assert gate is not None, "only a gate leads to another privilege level"
    if state.long_mode:
        size, parameters = 8, []
        stack, descriptor = _ia32e_stack(state, memory, target.cpl), None
    else:
        size = _GATE_WORDS[SystemType(gate.type)]
        stack, descriptor = tss_stack(state, memory, target.cpl)
        old = Stack.of(state, memory)
        parameters = [old.pop(size) for _ in range(gate.parameter_count)]
    stack.check_room(4 + len(parameters), size)
    _check_offset(state, target)
    if descriptor is not None:
        selector = stack.segment.selector
        stack.segment = descriptors.set_accessed(state, memory, selector, descriptor).segment(selector)
    stack.push(state.ss.selector, state.gpr[Gpr.RSP], *reversed(parameters), state.cs.selector, next_rip, size=size)
    ssp = _shadow_stack(state, memory, target, next_rip)
    ssp.commit(state)
    state.segments[SegmentRegister.SS] = stack.segment
    _enter(state, memory, target)
    state.gpr[Gpr.RSP] = stack.pointer


def _ia32e_stack(state: CpuState, memory: LinearMemory, cpl: int) -> Stack:
    pointer = ia32e_stack_pointer(state, memory, cpl)
    if not is_canonical(pointer, linear_address_width(state)):
        raise InstructionAborted(Fault(Vector.SS, 0))
    return Stack.of(state, memory, segment=null_segment(cpl, cpl), pointer=pointer, cpl=cpl, bits=64)


def _shadow_stack(state: CpuState, memory: LinearMemory, target: _Target, next_rip: int) -> shadow_stack.SspChange:
    lip = linear_code_address(state, next_rip)
    return shadow_stack.enter(state, memory, target.cpl, cs=state.cs.selector, lip=lip, long=target.is_long(state))


def _enter(state: CpuState, memory: LinearMemory, target: _Target) -> None:
    code = descriptors.set_accessed(state, memory, target.selector, target.code)
    state.segments[SegmentRegister.CS] = code.segment(target.selector & ~3 | target.cpl)
    state.rip = target.offset & (MASK64 if state.in_64_bit_mode else MASK32)
    control_flow.expect_endbranch(state, target.cpl)
    state.shadow = Shadow.NONE
