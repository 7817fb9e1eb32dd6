"""VM entry: VMLAUNCH and VMRESUME after their own faults.

The checks are the rules of `vmcs.rules`; this module runs them, performs what they allow, and turns the first one that
is broken into what software sees.

Spec: SDM Vol. 3, "VM Entries".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from vmcs import controls as c
from vmcs import fields as f
from vmcs import layouts
from vmcs.exits import Reason
from vmcs.region import LaunchState, Vmcs
from vmcs.rules import RULES, EntryContext, EntryFails, FailInvalid, RuleSet, Stage, Violation
from vmcs.rules.msr_load import Area, MsrViolation
from vtx.addresses import PhysicalAddress
from vtx.vmx.exit import perform_entry_failure
from vtx.vmx.guest_state import guest_pdptes, guest_uses_pae_paging, load_guest
from vtx.vmx.msr_area import load_msrs
from vtx.vmx.operation import ActiveVmcs, EntryFailure, VmxOperation
from vtx.vmx.outcome import ENTERED, FAIL_INVALID, Outcome
from vtx.vmx.record import ERROR_CODE_VALID, NESTED_EXCEPTION, VALID
from vtx.vmx.timer import deadline
from vtx.vmx.translation import second_level_of
from vtx.vmx.view import VIEW_FIELDS, ControlView, build_view, unmodelled_control
from vtx.vmx.virtual_apic import VirtualApic
from vtx.x86 import fred
from vtx.x86.event import Event, EventKind
from vtx.x86.outcome import NotModelled
from vtx.x86.paging import load_pdptrs
from vtx.x86.second_level import IdentitySecondLevel
from vtx.x86.state import Efer, Shadow

_LOAD_COUNT: Final = f.VM_ENTRY_MSR_LOAD_COUNT.encoding
_INTERRUPTION: Final = f.VM_ENTRY_INTERRUPTION_INFORMATION.encoding
_ERROR_CODE: Final = f.VM_ENTRY_EXCEPTION_ERROR_CODE.encoding
_EVENT_DATA: Final = f.INJECTED_EVENT_DATA.encoding
_LENGTH: Final = f.VM_ENTRY_INSTRUCTION_LENGTH.encoding
_TIMER: Final = f.VMX_PREEMPTION_TIMER_VALUE.encoding
_CR3: Final = f.GUEST_CR3.encoding

_RULES: Final = RuleSet(
    tuple(rule for stage in (Stage.BASIC, Stage.CONTROLS, Stage.HOST, Stage.GUEST) for rule in RULES[stage])
)
_LMA: Final = int(Efer.LMA)
# Injected after a MOV SS, they leave it to their handlers' first instruction to report what it has held back.
_AFTER_MOV_SS: Final = frozenset((EventKind.SOFTWARE_INTERRUPT, EventKind.SOFTWARE_EXCEPTION))
_TIMER_CONTROL: Final = c.ACTIVATE_VMX_PREEMPTION_TIMER.mask
_MONITOR_TRAP_FLAG: Final = c.MONITOR_TRAP_FLAG.mask
_PDPTE_QUALIFICATION: Final = 2
_NO_SECOND_LEVEL: Final = IdentitySecondLevel()


def enter(operation: VmxOperation, *, launching: bool) -> Outcome:
    """VM entry through the current VMCS: VmEntered, a VMfail, EntryFailed, or VmxAborted."""
    active = operation.current
    if active is None:
        return _remember(operation, FAIL_INVALID, (), "there is no current VMCS")
    context = _context(operation, active, launching)
    violation = _RULES.check(context, active.vmcs.changed)
    if violation is not None and not isinstance(violation.outcome, EntryFails):
        return _refuse(operation, violation)
    view = _refresh_view(operation, active)
    if violation is not None:
        assert isinstance(violation.outcome, EntryFails)
        return _fail(operation, violation.outcome.reason, violation.outcome.qualification, (violation,))
    vmcs = active.vmcs
    active.checked, vmcs.changed = vmcs.changed, {}
    pdptes: Iterable[int] | None = None
    if guest_uses_pae_paging(vmcs, view):
        pdptes = _pdptes(operation, vmcs, view)
        if pdptes is None:
            detail = f"a PDPTE in memory at {vmcs[f.GUEST_CR3]:#x} (guest CR3) has reserved bits set"
            return _fail(operation, Reason.ENTRY_FAILURE_GUEST_STATE, _PDPTE_QUALIFICATION, (), detail)
    operation.host_nmi_blocked = operation.processor.state.nmi_blocked
    load_guest(operation, vmcs, view, pdptes)
    if vmcs.values[_LOAD_COUNT]:
        failing = load_msrs(operation.processor, context, Area.ENTRY_LOAD)
        if failing is not None:
            operation.processor.state.nmi_blocked = operation.host_nmi_blocked
            number = failing.entry.number
            return _fail(operation, Reason.ENTRY_FAILURE_MSR_LOADING, number, (), failing.render(), failing)
    if launching:
        vmcs.launch_state = LaunchState.LAUNCHED
    _start_guest(operation, active, view)
    return ENTERED


def _context(operation: VmxOperation, active: ActiveVmcs, launching: bool) -> EntryContext:
    """What the rules look at, kept with the VMCS; only the processor's state differs from entry to entry."""
    context = active.context
    state = operation.processor.state
    if context is None:
        context = active.context = operation.new_context(active)
    context.launching = launching
    context.blocked_by_mov_ss = state.shadow is not Shadow.NONE and bool(state.shadow & Shadow.MOV_SS)
    context.host_long_mode = bool(state.efer & _LMA)
    return context


