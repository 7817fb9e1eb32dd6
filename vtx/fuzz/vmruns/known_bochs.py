"""Where this model and Bochs 2.7 are known to differ."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from vmcs.refs import apm
from vmcs.vmcb import layouts
from vmcs.vmcb.intercepts import BY_NUMBER, Exit
from vtx.fuzz.classes import Known
from vtx.fuzz.vmruns import scene
from vtx.fuzz.vmruns.case import Case, all_of_it, in_fields, overlooks
from vtx.fuzz.vmruns.known_common import (
    CHECKS,
    DEBUG_REGISTER_ONES,
    DR6_ONES,
    DR6_WRITABLE,
    DR7_ONES,
    DR7_RESERVED,
    EVENT_VECTOR,
    IN_SOME_PROGRAMS,
    INJECTION,
    NMI_VECTOR,
    NO_MEMORY,
    REAL_MODE_ERROR_CODE,
    RESUME_FLAG,
    RFLAGS_DEFINED,
    SEGMENTS,
    SKINIT,
    STORED_WORDS,
    SVM,
    SYSENTER,
    VMLOAD,
    VMRUN,
    flags_in_memory,
)
from vtx.x86.outcome import Vector
from vtx.x86.state import MASK32, MASK64, Gpr, Rflags

_EXIT: Final = apm(SVM, "#VMEXIT")
_VIRTUAL_8086: Final = apm("Segmented Virtual Memory", "Virtual-8086 Mode Segmentation")
_EXCEPTIONS: Final = apm(SVM, "Exception Intercepts")
_PAGE_FAULT: Final = Exit.EXCEPTION_0 + Vector.PF
_CR3, _PROTECTED_MODE = "vmrun.cr3-reserved", "vmrun.long-mode-pe"
_MAPS: Final = ("vmrun.iopm-address", "vmrun.msrpm-address")
_OVERLOOKED: Final = frozenset((_CR3, _PROTECTED_MODE, EVENT_VECTOR, *_MAPS))
_FRAME: Final = 40
_PRESENT: Final = 0x80
_SOFTWARE: Final = (3, 4)  # types of event: exception, software interrupt
_CAUSES, _GD, _BT = 0xE00F, 1 << 13, 1 << 15
_ARITHMETIC: Final = 0x8D5
_LBR: Final = 1


def _read_cr2(case: Case) -> Collection[str]:
    """What comes of a guest's reading CR2."""
    if not case.runs("MOV EAX, CR2", "a change of bit 0 in CR2"):
        return ()
    flags = flags_in_memory(_ARITHMETIC)(case)
    others = RFLAGS_DEFINED & ~_ARITHMETIC
    return {"RAX", "CR2", *flags, *case.where(("RFLAGS",), lambda ours, theirs: not (ours ^ theirs) & others)}


def _syscall_trap(case: Case) -> bool:
    """SYSCALL is single-stepped, and clears RFLAGS.TF."""
    cleared = case["RFLAGS"] & case["SFMASK"] & Rflags.TF
    return case.runs("SYSCALL") and bool(cleared) and case.raised(Vector.DB) == (False, True)


def _moves_the_block(case: Case) -> bool:
    """VMLOAD or VMSAVE has been executed."""
    stopped = case.ours.code in (Exit.VMLOAD, Exit.VMSAVE) or case.raised(Vector.GP)[0] or case.raised(Vector.UD)[0]
    return case.runs("VMLOAD", "VMSAVE") and not stopped


def _bad_address(case: Case) -> bool:
    """VMRUN, VMLOAD or VMSAVE of what is no address of a control block: we had the fault, Bochs the intercept."""
    return case.runs("VMRUN", "VMLOAD", "VMSAVE") and case.exception(Vector.GP) == (True, False)


def _wide_extensions(case: Case) -> bool:
    """MONITOR or MWAIT with extensions in ECX that are good, and something above them in RCX."""
    high = case.fields[scene.REGISTERS[Gpr.RCX]] >> 32
    return case.runs("MONITOR", "MWAIT") and bool(high) and case.exception(Vector.GP) == (False, True)


def _without_next_rip(case: Case) -> bool:
    code = BY_NUMBER.get(case.ours.code)
    return code is None or not code.saves_next_rip


def _injected_type(case: Case) -> int | None:
    word = case["EVENTINJ"]
    return word >> layouts.EVENT_TYPE_SHIFT & 7 if word & layouts.EVENT_VALID else None


def _software_interrupt_in_virtual_8086(case: Case) -> bool:
    """A software interrupt is injected where INT n would need an I/O privilege level of 3."""
    injected = case.virtual_8086 and _injected_type(case) == layouts.InjectedType.SOFTWARE_INTERRUPT
    return injected and case.exception(Vector.GP)[1]


def _real_mode_order(case: Case) -> Collection[str]:
    """What another fault of event delivery reports, and a frame that was pushed before it was found."""
    faults = (Exit.NPF, _PAGE_FAULT, Exit.EXCEPTION_0 + Vector.GP)
    return ("EXITINFO1", "EXITINFO2", *case.memory) if case.real and case.ours.code in faults else ()


