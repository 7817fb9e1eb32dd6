"""System-management interrupts in VMX operation, by the default treatment: an SMI leaves VMX operation, RSM returns.

VMX-critical state is kept inside the processor. Nothing of it can be reached from SMM: CR4.VMXE is reserved there.

Spec: SDM Vol. 3, "Default Treatment of SMI Delivery", "Default Treatment of RSM".
"""

from __future__ import annotations

from typing import Final

from attrs import astuple, frozen

from vtx.addresses import PhysicalAddress
from vtx.vmx.derived import derive_running_guest
from vtx.vmx.exit import leave_non_root
from vtx.vmx.operation import NO_VMCS, VmxOperation
from vtx.x86.second_level import IdentitySecondLevel
from vtx.x86.state import Cr0, Rflags
from vtx.x86.virtualization import SmmSuspension

_PE_AND_PG: Final = int(Cr0.PE | Cr0.PG)
_NO_SECOND_LEVEL: Final = IdentitySecondLevel()


@frozen
class _Suspended:
    """VMX-critical state and where the processor was; ``timer`` is the deadline of the preemption timer plus 1, or 0.

    Numbers only. Blocking by NMI, virtual or not, is with the registers; SMIs wait for other blocking to end.
    """

    vmxon_pointer: int
    current: int
    non_root: int
    timer: int
    trap_flag: int
    pending_trap: int
    below_threshold: int
    virtual_interrupt: int
    host_nmi_blocked: int


def suspend(operation: VmxOperation) -> SmmSuspension | None:
    """Leave VMX operation for SMM; None if the processor is not in VMX operation."""
    if operation.vmxon_pointer is None:
        return None
    view, deadline, apic = operation.view, operation.timer_deadline, operation.virtual_apic
    suspended = _Suspended(
        vmxon_pointer=operation.vmxon_pointer,
        current=operation.current_pointer,
        non_root=operation.non_root,
        timer=0 if deadline is None else deadline + 1,
        trap_flag=operation.trap_flag,
        pending_trap=operation.pending_trap,
        below_threshold=operation.below_threshold is not None,
        virtual_interrupt=apic is not None and apic.pending,
        host_nmi_blocked=operation.host_nmi_blocked,
    )
    operation.vmxon_pointer = operation.current = None
    leave_non_root(operation)
    eptp = None if view is None else view.eptp
    shown = {} if eptp is None else {"enable EPT": 1, "EPTP": eptp}
    return SmmSuspension(tuple(int(each) for each in astuple(suspended)), shown)


def resume(operation: VmxOperation, state: tuple[int, ...]) -> None:
    """Return to VMX operation as `suspend` left it; RSM has restored the registers and invalidated translations."""
    suspended = _Suspended(*state)
    operation.vmxon_pointer = suspended.vmxon_pointer
    operation.current = None if suspended.current == NO_VMCS else operation.active[suspended.current]
    operation.host_nmi_blocked = bool(suspended.host_nmi_blocked)
    if suspended.non_root:
        _resume_guest(operation, suspended)
    _fix_registers(operation)


def _resume_guest(operation: VmxOperation, suspended: _Suspended) -> None:
    processor, active = operation.processor, operation.current
    assert active is not None
    operation.non_root = True
    operation.timer_deadline = suspended.timer - 1 if suspended.timer else None
    operation.trap_flag, operation.pending_trap = bool(suspended.trap_flag), bool(suspended.pending_trap)
    operation.pause_loop = None
    view = derive_running_guest(operation, virtual_interrupt=bool(suspended.virtual_interrupt))
    if suspended.below_threshold and operation.virtual_apic is not None:
        operation.below_threshold = operation.virtual_apic.enter()
    if view.apic_access_page is not None:
        processor.mmu.reserved_page = PhysicalAddress(view.apic_access_page)
    assert active.second_level is not None
    processor.mmu.vm_transition(processor.state, active.second_level, view.vpid, flush=True)


def _fix_registers(operation: VmxOperation) -> None:
    """Bits of CR0 and CR4 that VMX operation fixes, and the privilege level in the selectors."""
    state, capabilities, view = operation.processor.state, operation.capabilities, operation.view
    unrestricted = view is not None and view.unrestricted_guest
    free = _PE_AND_PG if unrestricted else 0
    state.cr0 = (state.cr0 | capabilities.cr0_must_be_1 & ~free) & capabilities.cr0_may_be_1
    state.cr4 = (state.cr4 | capabilities.cr4_must_be_1) & capabilities.cr4_may_be_1
    if not state.rflags & Rflags.VM and not unrestricted:
        for segment in (state.cs, state.ss):
            segment.selector = segment.selector & ~3 | state.ss.dpl
