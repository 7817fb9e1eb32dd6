"""The consistency checks of VMRUN, in the manual's order: one record each.

Spec: APM Vol. 2, "Canonicalization and Consistency Checks", "Event Injection", "Nested Paging".
"""

from __future__ import annotations

from typing import Final

from vmcs.bits import bit_range
from vmcs.refs import Reference, apm
from vmcs.vmcb import layouts
from vmcs.vmcb.fields import BY_NAME, VmcbField
from vmcs.vmcb.intercepts import Exit
from vmcs.vmcb.model import Rule, Test, Violation, VmrunContext, violation_of

_CHECKS: Final = apm("Secure Virtual Machine", "Canonicalization and Consistency Checks")
_INJECTION: Final = apm("Secure Virtual Machine", "Event Injection")
_NMI: Final = apm("Secure Virtual Machine", "NMI Virtualization")
_PAGING: Final = apm("Secure Virtual Machine", "Nested Paging")

EFER: Final = BY_NAME["EFER"]
CR0: Final = BY_NAME["CR0"]
CR3: Final = BY_NAME["CR3"]
CR4: Final = BY_NAME["CR4"]
DR6: Final = BY_NAME["DR6"]
DR7: Final = BY_NAME["DR7"]
CS: Final = BY_NAME["CS attributes"]
ASID: Final = BY_NAME["guest ASID"]
VECTOR_3: Final = BY_NAME["intercept vector 3"]
VECTOR_4: Final = BY_NAME["intercept vector 4"]
IOPM: Final = BY_NAME["IOPM_BASE_PA"]
MSRPM: Final = BY_NAME["MSRPM_BASE_PA"]
EVENTINJ: Final = BY_NAME["EVENTINJ"]
VIRTUAL: Final = BY_NAME["virtual interrupt control"]
NESTED: Final = BY_NAME["nested paging and encryption control"]
N_CR3: Final = BY_NAME["N_CR3"]
G_PAT: Final = BY_NAME["G_PAT"]

_SVME, _LME, _LMA = 1 << 12, 1 << 8, 1 << 10
_PE, _NW, _CD, _PG = 1 << 0, 1 << 29, 1 << 30, 1 << 31
_PAE: Final = 1 << 5
_CS_L, _CS_D = 1 << 9, 1 << 10
_VMRUN: Final = 1 << (Exit.VMRUN & 31)
_NMI_INTERCEPT: Final = 1 << (Exit.NMI & 31)
_MSR_PROT: Final = 1 << (Exit.MSR & 31)
_IOIO_PROT: Final = 1 << (Exit.IOIO & 31)
_PAGE: Final = 0x1000
_MSRPM_SIZE: Final = 2 * _PAGE
_IOPM_SIZE: Final = 2 * _PAGE + 1
_PAT_TYPES: Final = frozenset((0, 1, 4, 5, 6, 7))
_TYPES: Final = frozenset(int(each) for each in layouts.InjectedType)
# Vectors below 32 that no exception has; 2 is an NMI.
_NO_EXCEPTION: Final = frozenset((2, 9, 15, 20, 31, *range(22, 28)))


def _bits_clear(
    id_: str, sentence: str, field: VmcbField, bits: int, ref: Reference = _CHECKS, when: Test | None = None,
    condition: str = "",
) -> Rule:  # fmt: skip
    """A rule that none of the constant ``bits`` is 1."""
    position = field.encoding

    def repair(context: VmrunContext) -> None:
        context.values[position] &= ~bits

    return Rule(
        id_,
        sentence,
        ref,
        (field,),
        lambda context: not context.values[position] & bits,
        repair,
        lambda context: {field: context.values[position] & bits},
        when,
        condition,
    )


def _bits_required(
    id_: str, sentence: str, field: VmcbField, bits: int, ref: Reference = _CHECKS, when: Test | None = None,
    condition: str = "",
) -> Rule:  # fmt: skip
    """A rule that all of the constant ``bits`` are 1."""
    position = field.encoding

    def repair(context: VmrunContext) -> None:
        context.values[position] |= bits

    return Rule(
        id_,
        sentence,
        ref,
        (field,),
        lambda context: context.values[position] & bits == bits,
        repair,
        lambda context: {field: bits & ~context.values[position]},
        when,
        condition,
    )


