"""Checks on guest non-register state: activity, interruptibility, pending debug exceptions, link pointer, PDPTEs.

They end in a VM exit with basic exit reason 33; here the exit qualification tells some of them apart.

Spec: SDM Vol. 3, "VM Entries", "Checks on Guest Non-Register State", "Checks on Guest Page-Directory-Pointer-Table
Entries".
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from vmcs import controls as c
from vmcs import fields as f
from vmcs import layouts
from vmcs.bits import MASK64, bit_range, mask
from vmcs.exits import Reason
from vmcs.fields import Field
from vmcs.qualifications import EntryFailure
from vmcs.refs import Reference, sdm
from vmcs.region import SHADOW_INDICATOR
from vmcs.rules import shapes as s
from vmcs.rules.guest import FRED_IN_USER_MODE, LEGACY_GUEST, PAGING
from vmcs.rules.model import ALWAYS, Condition, Demand, EntryContext, EntryFails, FaultyBits, Rule, Test

NON_REGISTER: Final = sdm("VM Entries", "Checks on Guest Non-Register State")
PDPTES: Final = sdm("VM Entries", "Checks on Guest Page-Directory-Pointer-Table Entries")

ACTIVE, HLT, SHUTDOWN, WAIT_FOR_SIPI = range(4)

_STI = 1 << 0
_MOV_SS = 1 << 1
_SMI = 1 << 2
_NMI = 1 << 3
_ENCLAVE = 1 << 4
_RFLAGS_TF = 1 << 8
_RFLAGS_IF = 1 << 9
_DEBUGCTL_BTF = 1 << 1
_BS = 1 << 14
_ENABLED_BREAKPOINT = 1 << 12
_RTM = 1 << 16
_BUS_LOCK = 1 << 11

_INFORMATION = f.VM_ENTRY_INTERRUPTION_INFORMATION
_INTERRUPTIBILITY = f.GUEST_INTERRUPTIBILITY_STATE
_PENDING = f.GUEST_PENDING_DEBUG_EXCEPTIONS


def _rule(
    name: str,
    sentence: str,
    demand: Demand,
    when: Condition = ALWAYS,
    cause: EntryFailure = EntryFailure.DEFAULT,
    ref: Reference = NON_REGISTER,
) -> Rule:
    return Rule(f"guest.{name}", sentence, demand, ref, EntryFails(Reason.ENTRY_FAILURE_GUEST_STATE, cause), when)


def _activity(state: int) -> Condition:
    return s.bits_equal(
        f.GUEST_ACTIVITY_STATE, mask(32), state, f"the activity state is {layouts.ACTIVITY_STATES[state]}"
    )


# ---- activity state


def _supported_activities(context: EntryContext) -> Collection[int]:
    return [state for state in layouts.ACTIVITY_STATES if context.capabilities.supports_activity_state(state)]


def _deliverable(*events: tuple[int, int | None]) -> Demand:
    """Only these events, (type, vector) with None for any vector, may be injected."""

    def holds(context: EntryContext) -> bool:
        information = context.vmcs[_INFORMATION]
        kind, vector = information >> 8 & 7, information & 0xFF
        return (kind, vector) in events or (kind, None) in events

    return Demand((_INFORMATION,), holds, s.stop_injecting, lambda context: ((_INFORMATION, 0x7FF),))


def _privilege_to_halt() -> Demand:
    plain = s.bits_clear(f.GUEST_SS_ACCESS_RIGHTS, 3 << 5)

    def repair(context: EntryContext) -> None:
        # The privilege level is tied to several other fields; the activity state is not.
        context.vmcs[f.GUEST_ACTIVITY_STATE] = ACTIVE

    return Demand(plain.reads, plain.holds, repair, plain.faulty, legal=plain.legal)


_DB, _MC = 1, 18

_HLT_EVENTS = (
    (layouts.EXTERNAL_INTERRUPT, None),
    (layouts.NON_MASKABLE_INTERRUPT, None),
    (layouts.HARDWARE_EXCEPTION, _DB),
    (layouts.HARDWARE_EXCEPTION, _MC),
    (layouts.OTHER_EVENT, 0),
)
_SHUTDOWN_EVENTS = ((layouts.NON_MASKABLE_INTERRUPT, None), (layouts.HARDWARE_EXCEPTION, _MC))

_ACTIVITY_RULES: Final[tuple[Rule, ...]] = (
    _rule(
        "activity-state",
        "the processor supports the activity state",
        s.slice_in(f.GUEST_ACTIVITY_STATE, mask(32), _supported_activities),
    ),
    _rule("hlt-dpl", "the DPL of SS is 0", _privilege_to_halt(), _activity(HLT)),
    _rule(
        "blocking-needs-active",
        "the activity state is active",
        s.slice_in(f.GUEST_ACTIVITY_STATE, mask(32), (ACTIVE,)),
        s.bit_set(_INTERRUPTIBILITY, _STI | _MOV_SS, "events are blocked by STI or MOV SS"),
    ),
    _rule(
        "hlt-injection",
        "only an event that ends HLT is injected",
        _deliverable(*_HLT_EVENTS),
        s.every(s.INJECTING, _activity(HLT)),
    ),
    _rule(
        "shutdown-injection",
        "only an NMI or a machine check is injected",
        _deliverable(*_SHUTDOWN_EVENTS),
        s.every(s.INJECTING, _activity(SHUTDOWN)),
    ),
    _rule(
        "wait-for-sipi-injection", "nothing is injected", _deliverable(), s.every(s.INJECTING, _activity(WAIT_FOR_SIPI))
    ),
    _rule(
        "smm-activity",
        "the activity state is not wait-for-SIPI",
        s.slice_in(f.GUEST_ACTIVITY_STATE, mask(32), (ACTIVE, HLT, SHUTDOWN)),
        s.on(c.ENTRY_TO_SMM),
    ),
)

# ---- interruptibility state

_SGX_ABSENT = s.processor_is("the processor has no SGX", lambda context: not context.sgx)
_OUTSIDE_SMM = s.context_is("the processor is not in SMM", lambda context: not context.in_smm)
_STI_REFUSES_NMI = s.processor_is(
    "the processor refuses NMIs under STI blocking", lambda context: context.nmi_injection_refused_by_sti
)


def _not_both(first: int, second: int) -> Demand:
    both = first | second

    def repair(context: EntryContext) -> None:
        context.vmcs[_INTERRUPTIBILITY] = context.vmcs[_INTERRUPTIBILITY] & ~second

    return Demand(
        ((_INTERRUPTIBILITY, both),),
        lambda context: context.vmcs[_INTERRUPTIBILITY] & both != both,
        repair,
        lambda context: ((_INTERRUPTIBILITY, both),),
    )


_INJECTING_NMI = s.injecting(layouts.NON_MASKABLE_INTERRUPT)

_INTERRUPTIBILITY_RULES: Final[tuple[Rule, ...]] = (
    _rule(
        "interruptibility-reserved",
        "bits 31:5 of the interruptibility state are 0",
        s.bits_clear(_INTERRUPTIBILITY, bit_range(31, 5)),
    ),
    _rule("sti-excludes-mov-ss", "events are not blocked by both STI and MOV SS", _not_both(_STI, _MOV_SS)),
    _rule(
        "sti-needs-if",
        "events are not blocked by STI",
        s.bits_clear(_INTERRUPTIBILITY, _STI),
        s.bits_equal(f.GUEST_RFLAGS, _RFLAGS_IF, 0, "RFLAGS.IF is 0"),
    ),
    _rule(
        "sti-fred",
        "events are not blocked by STI",
        s.bits_clear(_INTERRUPTIBILITY, _STI),
        FRED_IN_USER_MODE,
    ),
    _rule(
        "interrupt-injection-blocked",
        "events are blocked by neither STI nor MOV SS",
        s.bits_clear(_INTERRUPTIBILITY, _STI | _MOV_SS),
        s.injecting(layouts.EXTERNAL_INTERRUPT),
    ),
    _rule(
        "nmi-injection-mov-ss",
        "events are not blocked by MOV SS",
        s.bits_clear(_INTERRUPTIBILITY, _MOV_SS),
        _INJECTING_NMI,
    ),
    _rule(
        "nmi-injection-sti",
        "events are not blocked by STI",
        s.bits_clear(_INTERRUPTIBILITY, _STI),
        s.every(_INJECTING_NMI, _STI_REFUSES_NMI),
        EntryFailure.NMI_INJECTION,
    ),
    _rule("smi-blocking-outside-smm", "SMIs are not blocked", s.bits_clear(_INTERRUPTIBILITY, _SMI), _OUTSIDE_SMM),
    _rule("smi-blocking-in-smm", "SMIs are blocked", s.bits_required(_INTERRUPTIBILITY, _SMI), s.on(c.ENTRY_TO_SMM)),
    _rule(
        "nmi-injection-blocked",
        "NMIs are not blocked",
        s.bits_clear(_INTERRUPTIBILITY, _NMI),
        s.every(s.on(c.VIRTUAL_NMIS), _INJECTING_NMI),
    ),
    _rule(
        "enclave-interruption-supported",
        "the enclave-interruption bit is 0",
        s.bits_clear(_INTERRUPTIBILITY, _ENCLAVE),
        _SGX_ABSENT,
    ),
    _rule(
        "enclave-excludes-mov-ss", "an enclave interruption excludes blocking by MOV SS", _not_both(_ENCLAVE, _MOV_SS)
    ),
)

# ---- pending debug exceptions


def _pending_reserved(context: EntryContext) -> int:
    reserved = MASK64 & ~layouts.PENDING_DEBUG_EXCEPTIONS.defined
    if not context.bus_lock_debug:
        reserved |= _BUS_LOCK
    if not context.rtm:
        reserved |= _RTM
    return reserved


def _single_step_pending() -> Demand:
    """BS is 1 exactly when single-stepping is on: TF without BTF."""

    def wanted(context: EntryContext) -> int:
        stepping = context.vmcs[f.GUEST_RFLAGS] & _RFLAGS_TF and not context.vmcs[f.GUEST_IA32_DEBUGCTL] & _DEBUGCTL_BTF
        return _BS if stepping else 0

    def repair(context: EntryContext) -> None:
        context.vmcs[_PENDING] = context.vmcs[_PENDING] & ~_BS | wanted(context)

    return Demand(
        ((_PENDING, _BS), (f.GUEST_RFLAGS, _RFLAGS_TF), (f.GUEST_IA32_DEBUGCTL, _DEBUGCTL_BTF)),
        lambda context: context.vmcs[_PENDING] & _BS == wanted(context),
        repair,
        lambda context: ((_PENDING, _BS),),
    )


def _rtm_alone() -> Demand:
    others = MASK64 & ~(_RTM | _ENABLED_BREAKPOINT)

    def holds(context: EntryContext) -> bool:
        pending = context.vmcs[_PENDING]
        blocked = context.vmcs[_INTERRUPTIBILITY] & _MOV_SS
        return not pending & others and bool(pending & _ENABLED_BREAKPOINT) and not blocked

    def repair(context: EntryContext) -> None:
        context.vmcs[_PENDING] = context.vmcs[_PENDING] & ~_RTM

    def faulty(context: EntryContext) -> FaultyBits:
        pending = context.vmcs[_PENDING]
        return ((_PENDING, pending & others | _ENABLED_BREAKPOINT & ~pending),)

    return Demand((_PENDING, (_INTERRUPTIBILITY, _MOV_SS)), holds, repair, faulty)


_PENDING_DEBUG_RULES: Final[tuple[Rule, ...]] = (
    _rule(
        "pending-debug-reserved",
        "the reserved bits of the pending debug exceptions are 0",
        s.bits_clear(_PENDING, _pending_reserved),
    ),
    _rule(
        "pending-debug-single-step",
        "BS is 1 exactly if RFLAGS.TF is 1 and IA32_DEBUGCTL.BTF is 0",
        _single_step_pending(),
        s.either(s.bit_set(_INTERRUPTIBILITY, _STI | _MOV_SS, "events are blocked by STI or MOV SS"), _activity(HLT)),
    ),
    _rule(
        "pending-debug-rtm",
        "nothing but an enabled breakpoint is pending, and events are not blocked by MOV SS",
        _rtm_alone(),
        s.bit_set(_PENDING, _RTM, "a debug exception inside a transactional region is pending"),
    ),
)

# ---- VMCS link pointer

_NO_LINK = MASK64

_LINKED = s.bits_differ(f.VMCS_LINK_POINTER, MASK64, _NO_LINK, "the VMCS link pointer is not FFFFFFFF_FFFFFFFFH")


def _unlink(context: EntryContext) -> None:
    context.vmcs[f.VMCS_LINK_POINTER] = _NO_LINK


def _link_demand(holds: Test, *reads: Field | tuple[Field, int]) -> Demand:
    return Demand((f.VMCS_LINK_POINTER, *reads), holds, _unlink, volatile=True)


_SHADOWING = s.on(c.VMCS_SHADOWING)
_shadowing = s.test_of(_SHADOWING)


def _linked_word(context: EntryContext) -> int:
    return context.read(context.vmcs[f.VMCS_LINK_POINTER], 4)


def _link_rule(name: str, sentence: str, demand: Demand, when: Condition = _LINKED) -> Rule:
    return _rule(f"link-pointer-{name}", sentence, demand, when, EntryFailure.VMCS_LINK_POINTER)


def _link_address() -> Demand:
    plain = s.structure_address(f.VMCS_LINK_POINTER)
    return Demand(plain.reads, plain.holds, _unlink, plain.faulty, legal=plain.legal)


_LINK_POINTER_RULES: Final[tuple[Rule, ...]] = (
    # First: only a well-formed pointer may be followed.
    _link_rule("address", "it is 4096-byte aligned and within the physical-address width", _link_address()),
    _link_rule(
        "revision",
        "the region it points to begins with the processor's VMCS revision identifier",
        _link_demand(
            lambda context: _linked_word(context) & mask(31) == context.capabilities.revision_identifier,
        ),
    ),
    _link_rule(
        "shadow-indicator",
        f"the region it points to is a shadow VMCS exactly if {c.VMCS_SHADOWING} is 1",
        _link_demand(
            lambda context: bool(_linked_word(context) & SHADOW_INDICATOR) == _shadowing(context),
            *_SHADOWING.reads,
        ),
    ),
    _link_rule(
        "not-current",
        "it is not the current VMCS",
        _link_demand(lambda context: context.vmcs[f.VMCS_LINK_POINTER] != context.vmcs_address),
        s.every(_LINKED, s.either(_OUTSIDE_SMM, s.on(c.ENTRY_TO_SMM))),
    ),
    _link_rule(
        "not-executive",
        "it is not the executive VMCS",
        _link_demand(
            lambda context: context.vmcs[f.VMCS_LINK_POINTER] != context.vmcs[f.EXECUTIVE_VMCS_POINTER],
            f.EXECUTIVE_VMCS_POINTER,
        ),
        s.every(
            _LINKED, s.context_is("the processor is in SMM", lambda context: context.in_smm), s.off(c.ENTRY_TO_SMM)
        ),
    ),
)

# ---- page-directory-pointer-table entries

_PAE_PAGING = s.every(LEGACY_GUEST, PAGING, s.bit_set(f.GUEST_CR4, 1 << 5, "CR4.PAE is 1"))
_PRESENT = 1


def _pdpte_reserved(context: EntryContext) -> int:
    return context.beyond_width | bit_range(2, 1) | bit_range(8, 5)


def _pdpte_bad(context: EntryContext, entry: int) -> int:
    return entry & _pdpte_reserved(context) if entry & _PRESENT else 0


def _pdpte_field(field: Field) -> Demand:
    def repair(context: EntryContext) -> None:
        context.vmcs[field] = context.vmcs[field] & ~_pdpte_reserved(context)

    return Demand(
        (field,),
        lambda context: not _pdpte_bad(context, context.vmcs[field]),
        repair,
        lambda context: ((field, _pdpte_bad(context, context.vmcs[field])),),
    )


def _pdptes_in_memory() -> Demand:
    def holds(context: EntryContext) -> bool:
        table = context.vmcs[f.GUEST_CR3] & 0xFFFF_FFE0
        return not any(_pdpte_bad(context, context.read(table + 8 * number, 8)) for number in range(4))

    return Demand((f.GUEST_CR3,), holds, _leave_pae_paging, volatile=True)


def _leave_pae_paging(context: EntryContext) -> None:
    # Memory is not ours to repair; without PAE the table is not used.
    context.vmcs[f.GUEST_CR4] = context.vmcs[f.GUEST_CR4] & ~(1 << 5)


def _pdpte_rule(name: str, sentence: str, demand: Demand, where: Condition) -> Rule:
    return _rule(name, sentence, demand, s.every(_PAE_PAGING, where), EntryFailure.PDPTES, PDPTES)


_PDPTE_RULES: Final[tuple[Rule, ...]] = (
    *(
        _pdpte_rule(
            f"pdpte{number}-field",
            f"PDPTE{number} is not present, or its reserved bits are 0",
            _pdpte_field(field),
            s.on(c.ENABLE_EPT),
        )
        for number, field in enumerate((f.GUEST_PDPTE0, f.GUEST_PDPTE1, f.GUEST_PDPTE2, f.GUEST_PDPTE3))
    ),
    _pdpte_rule(
        "pdptes-in-memory",
        "each PDPTE in the table that CR3 points to is not present, or its reserved bits are 0",
        _pdptes_in_memory(),
        s.off(c.ENABLE_EPT),
    ),
)

RULES: Final[tuple[Rule, ...]] = (
    *_ACTIVITY_RULES,
    *_INTERRUPTIBILITY_RULES,
    *_PENDING_DEBUG_RULES,
    *_LINK_POINTER_RULES,
    *_PDPTE_RULES,
)
