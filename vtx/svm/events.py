"""#VMEXITs of events: exceptions, shutdown, nested page faults, and whatever goes wrong during delivery of an event.

Spec: APM Vol. 2, "Exception Intercepts", "State Saved on Exit", "Decode Assists", "Nested Paging".
"""

from __future__ import annotations

from typing import Final

from vmcs.vmcb.intercepts import Exit
from vtx.addresses import PAGE_OFFSET_MASK, PAGE_SIZE
from vtx.svm import avic_access
from vtx.svm.intercepts import next_rip
from vtx.svm.nested_paging import NestedPageFault
from vtx.svm.operation import SvmOperation
from vtx.svm.record import Vmexit, event_word
from vtx.x86.decode import MAX_INSTRUCTION_LENGTH
from vtx.x86.delivery import recognize
from vtx.x86.event import Event, EventKind
from vtx.x86.outcome import Fault, InstructionAborted, NotModelled, Vector
from vtx.x86.paging import PageFaultError
from vtx.x86.second_level import AccessKind, ReservedPageAccess, SecondLevelFault
from vtx.x86.state import MASK32, MASK64

_FETCH: Final = PageFaultError.ID.value
# INT1 goes through vector 1, but has an intercept of its own.
_INTERCEPTED: Final = frozenset((EventKind.HARDWARE_EXCEPTION, EventKind.SOFTWARE_EXCEPTION))


def exception_exit(operation: SvmOperation, event: Event, fault: Fault | None) -> Vmexit | None:
    """The exit that exception ``event`` causes instead of being delivered, or None (also for what is none)."""
    code = Exit.EXCEPTION_0 + event.vector
    if event.kind not in _INTERCEPTED or event.vector >= 32 or not operation.intercepts >> code & 1:
        return None
    state = operation.processor.state
    record = Vmexit(code, event.error_code or 0)
    if event.kind is EventKind.SOFTWARE_EXCEPTION:
        width = MASK64 if state.in_64_bit_mode else MASK32
        record.next_rip = (state.rip + event.instruction_length) & width
    elif event.vector == Vector.BR and not event.injected:
        record.next_rip = _after_bound(operation)
    elif event.vector == Vector.PF:
        record.info2 = (fault.address if fault else event.address) or 0
        if not record.info1 & _FETCH:
            record.instruction_bytes = instruction_bytes(operation)
    elif event.vector == Vector.DB:
        # DR6 and DR7 are what a handler would see; CR2 of a page fault is not.
        recognize(state, Event.from_fault(fault) if fault else event, block_nmi=False)
    return record


def _after_bound(operation: SvmOperation) -> int:
    """RIP of the instruction after the BOUND at RIP, whose exception is one of those that nRIP is saved for."""
    instruction = operation.processor.fetch()
    return 0 if instruction is None else next_rip(operation, instruction)


def delivery_exit(operation: SvmOperation, delivering: Event, fault: Fault | None) -> Vmexit | None:
    """The exit of an exception during delivery of ``delivering``; ``fault`` is None for a shutdown."""
    if fault is None:
        return Vmexit(Exit.SHUTDOWN) if operation.intercepted(Exit.SHUTDOWN) else None
    record = exception_exit(operation, Event.from_fault(fault), fault)
    if record is not None and fault.vector != Vector.DF:
        record.interrupted = event_word(delivering)
    return record


def second_level_exit(operation: SvmOperation, fault: SecondLevelFault, delivering: Event | None) -> Vmexit:
    """The exit of a nested page fault, or of an access to the APIC page that is none of an instruction's operands."""
    if isinstance(fault, ReservedPageAccess):
        record = avic_access.access_exit(fault)
    elif isinstance(fault, NestedPageFault):
        record = Vmexit(Exit.NPF, fault.error, fault.guest_physical)
        if not fault.error & _FETCH:
            record.instruction_bytes = instruction_bytes(operation)
    else:
        raise NotModelled("second-level event")
    if delivering is not None:
        record.interrupted = event_word(delivering)
    return record


def instruction_bytes(operation: SvmOperation) -> bytes:
    """Up to 15 bytes of code at RIP; fewer where the rest cannot be fetched."""
    processor = operation.processor
    if not operation.features.decode_assists:
        return b""
    linear, user = processor.state.linear_rip, processor.state.cpl == 3
    room = min(PAGE_SIZE - (linear & PAGE_OFFSET_MASK), MAX_INSTRUCTION_LENGTH)
    code = b""
    try:
        code = processor.memory.read(processor.mmu.translate(linear, AccessKind.EXECUTE, user=user), room)
        if room < MAX_INSTRUCTION_LENGTH:
            rest = processor.mmu.translate(linear + room, AccessKind.EXECUTE, user=user)
            code += processor.memory.read(rest, MAX_INSTRUCTION_LENGTH - room)
    except InstructionAborted:
        pass
    return code
