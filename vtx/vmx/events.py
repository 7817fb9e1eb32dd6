"""VM exits of events: exceptions, and whatever goes wrong while an event is being delivered.

Spec: SDM Vol. 3, "VM Exits", "Information for VM Exits Due to Vectored Events" and "Information for VM Exits During
Event Delivery".
"""

from __future__ import annotations

from typing import Final

from vmcs import controls as c
from vmcs.exits import Reason
from vtx.vmx.apic_access import access_exit
from vtx.vmx.ept import (
    QUALIFICATION_ASYNCHRONOUS,
    EptMisconfiguration,
    EptViolation,
    PageModificationLogFull,
)
from vtx.vmx.intercepts import exception_exit, resume_flag
from vtx.vmx.operation import VmxOperation
from vtx.vmx.record import NESTED_EXCEPTION, NMI_UNBLOCKING, VmExit, interruption_word
from vtx.vmx.sub_page_tables import SubPageEvent
from vtx.vmx.view import ControlView
from vtx.x86 import fred
from vtx.x86.event import Event
from vtx.x86.fred_delivery import event_data
from vtx.x86.outcome import Fault, NotModelled, Vector
from vtx.x86.second_level import ReservedPageAccess, SecondLevelFault

_SUB_PAGE_MISS: Final = 1 << 11
_QUALIFICATION_TELLS_OF_NMIS: Final = frozenset(
    (Reason.EPT_VIOLATION, Reason.PAGE_MODIFICATION_LOG_FULL, Reason.SPP_RELATED_EVENT)
)
_QUALIFICATION_TELLS_OF_ASYNCHRONY: Final = _QUALIFICATION_TELLS_OF_NMIS | {Reason.APIC_ACCESS}


def _word(event: Event) -> int:
    """Interruption or IDT-vectoring information of ``event``."""
    word = interruption_word(event.vector, event.kind, error_code=event.error_code is not None)
    return word | NESTED_EXCEPTION if event.nested else word


def event_exit(operation: VmxOperation, event: Event, fault: Fault | None) -> VmExit | None:
    """The exit that exception ``event`` causes instead of being delivered, or None."""
    record = exception_exit(operation.current_vmcs.values, operation.processor.state, event, fault)
    if record is not None and fault is not None:
        record.shadow_stack_busy = fault.shadow_stack_busy
    return record


def _with_vectoring(operation: VmxOperation, record: VmExit, delivering: Event) -> VmExit:
    if fred.is_enabled(operation.processor.state):
        record.event_data = event_data(delivering)
    record.vectoring = _word(delivering)
    record.vectoring_error = delivering.error_code or 0
    if delivering.is_software:
        record.instruction_length = delivering.instruction_length
    return record


def delivery_exit(operation: VmxOperation, delivering: Event, fault: Fault | None) -> VmExit | None:
    """The exit of an exception during delivery of ``delivering``; ``fault`` is None for a triple fault."""
    if fault is None:
        return VmExit(Reason.TRIPLE_FAULT)
    record = event_exit(operation, Event.from_fault(fault), fault)
    # A double fault that exits directly is not an exit during delivery of what led to it.
    if record is None or fault.vector == Vector.DF:
        return record
    if fred.is_enabled(operation.processor.state):
        record.interruption |= NESTED_EXCEPTION
    return _with_vectoring(operation, record, delivering)


def task_switch_exit(operation: VmxOperation, record: VmExit, delivering: Event | None) -> VmExit:
    """The exit of a task switch, through a task gate of the IDT if something is being delivered."""
    if delivering is None:
        return record
    if not delivering.is_software:
        record.instruction_length = None
    return _with_vectoring(operation, record, delivering)


def second_level_exit(operation: VmxOperation, fault: SecondLevelFault, delivering: Event | None) -> VmExit:
    """The exit of an EPT violation, an EPT misconfiguration, a full page-modification log or an APIC access."""
    state = operation.processor.state
    match fault:
        case EptViolation():
            record = VmExit(Reason.EPT_VIOLATION, fault.complete_qualification, guest_physical=fault.guest_physical)
            record.guest_linear = fault.linear
        case EptMisconfiguration():
            record = VmExit(Reason.EPT_MISCONFIGURATION, guest_physical=fault.guest_physical)
        case PageModificationLogFull():
            record = VmExit(Reason.PAGE_MODIFICATION_LOG_FULL)
        case SubPageEvent():
            qualification = _SUB_PAGE_MISS if fault.miss else 0
            record = VmExit(Reason.SPP_RELATED_EVENT, qualification, guest_physical=fault.guest_physical)
            record.guest_linear = fault.linear
        case ReservedPageAccess():
            record = access_exit(operation, fault, delivering)
        case _:
            raise NotModelled(f"second-level event {type(fault).__name__} in VMX non-root operation")
    if fault.asynchronous and record.reason in _QUALIFICATION_TELLS_OF_ASYNCHRONY:
        record.qualification |= QUALIFICATION_ASYNCHRONOUS
    record.resume_flag = 1
    record.shadow_stack_busy = fault.shadow_stack_busy
    if delivering is not None:
        record.resume_flag = resume_flag(delivering, state)
        return _with_vectoring(operation, record, delivering)
    return record


def note_nmi_unblocking(view: ControlView, record: VmExit) -> None:
    """An IRET that ended blocking by NMI faulted: say so, if the exit has a place for it.

    Spec: SDM Vol. 3, "VM Exits", "Information About NMI Unblocking Due to IRET".
    """
    if view.pin & c.NMI_EXITING.mask and not view.pin & c.VIRTUAL_NMIS.mask:
        return
    if record.reason in _QUALIFICATION_TELLS_OF_NMIS:
        record.qualification |= NMI_UNBLOCKING
    elif record.interruption and record.interruption & 0xFF != Vector.DF:
        record.interruption |= NMI_UNBLOCKING
