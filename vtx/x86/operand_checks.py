"""Operands that an engine cannot vouch for: may the instruction at RIP access them, and what if not.

Spec: SDM Vol. 3, "Limit Checking", "Type Checking", "Interrupt 17—Alignment Check Exception (#AC)"; Vol. 1, "Alignment
of Words, Doublewords, Quadwords, and Double Quadwords".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtx.x86 import access, near_branches
from vtx.x86.access import Operand
from vtx.x86.alignment import checked_alignment, checks_alignment
from vtx.x86.decode import segment_allows
from vtx.x86.execution import STEP
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import CpuState, Cr0, Cr4

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_EM, _TS = int(Cr0.EM), int(Cr0.TS)
_OSFXSR: Final = int(Cr4.OSFXSR)


def execute(processor: LogicalProcessor, until: int | None, origin: int | None = None) -> bool:
    """Have the instruction at RIP executed if it, and all its memory operands, may be accessed; else raise the fault.

    ``origin`` is the near branch that led to it (see `vtx.x86.execution.OperandTrap`). False if it ran into a fault, or
    is to be tried again.
    """
    state = processor.state
    try:
        fault = operand_fault(state, access.operands(processor))
    except InstructionAborted as aborted:
        if origin is not None:
            near_branches.take_back(processor, origin)
        processor.abort(aborted.cause)
        return False
    if fault is not None:
        processor.raise_fault(fault)
        return False
    reload, processor.reload = processor.reload, False
    event = processor.engine.run(state, STEP, reload=reload, native=True)
    processor.forget_implicit_accesses()
    return processor.handle(event, until)


def operand_fault(state: CpuState, operands: list[Operand]) -> Fault | None:
    """The fault of the first of ``operands`` that must not be accessed, paging apart."""
    for operand in operands:
        segment = state.segments[operand.segment]
        if not state.in_64_bit_mode and not segment_allows(
            state, segment, operand.offset, operand.size, write=operand.writes
        ):
            return Fault(Vector.SS if operand.stack else Vector.GP, 0)
        if operand.linear & operand.alignment - 1:
            return _unavailable(state) or Fault(Vector.GP, 0)
    if checks_alignment(state):
        for operand in operands:
            if operand.linear & checked_alignment(operand.size) - 1:
                return Fault(Vector.AC, 0)
    return None


def _unavailable(state: CpuState) -> Fault | None:
    """What keeps an SSE instruction from executing at all."""
    if state.cr0 & _EM or not state.cr4 & _OSFXSR:
        return Fault(Vector.UD)
    return Fault(Vector.NM) if state.cr0 & _TS else None
