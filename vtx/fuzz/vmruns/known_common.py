"""Differences that more than one of the others has, or that are nobody's fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vmcs.refs import apm
from vmcs.vmcb import layouts
from vmcs.vmcb.intercepts import Exit
from vtx.fuzz.classes import Known
from vtx.fuzz.on_vtx import MEMORY
from vtx.fuzz.vmruns import scene
from vtx.fuzz.vmruns.case import Case, all_of_it, in_fields
from vtx.x86.outcome import Vector
from vtx.x86.state import MASK32, Cr0, Gpr

SVM: Final = "Secure Virtual Machine"
LAYOUT: Final = apm(SVM, "Layout of VMCB")
CHECKS: Final = apm(SVM, "Canonicalization and Consistency Checks")
VMRUN: Final = apm(SVM, "VMRUN Instruction")
INJECTION: Final = apm(SVM, "Event Injection")
VMLOAD: Final = apm(SVM, "VMSAVE and VMLOAD Instructions")
RFLAGS: Final = apm("System Resources", "RFLAGS Register")

_LIMIT: Final = 0xFFFF
RFLAGS_DEFINED: Final = 0x3F_7FD5
_RFLAGS_ONES: Final = 2
RF: Final = 1 << 16
_RFLAGS_RESERVED: Final = MASK32 & ~RFLAGS_DEFINED
_CR0_DEFINED: Final = 0xE005_003F
_ET: Final = 0x10
_REGISTERS: Final = tuple(scene.REGISTERS[each].name for each in Gpr)
_MSRS: Final = ("STAR", "LSTAR", "CSTAR", "SFMASK", "KernelGsBase", "SYSENTER_CS", "SYSENTER_ESP", "SYSENTER_EIP")
SEGMENTS: Final = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
ATTRIBUTES: Final = tuple(f"{name} attributes" for name in SEGMENTS)


def in_halves(difference: int, bits: int) -> bool:
    """Whether two words that differ in ``difference`` do so only in ``bits`` of what is at some 16-bit boundary."""
    patterns = (*(bits << shift for shift in (0, 16, 32, 48)), bits | bits << 32)
    return bool(difference) and any(not difference & ~pattern for pattern in patterns)


def flags_in_memory(bits: int) -> Callable[[Case], frozenset[str]]:
    """The words in memory in which only ``bits`` of a pushed RFLAGS differ."""
    return lambda case: case.where(case.memory, lambda ours, theirs: in_halves(ours ^ theirs, bits))


def _reserved_flags(case: Case) -> frozenset[str]:
    if not case["RFLAGS"] & MASK32 & _RFLAGS_RESERVED and case["RFLAGS"] & _RFLAGS_ONES:
        return frozenset()
    names = ("RFLAGS", "R11") if case.runs("SYSCALL") else ("RFLAGS",)
    saved = case.where(names, lambda ours, theirs: ours == theirs & RFLAGS_DEFINED | _RFLAGS_ONES)
    return saved | flags_in_memory(_RFLAGS_RESERVED | RF)(case)


_TABLE_LIMITS: Final = in_fields(
    "table-limits",
    "vtx",
    LAYOUT,
    ("GDTR limit", "IDTR limit"),
    lambda ours, theirs: ours == theirs & _LIMIT,
)


def _high_halves(case: Case) -> frozenset[str]:
    if case.in_64_bit_mode:
        return frozenset()
    pushed = case.memory if case["RIP"] > MASK32 else ()
    return case.where((*_REGISTERS, "RIP", *pushed), lambda ours, theirs: ours & MASK32 == theirs & MASK32)


_HIGH_HALVES: Final[Known[Case]] = Known(
    "high-halves", "both", apm("General-Purpose Programming", "Registers"), _high_halves
)
_MSR_WIDTHS: Final = in_fields(
    "msr-widths", "both", VMLOAD, _MSRS, lambda ours, theirs: ours & MASK32 == theirs & MASK32
)
RESUME_FLAG: Final = in_fields(
    "resume-flag", "vtx", RFLAGS, ("RFLAGS",), lambda ours, theirs: (ours ^ theirs) & RFLAGS_DEFINED == RF
)
_RESERVED_FLAGS: Final[Known[Case]] = Known("reserved-flags", "vtx", RFLAGS, _reserved_flags)
_RESERVED_CR0: Final = in_fields(
    "reserved-cr0",
    "both",
    apm("System Resources", "CR0 Register"),
    ("CR0",),
    lambda ours, theirs: ours == theirs & _CR0_DEFINED | _ET,
)
_CHANGES: Final = tuple(f"a change of {bits} in CR0" for bits in ("MP", "EM", "TS", "NE", "nothing"))
_READS_CR0: Final = ("MOV EAX, CR0", "SMSW", *_CHANGES)
_READ_RESERVED_CR0: Final = in_fields(
    "reserved-cr0",
    "both",
    apm("System Resources", "CR0 Register"),
    ("RAX",),  # what programs read it into
    lambda ours, theirs: not (ours ^ theirs) & (_CR0_DEFINED | _ET),
    lambda case: case.runs(*_READS_CR0),
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
    of_real_mode = frozenset(("CS attributes",) if case.real else ())
    return of_real_mode.union(
        *(
            case.where(
                (f"{name} attributes",),
                lambda ours, theirs, mask=observed: not (ours ^ theirs) & mask or not (ours | theirs) & _PRESENT,  # type: ignore[misc]
            )
            for name, observed in _OBSERVED.items()
        )
    )


_UNOBSERVED_ATTRIBUTES: Final[Known[Case]] = Known("unobserved-attributes", "both", CHECKS, _unobserved)
# REP INS and REP OUTS with a count of zero: whether anything is intercepted, the manual leaves open.
_NO_REPETITION: Final = all_of_it(
    "no-repetition",
    "both",
    apm(SVM, "Instruction Intercepts"),
    lambda case: (
        case.runs("REP") and _count(case) == 0 and (case.theirs.code == Exit.IOIO or case.raised(Vector.GP)[1])
    ),
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
_MAPS_NOT_IN_USE: Final = all_of_it("maps-not-in-use", "both", CHECKS, _map_not_in_use)


def _foreign_tables(case: Case) -> bool:
    """A page table, or a permission map that is asked, lies where there is no memory, or where something else is."""
    nested = case["nested paging and encryption control"] & layouts.NP_ENABLE
    tables = ([case["CR3"]] if case["CR0"] & Cr0.PG else []) + ([case["N_CR3"]] if nested else [])
    maps = {Exit.IOIO: "IOPM_BASE_PA", Exit.MSR: "MSRPM_BASE_PA"}
    asked = (case[name] for code, name in maps.items() if code in case.exits)
    elsewhere = any(_page(each) not in scene.TABLES for each in tables) or any(each >= MEMORY for each in asked)
    fails = case.ours.code in _LOST or case.raised(Vector.PF)[0] or case.raised(Vector.UD)[0]  # ones are no instruction
    return elsewhere and fails and not case.rules


_LOST: Final = (Exit.NPF, Exit.EXCEPTION_0 + Vector.DF, Exit.SHUTDOWN, Exit.IOIO, Exit.MSR)


def _page(address: int) -> int:
    return address & (1 << 40) - scene.PAGE


NO_MEMORY: Final = all_of_it("no-table-there", "both", None, _foreign_tables)


def _real_mode_error_code(case: Case) -> frozenset[str]:
    if not case.real:
        return frozenset()
    valid = layouts.EVENT_ERROR_CODE_VALID
    interrupted = case.where(("EXITINTINFO",), lambda ours, theirs: (ours ^ theirs) & ~(MASK32 << 32) == valid)
    of_exit = case.where(("EXITINFO1",), lambda ours, theirs: ours == 0)
    return interrupted | (of_exit if case.ours.code == Exit.EXCEPTION_0 + Vector.GP else frozenset())


REAL_MODE_ERROR_CODE: Final[Known[Case]] = Known(
    "real-mode-error-code", "both", apm(SVM, "Exception Intercepts"), _real_mode_error_code
)
NMI_VECTOR: Final = in_fields(
    "nmi-vector",
    "vtx",
    INJECTION,
    ("EXITINTINFO",),
    lambda ours, theirs: not (ours ^ theirs) & ~0xFF and ours & 0xFF == Vector.NMI,
    lambda case: case["EVENTINJ"] >> layouts.EVENT_TYPE_SHIFT & 7 == layouts.InjectedType.NMI,
)
SKINIT: Final = all_of_it(
    "skinit",
    "both",
    apm("System Instruction Reference", "SKINIT"),
    lambda case: case.raised(Vector.UD) == (True, False) and (case.runs("SKINIT") or case.theirs.code == Exit.SKINIT),
)
DR6_WRITABLE, DR6_ONES = 0x1_E00F, 0xFFFF_0FF0
DR7_RESERVED, DR7_ONES = 0xD800, 0x400


def _has_ones(ours: int, theirs: int) -> bool:
    """Whether ours is what theirs is as DR6 or DR7, with what is reserved as it must be."""
    return ours in (theirs & DR6_WRITABLE | DR6_ONES, theirs & ~DR7_RESERVED & MASK32 | DR7_ONES)


DEBUG_REGISTER_ONES: Final = in_fields(
    "debug-register-ones",
    "vtx",
    apm("Software Debug and Performance Resources", "Debug Registers"),
    ("DR6", "DR7"),
    _has_ones,
)
READ_DEBUG_REGISTER_ONES: Final = in_fields(
    "debug-register-ones",
    "vtx",
    apm("Software Debug and Performance Resources", "Debug Registers"),
    ("RCX",),  # what programs read them into
    _has_ones,
    lambda case: case.runs("MOV ECX, DR"),
)
EVENT_VECTOR: Final = "vmrun.event-vector"
SYSENTER: Final = all_of_it(
    "sysenter-in-long-mode",
    "vtx",
    apm("System Instruction Reference", "SYSENTER"),
    lambda case: (
        case.runs("SYSENTER")
        and case.long_mode
        and (case.raised(Vector.UD)[0] or case.ours.code in _LOST)
        and not case.raised(Vector.UD)[1]
    ),
)

STORED_WORDS: Final = (_TABLE_LIMITS, _HIGH_HALVES, _MSR_WIDTHS, _RESERVED_FLAGS, _RESERVED_CR0, _UNOBSERVED_ATTRIBUTES)
"""Words of which more, or fewer, bits are kept than the architecture defines, and nothing else comes of it."""
_ROM: Final = in_fields(
    "rom",
    "both",
    None,
    ("RAX",),  # what programs load
    lambda ours, theirs: ours != theirs,
    lambda case: (
        case.runs("a load from") and not case.long_mode and case.fields[scene.REGISTERS[Gpr.RDI]] & MASK32 >= _TOP
    ),
)
_TOP: Final = 0xF000_0000
IN_SOME_PROGRAMS: Final = (_ROM, _NO_REPETITION, _MAPS_NOT_IN_USE, _READ_RESERVED_CR0, READ_DEBUG_REGISTER_ONES)
"""What only shows with certain instructions, or in fields that are not in use."""