def _short_error_code(case: Case) -> Collection[str]:
    """An injected error code of more than 16 bits."""
    if not case["EVENTINJ"] & layouts.EVENT_ERROR_CODE_VALID or not case["EVENTINJ"] >> 48:
        return ()
    return case.where(case.memory, lambda ours, theirs: (ours ^ theirs) & 0xFFFF == 0)


def _undefined_flags(case: Case) -> Collection[str]:
    """Flags that the guest's instruction leaves undefined, when that is none of the programs."""
    undefined = case.undefined_flags
    if case.program is not None or not undefined:
        return ()
    return case.where(("RFLAGS",), lambda ours, theirs: not (ours ^ theirs) & ~undefined)


def _injected_int3(case: Case) -> Collection[str]:
    """The error code of a fault in the delivery of an INT3 or INTO that is injected: with EXT there."""
    if _injected_type(case) != layouts.InjectedType.EXCEPTION or case["EVENTINJ"] & 0xFF not in (Vector.BP, Vector.OF):
        return ()
    return case.where((*case.memory, "EXITINFO1"), lambda ours, theirs: theirs == ours | 1)


def _pushed_rip(case: Case) -> Collection[str]:
    """The return address of a software interrupt that is injected: nRIP here, RIP there."""
    if _injected_type(case) not in (layouts.InjectedType.SOFTWARE_INTERRUPT, layouts.InjectedType.EXCEPTION):
        return ()

    def alike(ours: int, theirs: int) -> bool:
        for mask, shift in _PARTS:
            addresses = (case["nRIP"] & mask) << shift, (case["RIP"] & mask) << shift
            if (ours & mask << shift, theirs & mask << shift) == addresses and not (ours ^ theirs) & ~(mask << shift):
                return True
        return False

    return case.where(case.memory, alike)


_PARTS: Final = ((MASK64, 0), *((MASK32, shift) for shift in (0, 32)), *((0xFFFF, shift) for shift in (0, 16, 32, 48)))
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
    in_fields(
        "cr2", "vtx", VMRUN, ("CR2",), lambda ours, theirs: True, lambda case: case.one.get("CR2") == case["CR2"]
    ),
    Known("cr2", "vtx", VMRUN, _read_cr2),
    DEBUG_REGISTER_ONES,
    Known("another-kind-of-segment", "vtx", CHECKS, _garbage),
    Known("unusable-segments", "both", CHECKS, _unusable),
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
        lambda ours, theirs: not (ours ^ (theirs & DR6_WRITABLE | DR6_ONES)) & ~_CAUSES,
        lambda case: case.ours.code == Exit.EXCEPTION_0 + Vector.DB,
    ),
    in_fields(
        "debug-status",
        "vtx",
        _EXCEPTIONS,
        ("DR6",),
        lambda ours, theirs: ours ^ (theirs & DR6_WRITABLE | DR6_ONES) == _BT & ours,
        lambda case: case.ours.code != Exit.EXCEPTION_0 + Vector.DB and bool(case["DR6"] & _BT),
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
    Known("injected-int3", "both", INJECTION, _injected_int3),
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
        lambda ours, theirs: not ours or ours >> layouts.EVENT_TYPE_SHIFT & 7 in _SOFTWARE,
        lambda case: case.runs("INT"),
    ),
    all_of_it("vmload-moves-the-block", "vtx", VMLOAD, _moves_the_block),
    SYSENTER,
    all_of_it("address-before-intercept", "vtx", apm(SVM, "Instruction Intercepts"), _bad_address),
    all_of_it("monitor-hints", "vtx", apm(SVM, "Instruction Intercepts"), _wide_extensions),
    all_of_it("syscall-trap", "vtx", apm("System Instruction Reference", "SYSCALL"), _syscall_trap),
    in_fields(
        "real-mode-loads",
        "both",
        apm("Segmented Virtual Memory", "Real Mode Segmentation"),
        tuple(f"{name} attributes" for name in _DATA_SEGMENTS),
        lambda ours, theirs: not ours & _PRESENT and bool(theirs & _PRESENT),
        lambda case: case.real and case.runs("MOV DS"),
    ),
    in_fields(
        "virtual-8086-loads",
        "Bochs",
        _VIRTUAL_8086,
        ("DS attributes", "DS limit"),
        lambda ours, theirs: theirs in (0xF3, 0xFFFF),
        lambda case: case.virtual_8086 and case.runs("MOV DS"),
    ),
    REAL_MODE_ERROR_CODE,
    Known("real-mode-order", "both", None, _real_mode_order),
    NMI_VECTOR,
    SKINIT,
    *IN_SOME_PROGRAMS,
    all_of_it("injected-in-virtual-8086-mode", "both", INJECTION, _software_interrupt_in_virtual_8086),
    in_fields(
        "branch-records",
        "vtx",
        apm(SVM, "Layout of VMCB"),
        ("BR_FROM", "BR_TO", "LASTEXCPFROM", "LASTEXCPTO"),
        lambda ours, theirs: ours != theirs,
        lambda case: bool(case["virtualization of LBR, VMLOAD and VMSAVE"] & case["DBGCTL"] & _LBR),
    ),
    Known("undefined-flags", "both", apm("General-Purpose Programming", "Registers"), _undefined_flags),
    NO_MEMORY,
)
