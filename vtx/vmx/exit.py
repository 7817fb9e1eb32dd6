"""VM exits: record why, save the guest, load the host.

Spec: SDM Vol. 3, "VM Exits".
"""

from __future__ import annotations

from typing import Final

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import AbortIndicator, Reason
from vmcs.region import Vmcs
from vmcs.rules.msr_load import Area, MsrViolation
from vtx.vmx.guest_state import save_guest
from vtx.vmx.host_state import load_host
from vtx.vmx.msr_area import load_msrs, store_msrs
from vtx.vmx.operation import ActiveVmcs, VmxOperation
from vtx.vmx.outcome import EntryFailed, Outcome, VmExited, VmxAborted
from vtx.vmx.record import ENTRY_FAILURE, ERROR_CODE_VALID, SHADOW_STACK_BUSY, VALID, VmExit
from vtx.vmx.view import ControlView
from vtx.x86.state import MASK32, Efer

_REASON: Final = f.EXIT_REASON.encoding
_QUALIFICATION: Final = f.EXIT_QUALIFICATION.encoding
_INTERRUPTION: Final = f.VM_EXIT_INTERRUPTION_INFORMATION.encoding
_INTERRUPTION_ERROR: Final = f.VM_EXIT_INTERRUPTION_ERROR_CODE.encoding
_VECTORING: Final = f.IDT_VECTORING_INFORMATION.encoding
_VECTORING_ERROR: Final = f.IDT_VECTORING_ERROR_CODE.encoding
_EVENT_DATA: Final = f.ORIGINAL_EVENT_DATA.encoding
_LENGTH: Final = f.VM_EXIT_INSTRUCTION_LENGTH.encoding
_INFORMATION: Final = f.VM_EXIT_INSTRUCTION_INFORMATION.encoding
_LINEAR: Final = f.GUEST_LINEAR_ADDRESS.encoding
_PHYSICAL: Final = f.GUEST_PHYSICAL_ADDRESS.encoding
_ENTRY_INTERRUPTION: Final = f.VM_ENTRY_INTERRUPTION_INFORMATION.encoding
_ENTRY_CONTROLS: Final = f.VM_ENTRY_CONTROLS.encoding
_STORE_COUNT: Final = f.VM_EXIT_MSR_STORE_COUNT.encoding
_LOAD_COUNT: Final = f.VM_EXIT_MSR_LOAD_COUNT.encoding

_VIRTUAL_NMIS: Final = c.VIRTUAL_NMIS.mask
_IA32E_MODE_GUEST: Final = c.ENTRY_IA32E_MODE_GUEST.mask
_LMA: Final = int(Efer.LMA)
_ABORT_OFFSET: Final = 4  # of the VMX-abort indicator in the VMCS region


def perform_exit(operation: VmxOperation, record: VmExit) -> Outcome:
    """Leave VMX non-root operation as ``record`` says; VmExited, or VmxAborted in the shutdown state."""
    active, view = operation.current, operation.view
    assert active is not None and view is not None
    vmcs = active.vmcs
    _record(vmcs, record, view)
    _update_entry_controls(operation, vmcs)
    save_guest(operation, vmcs, view, record)
    if vmcs.values[_STORE_COUNT]:
        failing = store_msrs(operation.processor, active.rule_context)
        if failing is not None:
            return abort(operation, AbortIndicator.SAVING_GUEST_MSRS, failing)
    state = operation.processor.state
    # With virtual NMIs, blocking was the guest's own; NMIs themselves were not blocked while it ran.
    state.nmi_blocked = record.is_nmi or (state.nmi_blocked and not view.pin & _VIRTUAL_NMIS)
    aborted = return_to_host(operation, active, view)
    if aborted is not None:
        return aborted
    if operation.observer is not None:
        operation.observer.vm_exit(vmcs, record)
    return VmExited(record.reason, record.qualification)


def perform_entry_failure(operation: VmxOperation, reason: Reason, qualification: int) -> Outcome:
    """Fail a VM entry during or after loading guest state: no guest state is saved, the host's is loaded.

    Spec: SDM Vol. 3, "VM Entries", "VM-Entry Failures During or After Loading Guest State".
    """
    active = operation.current
    assert active is not None and active.view is not None
    values = active.vmcs.values
    values[_REASON] = int(reason | ENTRY_FAILURE)
    values[_QUALIFICATION] = qualification
    aborted = return_to_host(operation, active, active.view)
    return aborted or EntryFailed(reason | ENTRY_FAILURE, qualification)


