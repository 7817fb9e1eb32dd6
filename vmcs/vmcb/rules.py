"""The consistency checks of VMRUN, in the manual's order: one record each.

Spec: APM Vol. 2, "Canonicalization and Consistency Checks", "Event Injection", "Nested Paging", "VMCB Changes for
AVIC", "AVIC Memory Data Structures".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vmcs.bits import bit_range
from vmcs.refs import Reference, apm
from vmcs.vmcb import avic, layouts
from vmcs.vmcb.fields import BY_NAME, VmcbField
from vmcs.vmcb.intercepts import Exit
from vmcs.vmcb.model import ALWAYS, INVALID, Condition, Demand, FaultyBits, Rule, RuleSet, VmrunContext

_CHECKS: Final = apm("Secure Virtual Machine", "Canonicalization and Consistency Checks")
_INJECTION: Final = apm("Secure Virtual Machine", "Event Injection")
_NMI: Final = apm("Secure Virtual Machine", "NMI Virtualization")
_PAGING: Final = apm("Secure Virtual Machine", "Nested Paging")
_AVIC: Final = apm("Secure Virtual Machine", "VMCB Changes for AVIC")
_AVIC_TABLES: Final = apm("Secure Virtual Machine", "AVIC Memory Data Structures")

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
AVIC_BACKING_PAGE: Final = BY_NAME["AVIC APIC_BACKING_PAGE pointer"]
AVIC_LOGICAL_TABLE: Final = BY_NAME["AVIC LOGICAL_TABLE pointer"]
AVIC_PHYSICAL_TABLE: Final = BY_NAME["AVIC PHYSICAL_TABLE pointer"]

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


# Shapes of demands.


def bits_clear(field: VmcbField, bits: int) -> Demand:
    """None of the constant ``bits`` is 1."""
    place = field.encoding

    def repair(context: VmrunContext) -> None:
        context.values[place] &= ~bits

    return Demand(
        ((field, bits),),
        lambda context: not context.values[place] & bits,
        repair,
        lambda context: ((field, context.values[place] & bits),),
    )


def bits_required(field: VmcbField, bits: int) -> Demand:
    """All of the constant ``bits`` are 1."""
    place = field.encoding

    def repair(context: VmrunContext) -> None:
        context.values[place] |= bits

    return Demand(
        ((field, bits),),
        lambda context: context.values[place] & bits == bits,
        repair,
        lambda context: ((field, bits & ~context.values[place]),),
    )


def not_reserved(field: VmcbField, reserved: Callable[[VmrunContext], int]) -> Demand:
    """None of the bits is 1 that the processor reserves."""
    place = field.encoding

    def repair(context: VmrunContext) -> None:
        context.values[place] &= ~reserved(context)

    return Demand(
        (field,),
        lambda context: not context.values[place] & reserved(context),
        repair,
        lambda context: ((field, context.values[place] & reserved(context)),),
    )


def map_ends_within(field: VmcbField, size: int) -> Demand:
    """A map of ``size`` bytes, at an address without its low 12 bits, ends below the physical limit.

    The manual says "extends to"; here the address right after the map counts, as software has seen it count.
    """
    place = field.encoding

    def holds(context: VmrunContext) -> bool:
        return (context.values[place] & ~(_PAGE - 1)) + size < 1 << context.physical_address_width

    def repair(context: VmrunContext) -> None:
        context.values[place] = 0

    return Demand((field,), holds, repair, lambda context: ((field, context.values[place]),))


def asid_of_a_guest() -> Demand:
    """The ASID is not that of the host."""
    place = ASID.encoding

    def repair(context: VmrunContext) -> None:
        context.values[place] = 1

    return Demand((ASID,), lambda context: context.values[place] != 0, repair, lambda context: ((ASID, ASID.mask),))


# Event injection.


def _injected_type(context: VmrunContext) -> int:
    return context.values[EVENTINJ.encoding] >> layouts.EVENT_TYPE_SHIFT & 7


def _is_exception(context: VmrunContext) -> bool:
    vector = context.values[EVENTINJ.encoding] & 0xFF
    return vector < 32 and vector not in _NO_EXCEPTION


def _inject_nothing(context: VmrunContext) -> None:
    context.values[EVENTINJ.encoding] &= ~layouts.EVENT_VALID


def injected(bits: int, holds: Callable[[VmrunContext], bool]) -> Demand:
    """A demand on the injected event, with ``bits`` of it at fault; the repair is to inject nothing."""
    return Demand(((EVENTINJ, bits),), holds, _inject_nothing, lambda context: ((EVENTINJ, bits),))


# Nested paging.


def _wrong_types(context: VmrunContext) -> int:
    value = context.values[G_PAT.encoding]
    return sum(0xFF << shift for shift in range(0, 64, 8) if value >> shift & 0xFF not in _PAT_TYPES)


def _repair_pat(context: VmrunContext) -> None:
    context.values[G_PAT.encoding] &= ~_wrong_types(context)


def _wrong_pat(context: VmrunContext) -> FaultyBits:
    return ((G_PAT, _wrong_types(context)),)


def _no_nested_paging(context: VmrunContext) -> None:
    context.values[NESTED.encoding] &= ~(layouts.NP_ENABLE | layouts.GMET_ENABLE)


# AVIC.


def table_within(field: VmcbField) -> Demand:
    """The page that the pointer names is below the physical limit."""
    return not_reserved(field, lambda context: context.beyond_width & avic.TABLE_ADDRESS)


def last_index_at_most(most: int) -> Demand:
    """AVIC_PHYSICAL_MAX_INDEX is no greater."""
    place = AVIC_PHYSICAL_TABLE.encoding

    def repair(context: VmrunContext) -> None:
        context.values[place] = context.values[place] & ~avic.LAST_INDEX | most

    return Demand(
        ((AVIC_PHYSICAL_TABLE, avic.LAST_INDEX),),
        lambda context: context.values[place] & avic.LAST_INDEX <= most,
        repair,
        lambda context: ((AVIC_PHYSICAL_TABLE, avic.LAST_INDEX & ~most),),
    )


# Conditions.


def on(field: VmcbField, bits: int, text: str) -> Condition:
    """All of ``bits`` are 1."""
    place = field.encoding
    return Condition(text, ((field, bits),), lambda context: context.values[place] & bits == bits)


def _injecting_exception(context: VmrunContext) -> bool:
    is_valid = context.values[EVENTINJ.encoding] & layouts.EVENT_VALID
    return bool(is_valid) and _injected_type(context) == layouts.InjectedType.EXCEPTION


# Where a processor lacks a feature, the bit that enables it means nothing.


def _nested_paging(context: VmrunContext) -> bool:
    return context.nested_paging_supported and bool(context.values[NESTED.encoding] & layouts.NP_ENABLE)


def _virtual_nmis(context: VmrunContext) -> bool:
    return context.virtual_nmi_supported and bool(context.values[VIRTUAL.encoding] & layouts.V_NMI_ENABLE)


def _long_mode_paging(context: VmrunContext) -> bool:
    return bool(context.values[EFER.encoding] & _LME and context.values[CR0.encoding] & _PG)


def _long_mode_code(context: VmrunContext) -> bool:
    pae, long = context.values[CR4.encoding] & _PAE, context.values[CS.encoding] & _CS_L
    return bool(pae and long) and _long_mode_paging(context)


NESTED_PAGING: Final = Condition("NP_ENABLE is 1", ((NESTED, layouts.NP_ENABLE),), _nested_paging)
INJECTING: Final = on(EVENTINJ, layouts.EVENT_VALID, "an event is injected")
INJECTING_EXCEPTION: Final = Condition("an exception is injected", (EVENTINJ,), _injecting_exception)
LONG_MODE_PAGING: Final = Condition("EFER.LME and CR0.PG are 1", ((EFER, _LME), (CR0, _PG)), _long_mode_paging)
LONG_MODE_CODE: Final = Condition(
    "EFER.LME, CR0.PG, CR4.PAE and CS.L are 1", ((EFER, _LME), (CR0, _PG), (CR4, _PAE), (CS, _CS_L)), _long_mode_code
)
CACHES_ON: Final = Condition("CR0.CD is 0", ((CR0, _CD),), lambda context: not context.values[CR0.encoding] & _CD)
NO_LONG_MODE: Final = Condition("the processor has no long mode", (), lambda context: not context.long_mode_supported)
MSR_MAP_IN_USE: Final = on(VECTOR_3, _MSR_PROT, "the intercept of MSR accesses is on")
IO_MAP_IN_USE: Final = on(VECTOR_3, _IOIO_PROT, "the intercept of I/O instructions is on")


def _avic(context: VmrunContext) -> bool:
    return context.avic_supported and bool(context.values[VIRTUAL.encoding] & layouts.AVIC_ENABLE)


def _x2avic(context: VmrunContext) -> bool:
    return context.x2avic_supported and bool(context.values[VIRTUAL.encoding] & layouts.X2AVIC_ENABLE)


_MODES: Final = ((VIRTUAL, layouts.AVIC_ENABLE), (VIRTUAL, layouts.X2AVIC_ENABLE))
AVIC: Final = Condition("AVIC is enabled", ((VIRTUAL, layouts.AVIC_ENABLE),), _avic)
X2AVIC: Final = Condition("x2AVIC is enabled", ((VIRTUAL, layouts.X2AVIC_ENABLE),), _x2avic)
XAVIC_MODE: Final = Condition("AVIC is enabled, x2AVIC is not", _MODES, lambda c: _avic(c) and not _x2avic(c))
X2AVIC_MODE: Final = Condition("AVIC and x2AVIC are enabled", _MODES, lambda c: _avic(c) and _x2avic(c))
VIRTUAL_NMIS: Final = Condition("V_NMI_ENABLE is 1", ((VIRTUAL, layouts.V_NMI_ENABLE),), _virtual_nmis)


def _rule(id_: str, sentence: str, demand: Demand, when: Condition = ALWAYS, ref: Reference = _CHECKS) -> Rule:
    return Rule(f"vmrun.{id_}", sentence, demand, ref, INVALID, when)


_LAST_INDEX: Final = "the last index of the physical APIC ID table is {} at most"
_LONG_MODE_BITS: Final = "EFER.LME and EFER.LMA are 0"
_MSR_MAP: Final = "the MSR permissions map ends below the physical-address width"
_IO_MAP: Final = "the I/O permissions map ends below the physical-address width"

RULES: Final = RuleSet(
    (
        _rule("efer-svme", "EFER.SVME is 1", bits_required(EFER, _SVME)),
        _rule("cr0-nw-without-cd", "CR0.NW is 0", bits_clear(CR0, _NW), CACHES_ON),
        _rule("cr0-upper", "bits 63:32 of CR0 are 0", bits_clear(CR0, bit_range(63, 32))),
        _rule(
            "cr3-reserved",
            "CR3 holds no address beyond the physical-address width",
            not_reserved(CR3, lambda context: context.beyond_width),
        ),
        _rule(
            "cr4-reserved",
            "no bit of CR4 that the processor reserves is 1",
            not_reserved(CR4, lambda context: context.cr4_reserved),
        ),
        _rule("dr6-upper", "bits 63:32 of DR6 are 0", bits_clear(DR6, bit_range(63, 32))),
        _rule("dr7-upper", "bits 63:32 of DR7 are 0", bits_clear(DR7, bit_range(63, 32))),
        _rule(
            "efer-reserved",
            "no bit of EFER that the processor reserves is 1",
            not_reserved(EFER, lambda context: context.efer_reserved),
        ),
        _rule("efer-long-mode-unsupported", _LONG_MODE_BITS, bits_clear(EFER, _LME | _LMA), NO_LONG_MODE),
        _rule("long-mode-pae", "CR4.PAE is 1", bits_required(CR4, _PAE), LONG_MODE_PAGING),
        _rule("long-mode-pe", "CR0.PE is 1", bits_required(CR0, _PE), LONG_MODE_PAGING),
        _rule("cs-l-and-d", "CS.D is 0", bits_clear(CS, _CS_D), LONG_MODE_CODE),
        _rule("vmrun-intercept", "the intercept of VMRUN is on", bits_required(VECTOR_4, _VMRUN)),
        _rule("msrpm-address", _MSR_MAP, map_ends_within(MSRPM, _MSRPM_SIZE), MSR_MAP_IN_USE),
        _rule("iopm-address", _IO_MAP, map_ends_within(IOPM, _IOPM_SIZE), IO_MAP_IN_USE),
        _rule(
            "event-type",
            "the type of the injected event is not a reserved one",
            injected(7 << layouts.EVENT_TYPE_SHIFT, lambda context: _injected_type(context) in _TYPES),
            INJECTING,
            _INJECTION,
        ),
        _rule(
            "event-vector",
            "the vector is that of an exception",
            injected(0xFF, _is_exception),
            INJECTING_EXCEPTION,
            _INJECTION,
        ),
        _rule("asid-not-zero", "the guest's ASID is not that of the host, 0", asid_of_a_guest()),
        _rule(
            "virtual-nmi-intercept",
            "the intercept of NMI is on",
            bits_required(VECTOR_3, _NMI_INTERCEPT),
            VIRTUAL_NMIS,
            _NMI,
        ),
        _rule(
            "nested-paging-host",
            "the host has paging enabled, whose mode nested paging takes over",
            Demand(
                ((NESTED, layouts.NP_ENABLE),),
                lambda context: context.host_paging,
                _no_nested_paging,
                lambda context: ((NESTED, layouts.NP_ENABLE),),
                volatile=True,
            ),
            NESTED_PAGING,
            _PAGING,
        ),
        _rule(
            "n-cr3-reserved",
            "N_CR3 holds no address beyond the physical-address width",
            not_reserved(N_CR3, lambda context: context.beyond_width),
            NESTED_PAGING,
            _PAGING,
        ),
        _rule(
            "g-pat",
            "each byte of G_PAT is a memory type",
            Demand((G_PAT,), lambda context: not _wrong_types(context), _repair_pat, _wrong_pat),
            NESTED_PAGING,
            _PAGING,
        ),
        _rule("x2avic-without-avic", "AVIC is enabled", bits_required(VIRTUAL, layouts.AVIC_ENABLE), X2AVIC, _AVIC),
        _rule(
            "avic-last-index",
            _LAST_INDEX.format(avic.MOST_XAVIC),
            last_index_at_most(avic.MOST_XAVIC),
            XAVIC_MODE,
            _AVIC_TABLES,
        ),
        _rule(
            "x2avic-last-index",
            _LAST_INDEX.format(avic.MOST_X2AVIC),
            last_index_at_most(avic.MOST_X2AVIC),
            X2AVIC_MODE,
            _AVIC_TABLES,
        ),
        _rule(
            "avic-backing-page",
            "AVIC's backing page is below the physical-address width",
            table_within(AVIC_BACKING_PAGE),
            AVIC,
            _AVIC_TABLES,
        ),
        _rule(
            "avic-physical-table",
            "the physical APIC ID table is below the physical-address width",
            table_within(AVIC_PHYSICAL_TABLE),
            AVIC,
            _AVIC_TABLES,
        ),
        _rule(
            "avic-logical-table",
            "the logical APIC ID table is below the physical-address width",
            table_within(AVIC_LOGICAL_TABLE),
            XAVIC_MODE,
            _AVIC_TABLES,
        ),
    )
)

BY_ID: Final = {rule.id: rule for rule in RULES}
