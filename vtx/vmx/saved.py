"""The VMX state of a logical processor, saved and restored for snapshots.

Every active VMCS is kept whole, with what has changed in it since VM entry last checked it. What VM entry derives from
a VMCS (the view of its controls, the second level, the virtual-APIC page) is derived again: at the next VM entry, or at
once for the guest that is running.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from vmcs.region import LaunchState, Vmcs
from vtx.vmx.derived import derive_running_guest
from vtx.vmx.host_state import NO_SECOND_LEVEL
from vtx.vmx.operation import ActiveVmcs, VmxOperation
from vtx.vmx.record import VmExit
from vtx.vmx.vmx import Vmx


@frozen
class SavedVmcs:
    """An active VMCS, whose region is at physical address ``pointer``."""

    pointer: int
    values: Mapping[int, int]
    changed: Mapping[int, int]
    launch_state: LaunchState
    shadow: bool
    abort_indicator: int


@frozen
class SavedVmx:
    """VMX operation. The names are those of the attributes of `VmxOperation`.

    ``current`` is the current-VMCS pointer, None without a current VMCS; ``virtual_interrupt`` whether the running
    guest has a pending virtual interrupt.
    """

    vmxon_pointer: int | None
    active: tuple[SavedVmcs, ...]
    current: int | None
    non_root: bool
    virtual_interrupt: bool
    below_threshold: VmExit | None
    pause_loop: tuple[int, int] | None
    host_nmi_blocked: bool
    timer_deadline: int | None
    trap_flag: bool
    pending_trap: bool
    transitions: int
    iret_unblocked_nmi: bool


def save_vmx(vmx: Vmx) -> SavedVmx:
    """The state of ``vmx``, between two instructions."""
    operation = vmx.operation
    return SavedVmx(
        vmxon_pointer=operation.vmxon_pointer,
        active=tuple(_save_vmcs(active) for active in operation.active.values()),
        current=operation.current.pointer if operation.current else None,
        non_root=operation.non_root,
        virtual_interrupt=operation.virtual_apic is not None and operation.virtual_apic.pending,
        below_threshold=operation.below_threshold,
        pause_loop=operation.pause_loop,
        host_nmi_blocked=operation.host_nmi_blocked,
        timer_deadline=operation.timer_deadline,
        trap_flag=operation.trap_flag,
        pending_trap=operation.pending_trap,
        transitions=operation.transitions,
        iret_unblocked_nmi=vmx.iret_unblocked_nmi,
    )


def restore_vmx(vmx: Vmx, saved: SavedVmx) -> None:
    """Put ``vmx`` and the second level of its processor's MMU back."""
    operation = vmx.operation
    operation.vmxon_pointer = saved.vmxon_pointer
    operation.active = {each.pointer: _restore_vmcs(operation, each) for each in saved.active}
    operation.current = None if saved.current is None else operation.active[saved.current]
    operation.non_root = saved.non_root
    operation.below_threshold = saved.below_threshold
    operation.pause_loop = saved.pause_loop
    operation.host_nmi_blocked = saved.host_nmi_blocked
    operation.timer_deadline = saved.timer_deadline
    operation.trap_flag = saved.trap_flag
    operation.pending_trap = saved.pending_trap
    operation.transitions = saved.transitions
    operation.last_failure = None
    vmx.iret_unblocked_nmi = saved.iret_unblocked_nmi
    operation.view = operation.virtual_apic = None
    operation.processor.mmu.second_level = NO_SECOND_LEVEL
    operation.processor.mmu.hlat = None
    if saved.non_root:
        derive_running_guest(operation, virtual_interrupt=saved.virtual_interrupt)


def _save_vmcs(active: ActiveVmcs) -> SavedVmcs:
    vmcs = active.vmcs
    return SavedVmcs(
        active.pointer, dict(vmcs.values), dict(vmcs.changed), vmcs.launch_state, vmcs.shadow, vmcs.abort_indicator
    )


def _restore_vmcs(operation: VmxOperation, saved: SavedVmcs) -> ActiveVmcs:
    vmcs = Vmcs(operation.capabilities)
    vmcs.values, vmcs.changed = dict(saved.values), dict(saved.changed)
    vmcs.launch_state, vmcs.shadow, vmcs.abort_indicator = saved.launch_state, saved.shadow, saved.abort_indicator
    return ActiveVmcs(saved.pointer, vmcs)