def _processor_reserved(id_: str, sentence: str, field: VmcbField, attribute: str, ref: Reference = _CHECKS) -> Rule:
    """A rule that none of the bits is 1 that ``VmrunContext.attribute`` reserves."""
    position = field.encoding

    def reserved(context: VmrunContext) -> int:
        bits: int = getattr(context, attribute)
        return context.values[position] & bits

    def repair(context: VmrunContext) -> None:
        context.values[position] &= ~reserved(context)

    return Rule(
        id_,
        sentence,
        ref,
        (field,),
        lambda context: not reserved(context),
        repair,
        lambda context: {field: reserved(context)},
    )


def _long_mode_paging(context: VmrunContext) -> bool:
    values = context.values
    return bool(values[EFER.encoding] & _LME and values[CR0.encoding] & _PG)


def _long_mode_with_pae(context: VmrunContext) -> bool:
    return _long_mode_paging(context) and bool(context.values[CR4.encoding] & _PAE)


def _nested(context: VmrunContext) -> bool:
    return bool(context.values[NESTED.encoding] & layouts.NP_ENABLE)


_LONG_MODE_TEXT: Final = "EFER.LME and CR0.PG are 1"
_NESTED_TEXT: Final = "NP_ENABLE is 1"


def _permission_map(id_: str, sentence: str, field: VmcbField, size: int, intercept: int) -> Rule:
    """A rule that a map of ``size`` bytes, at an address without its low 12 bits, ends below the physical limit.

    The manual says "extends to"; here the address right after the map counts, as software has seen it count.
    """
    position = field.encoding

    def ends_within(context: VmrunContext) -> bool:
        return (context.values[position] & ~(_PAGE - 1)) + size < 1 << context.physical_address_width

    def repair(context: VmrunContext) -> None:
        context.values[position] = 0

    return Rule(
        id_,
        sentence,
        _CHECKS,
        (VECTOR_3, field),
        ends_within,
        repair,
        lambda context: {field: context.values[position]},
        lambda context: bool(context.values[VECTOR_3.encoding] & intercept),
        "the intercept is on",
    )


def _asid_zero() -> Rule:
    def repair(context: VmrunContext) -> None:
        context.values[ASID.encoding] = 1

    return Rule(
        "vmrun.asid-not-zero",
        "the guest's ASID is not that of the host, 0",
        _CHECKS,
        (ASID,),
        lambda context: context.values[ASID.encoding] != 0,
        repair,
        lambda context: {ASID: ASID.mask},
    )


# Event injection.


def _injecting(context: VmrunContext) -> bool:
    return bool(context.values[EVENTINJ.encoding] & layouts.EVENT_VALID)


def _injected_type(context: VmrunContext) -> int:
    return context.values[EVENTINJ.encoding] >> layouts.EVENT_TYPE_SHIFT & 7


def _injecting_exception(context: VmrunContext) -> bool:
    return _injecting(context) and _injected_type(context) == layouts.InjectedType.EXCEPTION


def _is_exception(context: VmrunContext) -> bool:
    vector = context.values[EVENTINJ.encoding] & 0xFF
    return vector < 32 and vector not in _NO_EXCEPTION


def _inject_nothing(context: VmrunContext) -> None:
    context.values[EVENTINJ.encoding] &= ~layouts.EVENT_VALID


# Nested paging.


def _pat_faults(context: VmrunContext) -> int:
    value = context.values[G_PAT.encoding]
    return sum(0xFF << shift for shift in range(0, 64, 8) if value >> shift & 0xFF not in _PAT_TYPES)


def _repair_pat(context: VmrunContext) -> None:
    context.values[G_PAT.encoding] &= ~_pat_faults(context)


def _no_nested_paging(context: VmrunContext) -> None:
    context.values[NESTED.encoding] &= ~(layouts.NP_ENABLE | layouts.GMET_ENABLE)


def _n_cr3_faults(context: VmrunContext) -> int:
    return context.values[N_CR3.encoding] & context.beyond_width


def _repair_n_cr3(context: VmrunContext) -> None:
    context.values[N_CR3.encoding] &= ~context.beyond_width


