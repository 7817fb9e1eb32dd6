"""VM exits at instruction boundaries: monitor trap flag, preemption timer, windows, NMIs and external interrupts.

Spec: SDM Vol. 3, "VMX Non-Root Operation", "Other Causes of VM Exits"; "Interrupt and Exception Handling", "Priority
Among Concurrent Events".
"""

from __future__ import annotations

from typing import Final

from vmcs import controls as c
from vmcs import layouts
from vmcs.exits import Reason
from vtx.vmx.operation import VmxOperation
from vtx.vmx.posted_interrupts import is_notification, process_posted
from vtx.vmx.record import NMI_WORD, VmExit, interruption_word
from vtx.vmx.view import ControlView
from vtx.vmx.virtual_apic import VirtualApic
from vtx.x86.event import Event
from vtx.x86.state import Activity, CpuState, Rflags, Shadow
from vtx.x86.user_interrupts import is_notification as is_user_notification

_EXTERNAL_INTERRUPT_EXITING: Final = c.EXTERNAL_INTERRUPT_EXITING.mask
_NMI_EXITING: Final = c.NMI_EXITING.mask
_VIRTUAL_NMIS: Final = c.VIRTUAL_NMIS.mask
_NMI_WINDOW: Final = c.NMI_WINDOW_EXITING.mask
_INTERRUPT_WINDOW: Final = c.INTERRUPT_WINDOW_EXITING.mask
_POSTED_INTERRUPTS: Final = c.PROCESS_POSTED_INTERRUPTS.mask
_ACKNOWLEDGE: Final = c.EXIT_ACKNOWLEDGE_INTERRUPT_ON_EXIT.mask
_IF: Final = int(Rflags.IF)
# Bits of "pending debug exceptions" that have a debug exception delivered: enabled breakpoint and BS.
_ASLEEP: Final = (Activity.SHUTDOWN, Activity.WAIT_FOR_SIPI)
_DELIVERABLE_DEBUG: Final = 1 << 12 | 1 << 14


def boundary_event(operation: VmxOperation) -> VmExit | Event | None:
    """What has the highest priority before the next instruction: a VM exit, a virtual interrupt to deliver, or None.

    Between instructions, debug traps have priority over all but the monitor trap flag and, right after VM entry, a TPR
    below its threshold; delivering them is the processor's business, so None is also the answer while one is waiting.
    """
    view, state = operation.view, operation.processor.state
    assert view is not None
    if operation.below_threshold is not None and state.activity not in _ASLEEP:
        return operation.below_threshold
    if operation.pending_trap:
        return VmExit(Reason.MONITOR_TRAP_FLAG)
    if operation.trap_flag and state.activity is Activity.ACTIVE:
        operation.pending_trap = True
    if state.pending_debug & _DELIVERABLE_DEBUG and not _blocked_by_mov_ss(state):
        return None
    if state.activity is Activity.WAIT_FOR_SIPI:
        return None
    deadline = operation.timer_deadline
    if deadline is not None and operation.processor.tsc() >= deadline:
        return VmExit(Reason.PREEMPTION_TIMER_EXPIRED)
    return _interrupt(operation, view, state)


def _interrupt(operation: VmxOperation, view: ControlView, state: CpuState) -> VmExit | Event | None:
    processor = operation.processor
    if view.primary & _NMI_WINDOW and not state.nmi_blocked and not _blocked_by_mov_ss(state):
        return VmExit(Reason.NMI_WINDOW)
    if processor.nmi_pending() and not _nmi_is_blocked(view, state):
        if not view.pin & _NMI_EXITING:
            return None
        processor.acknowledge_nmi()
        return VmExit(Reason.EXCEPTION_OR_NMI, interruption=NMI_WORD)
    if state.activity is Activity.SHUTDOWN:
        return None
    apic = operation.virtual_apic
    if state.rflags & _IF and not state.shadow:
        if view.primary & _INTERRUPT_WINDOW:
            return VmExit(Reason.INTERRUPT_WINDOW)
        if apic is not None and apic.pending:
            return _virtual_interrupt(operation, apic)
    # With external-interrupt exiting, RFLAGS.IF and blocking by STI do not hold interrupts back.
    if view.pin & _EXTERNAL_INTERRUPT_EXITING and not _blocked_by_mov_ss(state) and processor.interrupt_pending():
        word = 0
        if view.exit & _ACKNOWLEDGE:
            vector = processor.acknowledge_interrupt()
            if view.pin & _POSTED_INTERRUPTS and is_notification(operation, vector):
                process_posted(operation)
                return _interrupt(operation, view, state)
            word = interruption_word(vector, layouts.EXTERNAL_INTERRUPT)
        return VmExit(Reason.EXTERNAL_INTERRUPT, interruption=word)
    return None


def _virtual_interrupt(operation: VmxOperation, apic: VirtualApic) -> Event:
    """Virtual-interrupt delivery; nothing but the processor itself will end service of a notification."""
    event, processor = apic.deliver(), operation.processor
    if is_user_notification(processor.state, processor.msrs.values, event):
        apic.dismiss()
    return event


def _blocked_by_mov_ss(state: CpuState) -> bool:
    return state.shadow is not Shadow.NONE and bool(state.shadow & Shadow.MOV_SS)


def _nmi_is_blocked(view: ControlView, state: CpuState) -> bool:
    """Virtual NMIs leave NMIs themselves unblocked: blocking by NMI is then the guest's own.

    Blocking by STI holds NMIs back too, as outside VMX operation: processors may, for one instruction.
    Spec: SDM Vol. 2, "STI—Set Interrupt Flag".
    """
    return state.shadow is not Shadow.NONE or (state.nmi_blocked and not view.pin & _VIRTUAL_NMIS)


def interrupts_ignore_if(operation: VmxOperation) -> bool:
    """Whether an interrupt causes a VM exit, or is looked for in the posted ones, whatever RFLAGS.IF says."""
    return operation.non_root and operation.view is not None and bool(operation.view.pin & _EXTERNAL_INTERRUPT_EXITING)


def wants_boundary(operation: VmxOperation) -> bool:
    """Whether the very next boundaries matter one by one."""
    if operation.trap_flag or operation.pending_trap or operation.below_threshold is not None:
        return True
    view = operation.view
    if view is None:
        return False
    # A window can open at any instruction: the end of blocking by STI or MOV SS, or an IRET that unblocks NMIs.
    if view.primary & _NMI_WINDOW:
        return True
    return bool(operation.processor.state.rflags & _IF) and wants_interrupt_window(operation)


def wants_interrupt_window(operation: VmxOperation) -> bool:
    """Whether an exit, or delivery of a virtual interrupt, is due as soon as RFLAGS.IF is 1."""
    view = operation.view
    if view is None:
        return False
    return bool(view.primary & _INTERRUPT_WINDOW) or (
        operation.virtual_apic is not None and operation.virtual_apic.pending
    )
