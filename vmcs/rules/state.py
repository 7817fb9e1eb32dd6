"""Demands that host state and guest state share: control registers, IA32_EFER, CET and FRED state, selectors.

Spec: SDM Vol. 3, "VM Entries", "Checks on Host Control Registers, MSRs, and SSP", "Checks on Guest Control Registers,
Debug Registers, and MSRs".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from vmcs.bits import bit_range, canonicalize, is_canonical
from vmcs.controls import Control
from vmcs.fields import Field
from vmcs.rules import legal
from vmcs.rules import shapes as s
from vmcs.rules.model import Demand, EntryContext

EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10

_LAM_BITS = 3 << 61
_SUPPRESS = 1 << 10
_TRACKER = 1 << 11
_FRED_CONFIG_RESERVED = 1 << 2 | 3 << 4 | 1 << 11


def cr3_reserved(context: EntryContext) -> int:
    """The bits of CR3 that must be 0."""
    return context.beyond_width & ~_LAM_BITS if context.linear_address_masking else context.beyond_width


def efer_matches(field: Field, control: Control, bits: int) -> Demand:
    """All of ``bits`` of the EFER field equal the control."""
    condition = s.on(control)
    test = s.test_of(condition)

    def wanted(context: EntryContext) -> int:
        return bits if test(context) else 0

    def repair(context: EntryContext) -> None:
        context.vmcs[field] = context.vmcs[field] & ~bits | wanted(context)

    return Demand(
        (field, *condition.reads),
        lambda context: context.vmcs[field] & bits == wanted(context),
        repair,
        lambda context: ((field, (context.vmcs[field] ^ wanted(context)) & bits),),
        legal=lambda context: legal.ones(field, bits) if wanted(context) else legal.zeros(field, bits),
    )


def suppress_excludes_tracker(field: Field) -> Demand:
    """Not both SUPPRESS and TRACKER of an IA32_S_CET field."""
    both = _SUPPRESS | _TRACKER

    def repair(context: EntryContext) -> None:
        context.vmcs[field] = context.vmcs[field] & ~_SUPPRESS

    return Demand(
        (field,),
        lambda context: context.vmcs[field] & both != both,
        repair,
        lambda context: ((field, both),),
        legal=lambda context: f"bit 10 or bit 11 of {field.name} is 0",
    )


def selector_not_null(field: Field) -> Demand:
    """The selector is not 0000H; the repair is the first descriptor of the GDT."""

    def repair(context: EntryContext) -> None:
        context.vmcs[field] = 8

    return Demand(
        (field,), lambda context: context.vmcs[field] != 0, repair, legal=lambda context: f"{field.name} is not 0"
    )


def aligned_canonical(field: Field, alignment: int) -> Demand:
    """A canonical linear address, aligned."""

    def fixed(context: EntryContext) -> int:
        return canonicalize(context.vmcs[field], context.linear_address_width) & ~(alignment - 1)

    def holds(context: EntryContext) -> bool:
        value = context.vmcs[field]
        return not value & (alignment - 1) and is_canonical(value, context.linear_address_width)

    def repair(context: EntryContext) -> None:
        context.vmcs[field] = fixed(context)

    return Demand(
        (field,),
        holds,
        repair,
        lambda context: ((field, context.vmcs[field] ^ fixed(context)),),
        legal=lambda context: (
            f"{legal.canonical(field, context.linear_address_width)}; {legal.zeros(field, alignment - 1)}"
        ),
    )


def fred_demands(
    config: Field, stacks: tuple[Field, ...], shadow_stacks: tuple[Field, ...]
) -> Iterator[tuple[str, str, Demand]]:
    """Name, sentence and demand for each of the FRED fields of the host or guest."""
    yield "config-reserved", "the reserved bits of IA32_FRED_CONFIG are 0", s.bits_clear(config, _FRED_CONFIG_RESERVED)
    yield "config-canonical", "the handler address in IA32_FRED_CONFIG is canonical", s.canonical(config)
    for level, field in enumerate(stacks, 1):
        yield f"rsp{level}", f"IA32_FRED_RSP{level} is canonical and 64-byte aligned", aligned_canonical(field, 64)
    for level, field in enumerate(shadow_stacks, 1):
        yield f"ssp{level}", f"IA32_FRED_SSP{level} is canonical and 8-byte aligned", aligned_canonical(field, 8)


def upper_half_clear(field: Field) -> Demand:
    """Bits 63:32 are 0."""
    return s.bits_clear(field, bit_range(63, 32))
