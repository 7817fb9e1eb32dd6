"""Where this model and Bochs 2.7 are known to differ: each class with who is right, and where the manual says so.

``docs/interpretations.md`` tells people the same under the same ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from attrs import evolve, frozen

from vmcs import controls as c
from vmcs import fields as f
from vmcs import layouts
from vmcs.controls import Control
from vmcs.exits import Reason
from vmcs.fields import CONTROL_FIELDS, Field
from vmcs.refs import Reference, sdm
from vmcs.rules import BY_ID, EntryFails, FailValid, Outcome
from vtx.fuzz.classes import Known
from vtx.fuzz.compare import Disagreement
from vtx.fuzz.entries.results import Result
from vtx.fuzz.entries.states import EntryGenerator
from vtx.x86.state import Cr4, Rflags

_ENTRY_FAILURE: Final = 1 << 31
_DEBUG_EXCEPTION: Final = 0x8000_0301
_GENERAL_PROTECTION: Final = 0x8000_0B0D
_PAGE_FAULT: Final = 0x8000_0B0E
_EXTERNAL_INTERRUPT: Final = 0x8000_0000
_ENABLED_BREAKPOINT, _BREAKPOINTS = 1 << 12, 0xF
_BLOCKING_BY_STI_OR_MOV_SS: Final = 3
_LONG: Final = 1 << 13
_OTHER_EVENT: Final = ("controls.injection-type", "controls.injection-other-vector")
_MSR_AREAS: Final = {
    "controls.exit-msr-store-end": f.VM_EXIT_MSR_STORE_COUNT,
    "controls.exit-msr-load-end": f.VM_EXIT_MSR_LOAD_COUNT,
    "controls.entry-msr-load-end": f.VM_ENTRY_MSR_LOAD_COUNT,
}
_DPL_OF_CS: Final = ("guest.cs-dpl-nonconforming", "guest.cs-dpl-conforming")
_VM86: Final = 1 << 17


@frozen
class Case:
    """A disagreement and the VMCS it is about: ``case[GUEST_RIP]`` is what the field holds; ``memory`` bytes of RAM."""

    ours: Result
    theirs: Result
    rules: tuple[str, ...]
    fields: Mapping[Field, int]
    memory: int

    def __getitem__(self, each: Field) -> int:
        return self.fields.get(each, 0)

    def on(self, control: Control) -> bool:
        """Whether a control is 1."""
        return bool(self[CONTROL_FIELDS[control.word]] & control.mask)

    @property
    def reported(self) -> frozenset[str]:
        """The broken rules that could have given our result."""
        return frozenset(rule for rule in self.rules if same(BY_ID[rule].outcome, self.ours))

    def rejected(self, rule: str) -> bool:
        """Whether we report a violation that the other overlooks, with ``rule`` among what explains it."""
        return rule in self.reported and self.reported <= _OVERLOOKED and self.theirs.name != self.ours.name

    def rejected_by_them(self) -> bool:
        """Whether they find the guest state invalid by a check without a qualification, and we do not."""
        theirs_alone = _invalid_guest(self.theirs) and not self.theirs.qualification
        return theirs_alone and self.ours != self.theirs and not _vm_fail(self.ours)


def same(outcome: Outcome, result: Result) -> bool:
    """Whether a rule with ``outcome`` gives ``result``, the exit qualification aside."""
    if isinstance(outcome, FailValid):
        return result.kind == "valid" and result.number == outcome.error
    if isinstance(outcome, EntryFails):
        return result.kind == "exit" and result.number == outcome.reason | _ENTRY_FAILURE
    return result.kind == "invalid"


def _vm_fail(result: Result) -> bool:
    return result.kind in ("valid", "invalid")


def _invalid_guest(result: Result) -> bool:
    return result.number == Reason.ENTRY_FAILURE_GUEST_STATE | _ENTRY_FAILURE


def _known(
    identity: str,
    verdict: str,
    ref: Reference | None,
    applies: Callable[[Case], bool],
    overlooked: tuple[str, ...] = (),
) -> Known[Case]:
    """A class of those for which ``applies`` holds; ``overlooked`` are rules that Bochs does not check."""
    return Known(identity, verdict, ref, lambda case: ("result",) if applies(case) else (), overlooked)


def _overlooks(identity: str, ref: Reference, *rules: str, verdict: str = "vtx") -> Known[Case]:
    """A class of states that break one of ``rules``, which Bochs does not check, or not at that stage."""
    return _known(identity, verdict, ref, lambda case: any(case.rejected(rule) for rule in rules), rules)


def _privilege_level_of_cs(case: Case) -> bool:
    """Bochs compares the DPL of CS with the RPL of CS where the manual says the DPL of SS."""
    if case[f.GUEST_RFLAGS] & _VM86:
        return False
    rights = case[f.GUEST_CS_ACCESS_RIGHTS]
    dpl, rpl = rights >> 5 & 3, case[f.GUEST_CS_SELECTOR] & 3
    conforming = rights & 0xC == 0xC
    theirs_rejects = dpl > rpl if conforming else dpl != rpl
    if theirs_rejects:
        return case.rejected_by_them()
    return any(case.rejected(rule) for rule in _DPL_OF_CS)


def _other_event(case: Case) -> bool:
    """What Bochs takes for an event it knows, it also has no rules for."""
    if case[f.VM_ENTRY_INTERRUPTION_INFORMATION] >> 8 & 7 != layouts.OTHER_EVENT:
        return False
    only_this = {*_OTHER_EVENT, "controls.injection-instruction-length"} >= case.reported
    return any(case.rejected(rule) for rule in _OTHER_EVENT) or (bool(case.reported) and only_this)


def _msr_area_size(case: Case) -> bool:
    """Bochs computes the size of an area of MSRs in 32 bits: one of 4 GiB has none."""
    wraps = all(rule in _MSR_AREAS and case[_MSR_AREAS[rule]] >> 28 for rule in case.reported)
    return bool(case.reported) and wraps and case.theirs.name != case.ours.name


def _null_ss(case: Case) -> bool:
    """All that is wrong is in an SS that has a null selector, in 64-bit mode."""
    in_64_bit_mode = case.on(c.ENTRY_IA32E_MODE_GUEST) and case[f.GUEST_CS_ACCESS_RIGHTS] & _LONG
    of_ss = case.reported and all(rule.startswith("guest.ss-") for rule in case.reported)
    return bool(in_64_bit_mode and of_ss) and case[f.GUEST_SS_SELECTOR] < 4 and not case.theirs.entry_failure


def _implicit_access(case: Case) -> bool:
    """Event delivery reads descriptor tables in user pages, with RFLAGS.AC set."""
    smap_and_ac = case[f.GUEST_CR4] & Cr4.SMAP and case[f.GUEST_RFLAGS] & Rflags.AC
    return (
        bool(smap_and_ac) and case.ours.interruption == _PAGE_FAULT and case.theirs.interruption == _GENERAL_PROTECTION
    )


def _order(case: Case) -> bool:
    """Both report a rule that is broken; checks of one stage, and those of controls and host state, have no order."""
    theirs = [BY_ID[rule].outcome for rule in case.rules if same(BY_ID[rule].outcome, case.theirs)]
    if _vm_fail(case.ours):
        return bool(theirs) and case.theirs.kind == "valid"
    qualifications = {outcome.qualification for outcome in theirs if isinstance(outcome, EntryFails)}
    return len(qualifications) > 1 and case.theirs.qualification in qualifications


def _outside_memory(case: Case) -> bool:
    """A translation begins where there is no memory, and goes on with whatever is read there."""
    if case.rules or case.rejected_by_them():
        return False
    ept = case.on(c.ACTIVATE_SECONDARY_CONTROLS) and case.on(c.ENABLE_EPT)
    return (case[f.EPT_POINTER] if ept else case[f.GUEST_CR3]) >= case.memory


def _virtual_interrupt_fault(case: Case) -> bool:
    """Delivery of a virtual interrupt faults, and only the information about the interrupt differs."""
    return (
        case.on(c.VIRTUAL_INTERRUPT_DELIVERY)
        and evolve(case.ours, vectoring=0) == evolve(case.theirs, vectoring=0)
        and case.ours.vectoring == _EXTERNAL_INTERRUPT | case[f.GUEST_INTERRUPT_STATUS] & 0xFF
    )


_GUEST_REGISTERS = sdm("VM Entries", "Checks on Guest Control Registers, Debug Registers, and MSRs")
_HOST_REGISTERS = sdm("VM Entries", "Checks on Host Control Registers, MSRs, and SSP")
_GUEST_SEGMENTS = sdm("VM Entries", "Checks on Guest Segment Registers")
_NON_REGISTER = sdm("VM Entries", "Checks on Guest Non-Register State")
_ENTRY_CONTROLS = sdm("VM Entries", "VM-Entry Control Fields")
_RIP = sdm("VM Entries", "Checks on Guest RIP, RFLAGS, and SSP")
_FAILURES = sdm("VM Entries", "VM-Entry Failures During or After Loading Guest State")
_LOADING_MSRS = sdm("VM Entries", "Loading MSRs")
_PENDING_DEBUG = sdm("VM Entries", "Delivery of Pending Debug Exceptions after VM Entry")
_OTHER_CAUSES = sdm("VMX Non-Root Operation", "Other Causes of VM Exits")
_TIMER = sdm("VMX Non-Root Operation", "VMX-Preemption Timer")
_DURING_DELIVERY = sdm("VM Exits", "Information for VM Exits During Event Delivery")
_EPT_VIOLATIONS = sdm("VM Exits", "Basic VM-Exit Information")

KNOWN: Final[tuple[Known[Case], ...]] = (
    _overlooks(
        "smm-controls",
        _ENTRY_CONTROLS,
        "controls.entry-to-smm-outside-smm",
        "controls.deactivate-dual-monitor-outside-smm",
    ),
    _known("msr-area-size", "vtx", sdm("VM Entries", "VM-Exit Control Fields"), _msr_area_size),
    _known("other-event", "vtx", _ENTRY_CONTROLS, _other_event, _OTHER_EVENT),
    _overlooks("performance-msr", _HOST_REGISTERS, "host.perf-global-ctrl-reserved", "guest.perf-global-ctrl-reserved"),
    _overlooks("debugctl-bits", _GUEST_REGISTERS, "guest.debugctl-reserved", verdict="both"),
    _overlooks("ia32e-paging", _GUEST_REGISTERS, "guest.ia32e-mode-paging"),
    _overlooks("rip-not-canonical", _RIP, "guest.rip-high-bits"),
    _overlooks("pending-debug-high", _NON_REGISTER, "guest.pending-debug-reserved"),
    _overlooks("pending-debug-step", _NON_REGISTER, "guest.pending-debug-single-step"),
    _overlooks("hlt-injection", _NON_REGISTER, "guest.hlt-injection"),
    _overlooks("virtual-nmi-injection", _NON_REGISTER, "guest.nmi-injection-blocked"),
    _overlooks("data-segment-rpl", _GUEST_SEGMENTS, *(f"guest.{name}-dpl-rpl" for name in ("ds", "es", "fs", "gs"))),
    _known("null-ss", "vtx", _GUEST_SEGMENTS, _null_ss),
    _known("cs-privilege-level", "vtx", _GUEST_SEGMENTS, _privilege_level_of_cs, _DPL_OF_CS),
    _known(
        "nmi-qualification",
        "vtx",
        _FAILURES,
        lambda case: "guest.nmi-injection-sti" in case.reported and _invalid_guest(case.theirs),
    ),
    _known("order", "both", _ENTRY_CONTROLS, _order),
    _known(
        "msrs-that-exist",
        "both",
        _LOADING_MSRS,
        lambda case: (
            case.ours.number == Reason.ENTRY_FAILURE_MSR_LOADING | _ENTRY_FAILURE and not case.rejected_by_them()
        ),
    ),
    _known(
        "enabled-breakpoint",
        "vtx",
        _PENDING_DEBUG,
        lambda case: (
            case.ours.interruption == _DEBUG_EXCEPTION
            and bool(case[f.GUEST_PENDING_DEBUG_EXCEPTIONS] & _ENABLED_BREAKPOINT)
            and case.theirs.interruption != _DEBUG_EXCEPTION
        ),
    ),
    _known(
        "breakpoints-met",
        "vtx",
        _PENDING_DEBUG,
        lambda case: (
            case.ours.interruption == case.theirs.interruption == _DEBUG_EXCEPTION
            and case.ours.qualification & ~_BREAKPOINTS == case.theirs.qualification
        ),
    ),
    _known(
        "nmi-window",
        "vtx",
        _OTHER_CAUSES,
        lambda case: case.ours.number == Reason.NMI_WINDOW and case.on(c.NMI_WINDOW_EXITING) and not _rejects(case),
    ),
    _known(
        "timer-in-shadow",
        "vtx",
        _TIMER,
        lambda case: (
            case.ours.number == Reason.PREEMPTION_TIMER_EXPIRED
            and bool(case[f.GUEST_INTERRUPTIBILITY_STATE] & _BLOCKING_BY_STI_OR_MOV_SS)
            and not _rejects(case)
        ),
    ),
    _known(
        "timer-value",
        "both",
        _TIMER,
        lambda case: (
            {case.ours.number, case.theirs.number} > {Reason.PREEMPTION_TIMER_EXPIRED}
            and case.on(c.ACTIVATE_VMX_PREEMPTION_TIMER)
            and case[f.VMX_PREEMPTION_TIMER_VALUE] > 0
            and not _rejects(case)
            and not case.rules
        ),
    ),
    _known(
        "paging-structure-access",
        "vtx",
        _EPT_VIOLATIONS,
        lambda case: (
            case.ours.number == case.theirs.number == Reason.EPT_VIOLATION
            and case.ours.qualification ^ case.theirs.qualification == 1
            and bool(case[f.EPT_POINTER] & 1 << 6)
        ),
    ),
    _known("virtual-interrupt-fault", "vtx", _DURING_DELIVERY, _virtual_interrupt_fault),
    _known("implicit-access", "vtx", sdm("Paging", "Determination of Access Rights"), _implicit_access),
    _known("no-memory-there", "both", None, _outside_memory),
)


def _rejects(case: Case) -> bool:
    return case.theirs.kind != "exit" or case.theirs.entry_failure


_OVERLOOKED: Final = frozenset(rule for known in KNOWN for rule in known.overlooked)


def case_of(generator: EntryGenerator, memory: int) -> Callable[[Disagreement[Result]], Case]:
    """What the classes look at in a disagreement; ``memory`` is how many bytes of RAM both had."""

    def case(found: Disagreement[Result]) -> Case:
        return Case(found.ours, found.theirs, found.rules, generator.fields(found.state), memory)

    return case