RULES: Final[tuple[Rule, ...]] = (
    _bits_required("vmrun.efer-svme", "EFER.SVME is 1", EFER, _SVME),
    _bits_clear(
        "vmrun.cr0-nw-without-cd",
        "CR0.NW is 0",
        CR0,
        _NW,
        when=lambda context: not context.values[CR0.encoding] & _CD,
        condition="CR0.CD is 0",
    ),
    _bits_clear("vmrun.cr0-upper", "bits 63:32 of CR0 are 0", CR0, bit_range(63, 32)),
    _processor_reserved(
        "vmrun.cr3-reserved", "CR3 holds no address beyond the physical-address width", CR3, "beyond_width"
    ),
    _processor_reserved("vmrun.cr4-reserved", "no bit of CR4 that the processor reserves is 1", CR4, "cr4_reserved"),
    _bits_clear("vmrun.dr6-upper", "bits 63:32 of DR6 are 0", DR6, bit_range(63, 32)),
    _bits_clear("vmrun.dr7-upper", "bits 63:32 of DR7 are 0", DR7, bit_range(63, 32)),
    _processor_reserved(
        "vmrun.efer-reserved", "no bit of EFER that the processor reserves is 1", EFER, "efer_reserved"
    ),
    _bits_clear(
        "vmrun.efer-long-mode-unsupported",
        "EFER.LME and EFER.LMA are 0",
        EFER,
        _LME | _LMA,
        when=lambda context: not context.long_mode_supported,
        condition="the processor has no long mode",
    ),
    _bits_required(
        "vmrun.long-mode-pae", "CR4.PAE is 1", CR4, _PAE, when=_long_mode_paging, condition=_LONG_MODE_TEXT
    ),
    _bits_required("vmrun.long-mode-pe", "CR0.PE is 1", CR0, _PE, when=_long_mode_paging, condition=_LONG_MODE_TEXT),
    _bits_clear(
        "vmrun.cs-l-and-d",
        "CS.D is 0",
        CS,
        _CS_D,
        when=lambda context: _long_mode_with_pae(context) and bool(context.values[CS.encoding] & _CS_L),
        condition="EFER.LME, CR0.PG, CR4.PAE and CS.L are 1",
    ),
    _bits_required("vmrun.vmrun-intercept", "the intercept of VMRUN is on", VECTOR_4, _VMRUN),
    _permission_map("vmrun.msrpm-address", "the MSR permissions map ends below the physical-address width", MSRPM,
                    _MSRPM_SIZE, _MSR_PROT),
    _permission_map("vmrun.iopm-address", "the I/O permissions map ends below the physical-address width", IOPM,
                    _IOPM_SIZE, _IOIO_PROT),
    Rule(
        "vmrun.event-type",
        "the type of the injected event is not a reserved one",
        _INJECTION,
        (EVENTINJ,),
        lambda context: _injected_type(context) in _TYPES,
        _inject_nothing,
        lambda context: {EVENTINJ: 7 << layouts.EVENT_TYPE_SHIFT},
        _injecting,
        "an event is injected",
    ),
    Rule(
        "vmrun.event-vector",
        "the vector is that of an exception",
        _INJECTION,
        (EVENTINJ,),
        _is_exception,
        _inject_nothing,
        lambda context: {EVENTINJ: 0xFF},
        _injecting_exception,
        "an exception is injected",
    ),
    _asid_zero(),
    _bits_required(
        "vmrun.virtual-nmi-intercept",
        "the intercept of NMI is on",
        VECTOR_3,
        _NMI_INTERCEPT,
        _NMI,
        lambda context: bool(context.values[VIRTUAL.encoding] & layouts.V_NMI_ENABLE),
        "V_NMI_ENABLE is 1",
    ),
    Rule(
        "vmrun.nested-paging-host",
        "the host has paging enabled, whose mode nested paging takes over",
        _PAGING,
        (NESTED,),
        lambda context: context.host_paging,
        _no_nested_paging,
        lambda context: {NESTED: layouts.NP_ENABLE},
        _nested,
        _NESTED_TEXT,
    ),
    Rule(
        "vmrun.n-cr3-reserved",
        "N_CR3 holds no address beyond the physical-address width",
        _PAGING,
        (NESTED, N_CR3),
        lambda context: not _n_cr3_faults(context),
        _repair_n_cr3,
        lambda context: {N_CR3: _n_cr3_faults(context)},
        _nested,
        _NESTED_TEXT,
    ),
    Rule(
        "vmrun.g-pat",
        "each byte of G_PAT is a memory type",
        _PAGING,
        (NESTED, G_PAT),
        lambda context: not _pat_faults(context),
        _repair_pat,
        lambda context: {G_PAT: _pat_faults(context)},
        _nested,
        _NESTED_TEXT,
    ),
)  # fmt: skip

BY_ID: Final = {rule.id: rule for rule in RULES}


def check(context: VmrunContext) -> Violation | None:
    """The first violation, or None if VMRUN goes on."""
    for rule in RULES:
        if not rule.holds(context):
            return violation_of(rule, context)
    return None


def explain(context: VmrunContext) -> list[Violation]:
    """Every violation, in order."""
    return [violation_of(rule, context) for rule in RULES if not rule.holds(context)]
