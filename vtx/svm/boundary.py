"""What happens between a guest's instructions: physical interrupts, NMIs and SMIs, and the virtual ones.

Spec: APM Vol. 2, "Interrupt Intercepts", "Interrupt and Local APIC Support", "Injecting Virtual (INTR) Interrupts",
"Masking Interrupts in Local APIC", "NMI Virtualization", "Virtual GIF", "VMCB Changes for AVIC".
"""

from __future__ import annotations

from typing import Final

from vmcs.vmcb import layouts
from vmcs.vmcb.intercepts import Exit
from vtx.svm import places as at
from vtx.svm.operation import SvmOperation
from vtx.svm.record import Vmexit
from vtx.x86.event import Event, EventKind
from vtx.x86.outcome import Vector
from vtx.x86.state import CpuState, Rflags, Shadow

_IF: Final = int(Rflags.IF)
# Bits of "pending debug exceptions" that have a debug exception delivered: enabled breakpoint and BS.
_DELIVERABLE_DEBUG: Final = 1 << 12 | 1 << 14
_SMI_EXTERNAL: Final = 1 << 0


def boundary_event(operation: SvmOperation) -> Vmexit | Event | None:
    """What has the highest priority before the guest's next instruction: a #VMEXIT, an event to deliver, or None.

    None also stands for what the processor does by itself: debug traps, and physical interrupts that go to the guest
    by the guest's own RFLAGS.IF.
    """
    state = operation.processor.state
    if state.pending_debug & _DELIVERABLE_DEBUG and not state.shadow & Shadow.MOV_SS:
        return None
    if state.gif:
        physical = _physical(operation, state)
        if physical is not None:
            return physical
    return _virtual(operation, state)


def _physical(operation: SvmOperation, state: CpuState) -> Vmexit | Event | None:
    processor = operation.processor
    if operation.smi_pending and operation.intercepted(Exit.SMI):
        return Vmexit(Exit.SMI, _SMI_EXTERNAL)
    if processor.nmi_pending() and operation.intercepted(Exit.NMI) and not _nmi_blocked(operation, state):
        return Vmexit(Exit.NMI)
    if not processor.interrupt_pending():
        return None
    masking = operation.masks_interrupts
    if masking:
        if not operation.host_if:
            return None
    elif not state.rflags & _IF or state.shadow:
        return None
    if operation.intercepted(Exit.INTR):
        return Vmexit(Exit.INTR)
    if masking:
        return Event(processor.acknowledge_interrupt(), EventKind.EXTERNAL_INTERRUPT)
    return None


def _nmi_blocked(operation: SvmOperation, state: CpuState) -> bool:
    """Blocking of physical NMIs; with virtual NMIs, the guest's blocking is about those."""
    if operation.uses_virtual_nmi:
        return operation.host_nmi_blocked
    return state.nmi_blocked or bool(state.shadow)


def _virtual_gif(operation: SvmOperation, state: CpuState) -> bool:
    if operation.uses_virtual_gif:
        return bool(operation.virtual & layouts.V_GIF)
    return state.gif


def _virtual(operation: SvmOperation, state: CpuState) -> Vmexit | Event | None:
    values, virtual, avic = operation.vmcb.values, operation.virtual, operation.avic
    if avic is None and not virtual & (layouts.V_IRQ | layouts.V_NMI):
        return None
    if not _virtual_gif(operation, state):
        return None
    if virtual & layouts.V_NMI and operation.uses_virtual_nmi and not state.nmi_blocked and not state.shadow:
        values[at.VIRTUAL] = virtual & ~layouts.V_NMI
        return Event(Vector.NMI, EventKind.NMI)
    if not virtual_interrupt_due(operation) or not state.rflags & _IF or state.shadow:
        return None
    if operation.intercepted(Exit.VINTR):
        return Vmexit(Exit.VINTR)
    if avic is not None:
        return avic.deliver()
    values[at.VIRTUAL] = virtual & ~layouts.V_IRQ
    return Event(virtual >> layouts.V_INTR_VECTOR_SHIFT & 0xFF, EventKind.EXTERNAL_INTERRUPT)


def virtual_interrupt_due(operation: SvmOperation) -> bool:
    """Whether there is a virtual interrupt of a priority that V_TPR lets pass."""
    if operation.avic is not None:
        return operation.avic.pending
    virtual = operation.virtual
    if not virtual & layouts.V_IRQ:
        return False
    priority = virtual >> layouts.V_INTR_PRIO_SHIFT & 0xF
    return bool(virtual & layouts.V_IGN_TPR) or priority > virtual & layouts.V_TPR & 0xF


def wants_boundary(operation: SvmOperation) -> bool:
    """Whether the very next boundaries matter one by one: a window can open at any of them."""
    state = operation.processor.state
    if not operation.guest_mode:
        return False
    virtual = operation.virtual
    if virtual & layouts.V_NMI and operation.uses_virtual_nmi:
        return True
    return bool(state.rflags & _IF) and wants_interrupt_window(operation)


def wants_interrupt_window(operation: SvmOperation) -> bool:
    """Whether a virtual interrupt is due as soon as RFLAGS.IF is 1."""
    return (
        operation.guest_mode and virtual_interrupt_due(operation) and _virtual_gif(operation, operation.processor.state)
    )


def holds_interrupts(operation: SvmOperation) -> bool:
    """Whether physical interrupts do nothing now, whatever RFLAGS.IF says."""
    state = operation.processor.state
    return not state.gif or (operation.guest_mode and operation.masks_interrupts and not operation.host_if)
