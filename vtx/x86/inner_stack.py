"""Stacks that the TSS gives: to events and to calls through gates that go to an inner privilege level.

``external`` is the EXT bit of error codes: set while an event that is no software interrupt is delivered.

Spec: SDM Vol. 3, "Stack Switching".
"""

from __future__ import annotations

from typing import Final

from vtx.x86 import descriptors
from vtx.x86.descriptors import Descriptor, is_null, read_stack_descriptor, selector_fault
from vtx.x86.linear import LinearMemory, system_address
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.stack import Stack
from vtx.x86.state import CpuState

_STACK_32: Final = 4  # ESP0, then 8 bytes a level
_STACK_16: Final = 2  # SP0, then 4 bytes a level
_STACK_64: Final = 4  # RSP0, then 8 bytes a level
_IST_64: Final = 28  # IST1 is 8 bytes on


def tss_stack(state: CpuState, memory: LinearMemory, cpl: int, external: int = 0) -> tuple[Stack, Descriptor]:
    """The stack of privilege level ``cpl`` in a 16-bit or 32-bit TSS, and its descriptor, not yet accessed.

    Raises #TS, or #SS for a segment that is not present.
    """
    if state.tr.type in descriptors.TSS_32_TYPES:
        offset, size = _STACK_32 + cpl * 8, 4
    else:
        offset, size = _STACK_16 + cpl * 4, 2
    if not state.tr.usable or offset + size + 1 > state.tr.limit:
        raise selector_fault(Vector.TS, state.tr.selector, external)
    selector = memory.read(system_address(state, state.tr.base, offset + size), 2)
    pointer = memory.read(system_address(state, state.tr.base, offset), size)
    if is_null(selector):
        raise InstructionAborted(Fault(Vector.TS, external))
    descriptor = read_stack_descriptor(state, memory, selector, cpl, Vector.TS, external)
    stack = Stack.of(
        state,
        memory,
        segment=descriptor.segment(selector),
        pointer=pointer,
        cpl=cpl,
        error_code=selector & 0xFFFC | external,
    )
    return stack, descriptor


def ia32e_stack_pointer(state: CpuState, memory: LinearMemory, cpl: int, *, ist: int = 0, external: int = 0) -> int:
    """RSP of entry ``ist`` (1 to 7) of the interrupt stack table, or for 0 that of level ``cpl``, from a 64-bit TSS.

    Raises #TS; whether the pointer is canonical is the caller's check.
    """
    offset = _IST_64 + ist * 8 if ist else _STACK_64 + cpl * 8
    if not state.tr.usable or offset + 7 > state.tr.limit:
        raise selector_fault(Vector.TS, state.tr.selector, external)
    return memory.read(system_address(state, state.tr.base, offset, external), 8)