def _refresh_view(operation: VmxOperation, active: ActiveVmcs) -> ControlView:
    """The view of the controls, which have passed their checks; rebuilt if any of them changed."""
    view, vmcs = active.view, active.vmcs
    if view is None or not VIEW_FIELDS.isdisjoint(vmcs.changed):
        view = active.view = build_view(vmcs.values)
        control = unmodelled_control(view)
        if control is not None:
            raise NotModelled(f"VMX control {control}")
        active.second_level = second_level_of(operation, vmcs, view)
        active.virtual_apic = None
        if view.primary & c.USE_TPR_SHADOW.mask:
            active.virtual_apic = VirtualApic(operation.processor.memory, vmcs, view)
    return view


def _refuse(operation: VmxOperation, violation: Violation) -> Outcome:
    """A check failed before any guest state was loaded: the instruction fails."""
    if isinstance(violation.outcome, FailInvalid):
        outcome: Outcome = FAIL_INVALID
    else:
        assert not isinstance(violation.outcome, EntryFails)
        outcome = operation.fail_entry(violation.outcome.error)
    return _remember(operation, outcome, (violation,))


def _fail(
    operation: VmxOperation,
    reason: Reason,
    qualification: int,
    violations: tuple[Violation, ...],
    detail: str = "",
    msr: MsrViolation | None = None,
) -> Outcome:
    return _remember(operation, perform_entry_failure(operation, reason, qualification), violations, detail, msr)


def _remember(
    operation: VmxOperation,
    outcome: Outcome,
    violations: tuple[Violation, ...],
    detail: str = "",
    msr: MsrViolation | None = None,
) -> Outcome:
    operation.last_failure = EntryFailure(outcome, violations, detail, msr)
    if operation.observer is not None:
        operation.observer.vm_entry_failed(operation.last_failure)
    return outcome


def _pdptes(operation: VmxOperation, vmcs: Vmcs, view: ControlView) -> tuple[int, ...] | None:
    """The PDPTEs of a guest with PAE paging: from the VMCS with EPT, else from memory; None if those are invalid.

    Spec: SDM Vol. 3, "VM Entries", "Checks on Guest Page-Directory-Pointer-Table Entries".
    """
    if view.eptp is not None:
        return guest_pdptes(vmcs)
    processor = operation.processor
    width = processor.profile.physical_address_width
    result = load_pdptrs(vmcs.values[_CR3], width, processor.memory, _NO_SECOND_LEVEL)
    return result if isinstance(result, tuple) else None


def _start_guest(operation: VmxOperation, active: ActiveVmcs, view: ControlView) -> None:
    """Past the point where entry can fail: switch translation, arm timers and traps, inject."""
    processor, vmcs = operation.processor, active.vmcs
    assert active.second_level is not None
    operation.non_root = True
    operation.view = view
    operation.transitions += 1
    operation.trap_flag = bool(view.primary & _MONITOR_TRAP_FLAG)
    operation.pending_trap = False
    if view.pin & _TIMER_CONTROL:
        shift = operation.capabilities.preemption_timer_shift
        operation.timer_deadline = deadline(processor.tsc(), vmcs.values[_TIMER], shift)
    operation.pause_loop = None
    operation.virtual_apic = active.virtual_apic
    operation.below_threshold = active.virtual_apic.enter() if active.virtual_apic else None
    if view.apic_access_page is not None:
        processor.mmu.reserved_page = PhysicalAddress(view.apic_access_page)
    processor.mmu.hlat = view.hlat
    processor.monitor = None
    # Without VPIDs, entry invalidates what root operation cached, and guest and host share identifier 0.
    processor.mmu.vm_transition(processor.state, active.second_level, view.vpid, flush=not view.vpid)
    processor.changed_system_state()
    if operation.observer is not None:
        operation.observer.vm_entry(vmcs)
    if vmcs.values[_INTERRUPTION] & VALID:
        _inject(operation, vmcs)


def _inject(operation: VmxOperation, vmcs: Vmcs) -> None:
    """Inject the event of the VM-entry interruption information.

    Spec: SDM Vol. 3, "VM Entries", "Event Injection" ("Vectored-Event Injection", "Injection of Pending MTF VM
    Exits").
    """
    word = vmcs.values[_INTERRUPTION]
    event_type = word >> 8 & 7
    is_trap = event_type == layouts.OTHER_EVENT and not word & 0xFF
    # An MTF VM exit is pending after an injected vectored event if the flag is set, and by injecting it if not.
    operation.pending_trap = operation.trap_flag or is_trap
    if is_trap:
        return
    state = operation.processor.state
    by_fred = fred.is_enabled(state)
    event = Event(
        word & 0xFF,
        EventKind(event_type),
        vmcs.values[_ERROR_CODE] if word & ERROR_CODE_VALID else None,
        vmcs.values[_LENGTH],
        injected=True,
        nested=by_fred and bool(word & NESTED_EXCEPTION),
        data=vmcs.values[_EVENT_DATA] if by_fred else None,
    )
    if by_fred or event.kind not in _AFTER_MOV_SS or not state.shadow & Shadow.MOV_SS:
        state.pending_debug = 0
    operation.processor.deliver(event)
