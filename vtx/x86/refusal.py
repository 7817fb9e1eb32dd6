"""From a refused translation to what the architecture makes of it: a fault, or an event of the second level.

The engine reports the page it could not have; the exact address, and whether the access was an implicit one of the
supervisor, follow from the instruction. With both the translation is tried again, and that answer is the one that
counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define, evolve

from vtx.addresses import PAGE_OFFSET_MASK
from vtx.x86 import access, near_branches, operand_checks
from vtx.x86.access import Access, Operand, operands
from vtx.x86.decode import MAX_INSTRUCTION_LENGTH, decode
from vtx.x86.execution import STEP, EngineEvent, ExceptionTrap, OperandTrap, RefusedFill, Stepped
from vtx.x86.mmu import Grant
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.second_level import AccessKind, ReservedPageAccess, SubPageWrite
from vtx.x86.state import MASK32, MASK64, Rflags

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor


def handle(processor: LogicalProcessor, event: RefusedFill) -> None:
    """Raise at RIP what the refused access raises, or arrange for the instruction to be tried again."""
    state = processor.state
    if event.kind is AccessKind.EXECUTE:
        exact = Access(state.linear_rip, event.kind)
        if exact.linear & ~PAGE_OFFSET_MASK != event.linear_page:
            # Translation looked ahead; only the instruction that really crosses into the page faults.
            if not _crosses(processor, exact.linear, event.linear_page):
                processor.step_next = True
                return
            exact = Access(event.linear_page, event.kind)
        fault = near_branches.fetch_fault(state, exact.linear - state.cs.base & MASK32)
        if fault is not None:
            if event.origin is not None:
                near_branches.take_back(processor, event.origin)
            processor.abort(fault)
            return
    else:
        try:
            exact = access.exact_access(processor, event.linear_page, event.kind)
        except InstructionAborted as aborted:
            processor.abort(aborted.cause)
            return
    ac = bool(state.rflags & Rflags.AC)
    result = processor.mmu.fill(exact.linear, exact.kind, state.cpl, ac, implicit=exact.implicit)
    if isinstance(result, Grant):
        if exact.implicit:
            # For this one instruction: an engine would not tell a later explicit access from it.
            processor.implicit_pages.add(event.linear_page)
            processor.step_next = True
        return
    if isinstance(result, Fault) and result.vector == Vector.GP:
        if exact.stack:
            result = evolve(result, vector=Vector.SS)
        elif event.origin is not None:
            near_branches.take_back(processor, event.origin)
    if processor.tracing is not None:
        processor.tracing.walk(exact.linear, exact.kind, state.cpl)
    if isinstance(result, ReservedPageAccess | SubPageWrite):
        _virtualize(processor, result)
    else:
        processor.abort(result)


@define(slots=True)
class _Refused:
    """See `vtx.x86.virtualization.RefusedInstruction`. ``event`` is what came of it, if it did not complete."""

    processor: LogicalProcessor
    access: ReservedPageAccess | SubPageWrite
    event: EngineEvent | None = None

    def operands(self) -> list[Operand]:
        return operands(self.processor)

    def execute(self) -> bool:
        processor = self.processor
        reload, processor.reload = processor.reload, False
        event = processor.engine.run(processor.state, STEP, reload=reload)
        if isinstance(event, OperandTrap) and operand_checks.operand_fault(processor.state, self.operands()) is None:
            event = processor.engine.run(processor.state, STEP, reload=False, native=True)
        if isinstance(event, Stepped):
            return True
        if isinstance(event, ExceptionTrap) and event.vector == Vector.DB:
            processor.handle(event)
            return True
        self.event = event
        return False


def _virtualize(processor: LogicalProcessor, refused: ReservedPageAccess | SubPageWrite) -> None:
    """The access is the virtualization extension's: it has the instruction executed after all, or exits."""
    extension = processor.virtualization
    assert extension is not None
    if processor.tracing is not None:
        processor.tracing.second_level_fault(refused)
    instruction = _Refused(processor, refused)
    transitions = extension.transitions
    fault = extension.virtualize_access(instruction)
    if fault is not None:
        processor.abort(fault)
    elif extension.transitions != transitions:
        processor.reload = True
    elif instruction.event is not None:
        processor.handle(instruction.event)


def _crosses(processor: LogicalProcessor, linear: int, page: int) -> bool:
    """Whether the instruction at RIP itself reaches into the page it could not fetch."""
    room = page - linear & (MASK64 if processor.state.in_64_bit_mode else MASK32)
    if not 0 < room < MAX_INSTRUCTION_LENGTH:
        return False
    try:
        physical = processor.mmu.translate(linear, AccessKind.EXECUTE, user=processor.state.cpl == 3)
    except InstructionAborted:
        return False
    return decode(processor.memory.read(physical, room), processor.state.code_bits) is None
