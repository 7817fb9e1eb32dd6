"""Where this model and Bochs 2.7 are known to differ."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from vmcs.refs import apm
from vmcs.vmcb import layouts
from vmcs.vmcb.intercepts import BY_NUMBER, Exit
from vtx.fuzz.classes import Known
from vtx.fuzz.vmruns.case import Case, all_of_it, in_fields, overlooks
from vtx.fuzz.vmruns.known_common import (
    CHECKS,
    DEBUG_REGISTER_ONES,
    DR6_ONES,
    DR6_WRITABLE,
    DR7_ONES,
    DR7_RESERVED,
    EVENT_VECTOR,
    IN_SOME_MODES,
    IN_SOME_PROGRAMS,
    INJECTION,
    LAYOUT,
    NMI_VECTOR,
    NO_MEMORY,
    RESUME_FLAG,
    SEGMENTS,
    SKINIT,
    STORED_WORDS,
    SVM,
    SYSENTER,
    VMLOAD,
    VMRUN,
    WITHIN_TABLE_LIMITS,
    WRITE_TRAPS,
)
from vtx.x86.outcome import Vector
from vtx.x86.state import MASK32, Cr4, Rflags

_EXIT: Final = apm(SVM, "#VMEXIT")
_EXCEPTIONS: Final = apm(SVM, "Exception Intercepts")
_INTERCEPTS: Final = apm(SVM, "Instruction Intercepts")
_PAGE_FAULT: Final = Exit.EXCEPTION_0 + Vector.PF
_CR3, _PROTECTED_MODE = "vmrun.cr3-reserved", "vmrun.long-mode-pe"
_MAPS: Final = ("vmrun.iopm-address", "vmrun.msrpm-address")
_OVERLOOKED: Final = frozenset((_CR3, _PROTECTED_MODE, EVENT_VECTOR, *_MAPS))
_NP_BYTE: Final = 0xFF
_L_AND_D: Final = 3 << 9
_KIND, _WRITABLE_DATA = 0xA, 0x2
_FRAME: Final = 40
_PRESENT, _CODE = 0x80, 0x8
_BT, _BS, _GD = 1 << 15, 1 << 14, 1 << 13


def _virtual_interrupt(case: Case) -> bool:
    """A virtual interrupt is due; Bochs has one only when something else makes it look."""
    return bool(case["virtual interrupt control"] & layouts.V_IRQ and case["RFLAGS"] & Rflags.IF)


def _without_next_rip(case: Case) -> bool:
    code = BY_NUMBER.get(case.ours.code)
    return code is None or not code.saves_next_rip


def _injected_type(case: Case) -> int | None:
    word = case["EVENTINJ"]
    return word >> layouts.EVENT_TYPE_SHIFT & 7 if word & layouts.EVENT_VALID else None


def _software_interrupt_in_virtual_8086(case: Case) -> bool:
    """A software interrupt is injected where INT n would need an I/O privilege level of 3."""
    return case.virtual_8086 and _injected_type(case) == layouts.InjectedType.SOFTWARE_INTERRUPT


def _real_mode_order(case: Case) -> Collection[str]:
    """What another fault of event delivery reports, and a frame that was pushed before it was found."""
    faults = (Exit.NPF, _PAGE_FAULT, Exit.EXCEPTION_0 + Vector.GP)
    return ("EXITINFO1", "EXITINFO2", *case.memory) if case.real and case.ours.code in faults else ()


def _short_error_code(case: Case) -> Collection[str]:
    """An injected error code of more than 16 bits."""
    if not case["EVENTINJ"] & layouts.EVENT_ERROR_CODE_VALID or not case["EVENTINJ"] >> 48:
        return ()
    return case.where(case.memory, lambda ours, theirs: (ours ^ theirs) & 0xFFFF == 0)


def _other_nested_control(case: Case) -> bool:
    """A bit of the byte with NP_ENABLE that is not NP_ENABLE."""
    control = case["nested paging and encryption control"] & _NP_BYTE
    return bool(control) and not control & layouts.NP_ENABLE


def _pushed_rip(case: Case) -> Collection[str]:
    """The return address of a software interrupt that is injected: nRIP here, RIP there."""
    if _injected_type(case) not in (layouts.InjectedType.SOFTWARE_INTERRUPT, layouts.InjectedType.EXCEPTION):
        return ()
    return case.where(case.memory, lambda ours, theirs: True)


_DATA_SEGMENTS: Final = ("ES", "CS", "SS", "DS", "FS", "GS")
_LDT, _TSS = (2,), (1, 3, 9, 11)
_FETCH: Final = 1 << 4


def _as_system_segment(case: Case, name: str) -> bool:
    """Whether the attributes are those of another kind of segment, present: Bochs keeps garbage in such a register."""
    attributes = case[f"{name} attributes"]
    if not attributes & 0x80:
        return False
    if name in _DATA_SEGMENTS:
        return not attributes & 0x10
    return attributes & 0x1F not in (_LDT if name == "LDTR" else _TSS)


def _garbage(case: Case) -> Collection[str]:
    """Limits, bases and attributes of registers with another kind of segment."""
    return [
        f"{name} {part}"
        for name in SEGMENTS
        if _as_system_segment(case, name)
        for part in ("attributes", "limit", "base")
    ]


def _unusable(case: Case) -> Collection[str]:
    """Base and limit of registers that no longer hold a segment."""
    return [
        f"{name} {part}"
        for name in SEGMENTS
        if not case.one.get(f"{name} attributes", 0) & 0x80
        for part in ("limit", "base")
    ]


OF_BOCHS: Final[tuple[Known[Case], ...]] = (
    overlooks("cr3-reserved", CHECKS, _OVERLOOKED, _CR3),
    overlooks("paged-real-mode", CHECKS, _OVERLOOKED, _PROTECTED_MODE),
    overlooks("event-vectors", INJECTION, _OVERLOOKED, EVENT_VECTOR),
    overlooks("end-of-maps", CHECKS, _OVERLOOKED, *_MAPS),
    WRITE_TRAPS,
    in_fields("cr2", "vtx", VMRUN, ("CR2",), lambda ours, theirs: True),
    all_of_it("cr2", "vtx", VMRUN, lambda case: case.runs("MOV EAX, CR2", "a change of bit 0 in CR2")),
    DEBUG_REGISTER_ONES,
    Known("another-kind-of-segment", "vtx", CHECKS, _garbage),
    Known("unusable-segments", "both", CHECKS, _unusable),
    all_of_it("cpl-bits", "vtx", LAYOUT, lambda case: case["CPL"] > 3),
    all_of_it("rsm-intercept", "vtx", _INTERCEPTS, lambda case: case.runs("RSM") and case.ours.code == Exit.RSM),
    in_fields(
        "fetch-without-nx",
        "vtx",
        apm(SVM, "Nested versus Guest Page Faults, Fault Ordering"),
        ("EXITINFO1",),
        lambda ours, theirs: theirs ^ ours == _FETCH and bool(theirs & _FETCH),
        lambda case: case.exits in ((Exit.NPF, Exit.NPF), (_PAGE_FAULT, _PAGE_FAULT)),
    ),
    in_fields(
        "next-rip", "vtx", apm(SVM, "State Saved on Exit"), ("nRIP",), lambda ours, theirs: not ours, _without_next_rip
    ),
    *STORED_WORDS,
    in_fields(
        "single-step-in-the-host",
        "vtx",
        _EXIT,
        ("debug exceptions in the host",),
        lambda ours, theirs: not ours,
        lambda case: bool(case["RFLAGS"] & Rflags.TF),
    ),
    Known("pushed-rip", "vtx", INJECTION, _pushed_rip),
    in_fields(
        "debug-status",
        "vtx",
        _EXCEPTIONS,
        ("DR6",),
        lambda ours, theirs: not (ours ^ (theirs & DR6_WRITABLE | DR6_ONES)) & ~(_BS | _BT),
    ),
    RESUME_FLAG,
    in_fields(
        "shadow-of-a-fault",
        "vtx",
        _EXIT,
        ("interrupt state",),
        lambda ours, theirs: (ours, theirs) == (1, 0),
        lambda case: Exit.EXCEPTION_0 <= case.ours.code < Exit.EXCEPTION_0 + 32,
    ),
    Known("error-code-width", "vtx", INJECTION, _short_error_code),
    in_fields(
        "debug-status",
        "vtx",
        _EXCEPTIONS,
        ("DR7",),
        lambda ours, theirs: ours == theirs & ~(DR7_RESERVED | _GD) & MASK32 | DR7_ONES,
        lambda case: case.ours.code == Exit.EXCEPTION_0 + Vector.DB,
    ),
    in_fields(
        "iret-order",
        "both",
        apm("Exceptions and Interrupts", "Priorities"),
        ("EXITINFO2", "CR2"),
        lambda ours, theirs: 0 < abs(ours - theirs) < _FRAME,
        lambda case: case.runs("IRET"),
    ),
    in_fields(
        "interrupted-software-event",
        "vtx",
        apm(SVM, "State Saved on Exit"),
        ("EXITINTINFO",),
        lambda ours, theirs: ours != theirs,
        lambda case: case.runs("INT"),
    ),
    all_of_it(
        "general-detect",
        "both",
        apm("Software Debug and Performance Resources", "Debug Registers"),
        lambda case: case.runs("MOV DR", "MOV ECX, DR") and bool(case["DR7"] & _GD),
    ),
    all_of_it("monitor-intercept", "vtx", _INTERCEPTS, lambda case: case.ours.code == Exit.MONITOR),
    all_of_it(
        "segments-of-virtual-8086-mode",
        "vtx",
        apm("Segmented Virtual Memory", "Segment-Protection Overview"),
        lambda case: case.virtual_8086 and any(case[f"{name} attributes"] & _CODE for name in ("ES", "SS", "DS")),
    ),
    all_of_it("absent-tss", "both", VMLOAD, lambda case: not case["TR attributes"] & _PRESENT),
    all_of_it("nested-paging-byte", "vtx", LAYOUT, _other_nested_control),
    all_of_it(
        "stack-segment",
        "both",
        CHECKS,
        lambda case: not case.in_64_bit_mode and case["SS attributes"] & _KIND != _WRITABLE_DATA,
    ),
    all_of_it("virtual-interrupt", "vtx", apm(SVM, "Injecting Virtual (INTR) Interrupts"), _virtual_interrupt),
    all_of_it("vmload-moves-the-block", "vtx", VMLOAD, lambda case: case.runs("VMLOAD", "VMSAVE")),
    SYSENTER,
    *IN_SOME_MODES,
    all_of_it(
        "implicit-access",
        "vtx",
        apm("Page Translation and Protection", "Page-Protection Checks"),
        lambda case: bool(case["CR4"] & Cr4.SMAP and case["RFLAGS"] & Rflags.AC),
    ),
    Known("real-mode-order", "both", None, _real_mode_order),
    NMI_VECTOR,
    SKINIT,
    *IN_SOME_PROGRAMS,
    all_of_it(
        "l-and-d",
        "vtx",
        CHECKS,
        lambda case: case.invalid == (False, True) and case["CS attributes"] & _L_AND_D == _L_AND_D,
    ),
    all_of_it("injected-in-virtual-8086-mode", "both", INJECTION, _software_interrupt_in_virtual_8086),
    WITHIN_TABLE_LIMITS,
    NO_MEMORY,
    all_of_it(
        "another-kind-of-segment",
        "vtx",
        CHECKS,
        lambda case: any(_as_system_segment(case, name) for name in SEGMENTS),
    ),
)
