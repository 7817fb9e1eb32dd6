"""Differences that more than one of the others has, or that are nobody's fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vmcs.refs import apm
from vmcs.vmcb.intercepts import Exit
from vtx.fuzz.classes import Known
from vtx.fuzz.on_vtx import MEMORY
from vtx.fuzz.vmruns import scene
from vtx.fuzz.vmruns.case import Case, all_of_it, in_fields
from vtx.x86.state import MASK32, Gpr

SVM: Final = "Secure Virtual Machine"
LAYOUT: Final = apm(SVM, "Layout of VMCB")
CHECKS: Final = apm(SVM, "Canonicalization and Consistency Checks")
VMRUN: Final = apm(SVM, "VMRUN Instruction")
INJECTION: Final = apm(SVM, "Event Injection")
VMLOAD: Final = apm(SVM, "VMSAVE and VMLOAD Instructions")
RFLAGS: Final = apm("System Resources", "RFLAGS Register")
DEBUG_REGISTERS: Final = apm("Software Debug and Performance Resources", "Debug Registers")

_LIMIT: Final = 0xFFFF
_RFLAGS_DEFINED: Final = 0x3F_7FD5
_RFLAGS_ONES: Final = 2
RF: Final = 1 << 16
_RFLAGS_RESERVED: Final = MASK32 & ~_RFLAGS_DEFINED
_CR0_DEFINED: Final = 0xE005_003F
_ET: Final = 0x10
_REGISTERS: Final = tuple(scene.REGISTERS[each].name for each in Gpr)
_MSRS: Final = ("STAR", "LSTAR", "CSTAR", "SFMASK", "KernelGsBase", "SYSENTER_CS", "SYSENTER_ESP", "SYSENTER_EIP")
SEGMENTS: Final = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
ATTRIBUTES: Final = tuple(f"{name} attributes" for name in SEGMENTS)


def in_halves(difference: int, bits: int) -> bool:
    """Whether two words that differ in ``difference`` do so only in ``bits`` of what is at some 16-bit boundary."""
    return any(difference and not difference & ~(bits << shift) for shift in (0, 16, 32, 48))


def flags_in_memory(bits: int) -> Callable[[Case], frozenset[str]]:
    """The words in memory in which only ``bits`` of a pushed RFLAGS differ."""
    return lambda case: case.where(case.memory, lambda ours, theirs: in_halves(ours ^ theirs, bits))


def _reserved_flags(case: Case) -> frozenset[str]:
    if not case["RFLAGS"] & MASK32 & _RFLAGS_RESERVED and case["RFLAGS"] & _RFLAGS_ONES:
        return frozenset()
    saved = case.where(("RFLAGS",), lambda ours, theirs: ours == theirs & _RFLAGS_DEFINED | _RFLAGS_ONES)
    return saved | flags_in_memory(_RFLAGS_RESERVED | RF)(case)


def _beyond_16_bits(case: Case) -> bool:
    return case["IDTR limit"] > _LIMIT or case["GDTR limit"] > _LIMIT


TABLE_LIMITS: Final = in_fields(
    "table-limits",
    "vtx",
    LAYOUT,
    ("GDTR limit", "IDTR limit"),
    lambda ours, theirs: ours == theirs & _LIMIT,
)
WITHIN_TABLE_LIMITS: Final = all_of_it("table-limits", "vtx", LAYOUT, _beyond_16_bits)
HIGH_HALVES: Final = in_fields(
    "high-halves",
    "both",
    apm("System Resources", "CR0 Register"),
    (*_REGISTERS, "RIP"),
    lambda ours, theirs: ours & MASK32 == theirs & MASK32,
    lambda case: not case.in_64_bit_mode,
)
MSR_WIDTHS: Final = in_fields(
    "msr-widths", "both", VMLOAD, _MSRS, lambda ours, theirs: ours & MASK32 == theirs & MASK32
)
RESERVED_FLAGS: Final[Known[Case]] = Known("reserved-flags", "vtx", RFLAGS, _reserved_flags)
RESERVED_CR0: Final = in_fields(
    "reserved-cr0",
    "both",
    apm("System Resources", "CR0 Register"),
    ("CR0",),
    lambda ours, theirs: ours == theirs & _CR0_DEFINED | _ET,
)


# Which attributes of a segment VMRUN observes: of the others, any value may come back.
_PRESENT: Final = 0x80
_OBSERVED: Final = {
    **dict.fromkeys(("ES", "DS", "FS", "GS"), 0x4EE),
    "CS": 0x602,
    "SS": 0x48E,
    "LDTR": 0x9F,
    "TR": 0x9F,
}


def _unobserved(case: Case) -> frozenset[str]:
    return frozenset().union(
        *(
            case.where(
                (f"{name} attributes",),
                lambda ours, theirs, mask=observed: not (ours ^ theirs) & mask or not (ours | theirs) & _PRESENT,  # type: ignore[misc]
            )
            for name, observed in _OBSERVED.items()
        )
    )


UNOBSERVED_ATTRIBUTES: Final[Known[Case]] = Known("unobserved-attributes", "both", CHECKS, _unobserved)
# REP INS and REP OUTS with a count of zero: whether anything is intercepted, the manual leaves open.
NO_REPETITION: Final = all_of_it(
    "no-repetition",
    "both",
    apm(SVM, "Instruction Intercepts"),
    lambda case: case.runs("REP") and _count(case) == 0,
)


def _count(case: Case) -> int:
    """rCX, as wide as addresses are where the guest begins."""
    value = case.fields[scene.REGISTERS[Gpr.RCX]]
    wide = case["CS attributes"] & _DEFAULT_SIZE
    return value if case.in_64_bit_mode else value & (MASK32 if wide and not case.real else 0xFFFF)


_DEFAULT_SIZE: Final = 1 << 10


def _map_not_in_use(case: Case) -> bool:
    """A permission map lies beyond the physical-address width, and its intercept is off."""
    maps = ((Exit.IOIO, "IOPM_BASE_PA"), (Exit.MSR, "MSRPM_BASE_PA"))
    beyond = any(not case.intercepts(number) and case[name] >> 12 >= _PAGES - 3 for number, name in maps)
    return beyond and case.invalid == (False, True)


_PAGES: Final = 1 << 28  # of the 40 bits that all of them have
MAPS_NOT_IN_USE: Final = all_of_it("maps-not-in-use", "both", CHECKS, _map_not_in_use)


def _outside_memory(case: Case) -> bool:
    """A table begins where there is no memory."""
    nested = case["nested paging and encryption control"] & 1
    return case["CR3"] >= MEMORY or (bool(nested) and case["N_CR3"] >= MEMORY)


NO_MEMORY: Final = all_of_it("no-memory-there", "both", None, _outside_memory)