def return_to_host(operation: VmxOperation, active: ActiveVmcs, view: ControlView) -> Outcome | None:
    """Load host state and the host's MSRs; VmxAborted if that fails."""
    leave_non_root(operation)
    operation.transitions += 1
    indicator = load_host(operation, active.vmcs, view)
    if indicator is not None:
        return abort(operation, indicator)
    if active.vmcs.values[_LOAD_COUNT]:
        failing = load_msrs(operation.processor, active.rule_context, Area.EXIT_LOAD)
        if failing is not None:
            return abort(operation, AbortIndicator.LOADING_HOST_MSRS, failing)
    operation.processor.changed_system_state()
    return None


def leave_non_root(operation: VmxOperation) -> None:
    """Forget what belongs to a running guest."""
    operation.non_root = False
    operation.view = None
    operation.timer_deadline = None
    operation.trap_flag = operation.pending_trap = False
    operation.virtual_apic = operation.below_threshold = None
    operation.processor.mmu.reserved_page = None
    operation.processor.mmu.hlat = None
    operation.processor.monitor = None


def _record(vmcs: Vmcs, record: VmExit, view: ControlView) -> None:
    values = vmcs.values
    values[_REASON] = int(record.reason)
    if record.shadow_stack_busy and view.secondary_exit & c.EXIT_PREMATURELY_BUSY_SHADOW_STACK.mask:
        values[_REASON] |= SHADOW_STACK_BUSY
    values[_QUALIFICATION] = record.qualification
    values[_INTERRUPTION] = record.interruption
    values[_VECTORING] = record.vectoring
    if record.interruption & ERROR_CODE_VALID:
        values[_INTERRUPTION_ERROR] = record.interruption_error & MASK32
    if record.vectoring & ERROR_CODE_VALID:
        values[_VECTORING_ERROR] = record.vectoring_error & MASK32
    if record.event_data is not None:
        values[_EVENT_DATA] = record.event_data
    if record.instruction_length is not None:
        values[_LENGTH] = record.instruction_length
    if record.instruction_information is not None:
        values[_INFORMATION] = record.instruction_information
    if record.guest_linear is not None:
        values[_LINEAR] = record.guest_linear
    if record.guest_physical is not None:
        values[_PHYSICAL] = record.guest_physical


def _update_entry_controls(operation: VmxOperation, vmcs: Vmcs) -> None:
    values = vmcs.values
    if values[_ENTRY_INTERRUPTION] & VALID:
        values[_ENTRY_INTERRUPTION] &= ~VALID
        vmcs.changed[_ENTRY_INTERRUPTION] = vmcs.changed.get(_ENTRY_INTERRUPTION, 0) | VALID
    if operation.stores_ia32e_mode_guest:
        controls = values[_ENTRY_CONTROLS]
        ia32e = operation.processor.state.efer & _LMA
        new = controls | _IA32E_MODE_GUEST if ia32e else controls & ~_IA32E_MODE_GUEST
        if new != controls:
            values[_ENTRY_CONTROLS] = new
            vmcs.changed[_ENTRY_CONTROLS] = vmcs.changed.get(_ENTRY_CONTROLS, 0) | _IA32E_MODE_GUEST


def abort(operation: VmxOperation, indicator: AbortIndicator, cause: MsrViolation | None = None) -> VmxAborted:
    """VMX abort: leave the indicator in the VMCS region and shut the processor down; ``cause`` is for the message."""
    active = operation.current
    assert active is not None
    active.vmcs.abort_indicator = indicator
    leave_non_root(operation)
    processor = operation.processor
    processor.memory.write_u32(active.pointer + _ABORT_OFFSET, indicator)
    message = f"VMX abort {int(indicator)} ({indicator.name.lower().replace('_', ' ')})"
    if cause is not None:
        message += f": {cause.rule.id}, entry {cause.entry.number}, MSR {cause.entry.index:#x}"
    processor.shut_down(message)
    return VmxAborted(indicator)
