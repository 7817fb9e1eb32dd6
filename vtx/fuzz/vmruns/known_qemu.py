"""Where this model and QEMU 7.2, without KVM, are known to differ."""

from __future__ import annotations

from collections.abc import Collection
from itertools import takewhile
from typing import Final

from vmcs.refs import apm
from vmcs.vmcb import layouts
from vmcs.vmcb.intercepts import Exit
from vtx.fuzz.classes import Known
from vtx.fuzz.vmruns import scene
from vtx.fuzz.vmruns.case import Case, all_of_it, in_fields, overlooks
from vtx.fuzz.vmruns.known_common import (
    CHECKS,
    DEBUG_REGISTER_ONES,
    DR7_ONES,
    DR7_RESERVED,
    EVENT_VECTOR,
    IN_SOME_PROGRAMS,
    INJECTION,
    LAYOUT,
    NMI_VECTOR,
    NO_MEMORY,
    REAL_MODE_ERROR_CODE,
    RESUME_FLAG,
    RF,
    RFLAGS,
    RFLAGS_DEFINED,
    SKINIT,
    STORED_WORDS,
    SVM,
    SYSENTER,
    VMRUN,
    flags_in_memory,
)
from vtx.x86.linear import is_canonical
from vtx.x86.outcome import Vector
from vtx.x86.state import MASK32, MASK64, Cr0, Cr4, Efer, Gpr, Rflags

_INTERCEPTS: Final = apm(SVM, "Instruction Intercepts")
_EXCEPTIONS: Final = apm(SVM, "Exception Intercepts")
_VECTORS: Final = apm("Exceptions and Interrupts", "Vectors")
_NESTED_PAGING, _CR4 = ("vmrun.g-pat", "vmrun.n-cr3-reserved"), "vmrun.cr4-reserved"
_OVERLOOKED: Final = frozenset((*_NESTED_PAGING, _CR4, EVENT_VECTOR))
_ADDRESS_SIZES: Final = 0x380
_PRESENT, _WRITE, _RESERVED = 1, 2, 8
_GD: Final = 1 << 13
_BIG: Final = 1 << 10
_LINEAR_WIDTH: Final = 48
_LMA: Final = int(Efer.LMA)
_ARITHMETIC_AND_DF: Final = 0xCD5
_STACK_SEGMENT: Final = (2, 4)  # behind the stack pointer, in a TSS
_EVENT: Final = 0x8000_07FF
_AVAILABLE_TSS: Final = 0x89


def _privilege_level(case: Case) -> int:
    """The guest's privilege level, which CPL has unless the mode decides."""
    if case.real:
        return 0
    return 3 if case.virtual_8086 else case["CPL"] & 3


def _idt_error_code(case: Case) -> Collection[str]:
    """The error code of a fault in event delivery: QEMU forgets that it was, and takes every gate for 16 bytes."""

    def alike(ours: int, theirs: int) -> bool:
        code = ours & 0xFFFF
        same_event = bool(code & 2) and theirs & 0xFFFF == _double(code)
        return theirs & ~0xFFFF == ours & ~0xFFFF and (same_event or (bool(code & 1) and theirs & 0xFFFF == code & ~1))

    if case.ours.code == Exit.NPF or case.ours.code == Exit.EXCEPTION_0 + Vector.PF:
        return ()
    return case.where((*case.memory, "EXITINFO1"), alike)


def _extended_error_code(case: Case) -> Collection[str]:
    """An injected error code with its sign extended."""
    code = case["EVENTINJ"] >> 32
    negative = code | MASK32 << 32
    return case.where(case.memory, lambda ours, theirs: (ours, theirs) == (code, negative)) if code >> 31 else ()


def _interrupted_event(case: Case) -> Collection[str]:
    """EXITINTINFO of an exception whose delivery exits, after that of an injected event has led to it."""
    injected = case["EVENTINJ"]

    def alike(ours: int, theirs: int) -> bool:
        exception = ours >> layouts.EVENT_TYPE_SHIFT & 7 == layouts.InjectedType.EXCEPTION
        return exception and not (theirs ^ injected) & _EVENT and bool((ours ^ injected) & _EVENT)

    return case.where(("EXITINTINFO",), alike) if injected & layouts.EVENT_VALID else ()


def _double(gate: int) -> int:
    return 2 * (gate & ~7) | 2


def _privilege_first(case: Case) -> bool:
    """An instruction that is undefined where the guest is, at a privilege level that may not execute it either."""
    return case.raised(Vector.UD)[0] and case.raised(Vector.GP)[1] and _privilege_level(case) > 0


def _page_directory_pointers(case: Case) -> bool:
    """PAE paging without nested paging, and CR3 leads to what are no page-directory pointers."""
    return case.invalid == (True, False) and not case.rules and _pae(case)


def _pae(case: Case) -> bool:
    """Whether the guest uses PAE paging."""
    return bool(case["CR0"] & Cr0.PG and case["CR4"] & Cr4.PAE and not case["EFER"] & Efer.LME)


def _lock_prefix(case: Case) -> bool:
    """We had an invalid opcode because of a LOCK prefix, and QEMU went on."""
    prefixes = bytes(takewhile(_PREFIXES.__contains__, case.code))
    return case.exception(Vector.UD) == (True, False) and _LOCK in prefixes


def _other_intercept(case: Case) -> bool:
    """An instruction that QEMU takes for another one when it looks at intercepts."""
    others = {"RDTSCP": Exit.RDTSC, "INT3": Exit.SWINT, "INTO": Exit.SWINT, "INVD": Exit.WBINVD}
    return any(case.runs(name) and case.theirs.code == code for name, code in others.items())


def _stack_not_canonical(case: Case) -> bool:
    """Event delivery pushes to addresses that are not canonical: #SS, which QEMU takes for #GP like all others."""
    top = case["RSP"] & ~0xF
    pushed = (top - 8 * number & MASK64 for number in range(1, 7))
    beyond = case.long_mode and not all(is_canonical(each, _LINEAR_WIDTH) for each in pushed)
    return beyond and case.ours.code in (_SS, *_FATAL) and case.theirs.code in (_GP, *_FATAL)


def _write_not_canonical(case: Case) -> bool:
    """WRMSR of an address that is not canonical."""
    low, high = (case.fields[scene.REGISTERS[each]] & MASK32 for each in (Gpr.RAX, Gpr.RDX))
    faults = case.raised(Vector.GP) == (True, False)
    return case.runs("WRMSR") and faults and not is_canonical(high << 32 | low, _LINEAR_WIDTH)


def _int1(case: Case) -> bool:
    """INT1, which is an invalid opcode there."""
    return case.runs("INT1") and (case.raised(Vector.UD)[1] or case.theirs.code in _FATAL)


_SS, _GP, _PF = (Exit.EXCEPTION_0 + vector for vector in (Vector.SS, Vector.GP, Vector.PF))
_FATAL: Final = (Exit.EXCEPTION_0 + Vector.DF, Exit.SHUTDOWN)
_LOCK: Final = 0xF0
_PREFIXES: Final = bytes.fromhex("262e3664656667f0f2f3")

OF_QEMU: Final[tuple[Known[Case], ...]] = (
    overlooks("nested-paging-fields", apm(SVM, "Nested Paging"), _OVERLOOKED, *_NESTED_PAGING),
    overlooks("event-vectors", INJECTION, _OVERLOOKED, EVENT_VECTOR),
    Known("resume-flag", "vtx", RFLAGS, flags_in_memory(RF)),
    RESUME_FLAG,
    NMI_VECTOR,
    in_fields(
        "io-address-size",
        "vtx",
        _INTERCEPTS,
        ("EXITINFO1",),
        lambda ours, theirs: ours & ~_ADDRESS_SIZES == theirs,
        lambda case: case.exits == (Exit.IOIO, Exit.IOIO),
    ),
    *STORED_WORDS,
    DEBUG_REGISTER_ONES,
    in_fields(
        "general-detect",
        "vtx",
        apm("Software Debug and Performance Resources", "Debug Registers"),
        ("DR7",),
        lambda ours, theirs: ours == theirs & ~(DR7_RESERVED | _GD) & MASK32 | DR7_ONES,
    ),
    in_fields("efer-lma", "vtx", VMRUN, ("EFER",), lambda ours, theirs: ours ^ theirs == _LMA),
    in_fields(
        "host-cr0",
        "vtx",
        apm(SVM, "#VMEXIT"),
        ("host CR0",),
        lambda ours, theirs: bool(theirs),
        lambda case: bool(case["EFER"] & Efer.LME and not case["CR0"] & Cr0.PG),
    ),
    all_of_it(
        "host-cr0",
        "vtx",
        apm(SVM, "#VMEXIT"),
        lambda case: case.theirs.kind != "exit" and bool(case["EFER"] & Efer.LME and not case["CR0"] & Cr0.PG),
    ),
    in_fields(
        "interrupt-shadow",
        "vtx",
        LAYOUT,
        ("interrupt state",),
        lambda ours, theirs: (ours, theirs) == (1, 0),
        lambda case: bool(case["interrupt state"] & layouts.INTERRUPT_SHADOW),
    ),
    Known("idt-error-code", "vtx", _VECTORS, _idt_error_code),
    Known("error-code-width", "vtx", INJECTION, _extended_error_code),
    in_fields(
        "int3-type",
        "vtx",
        apm(SVM, "State Saved on Exit"),
        ("EXITINTINFO",),
        lambda ours, theirs: (ours >> layouts.EVENT_TYPE_SHIFT & 7, theirs >> layouts.EVENT_TYPE_SHIFT & 7) == (3, 4),
        lambda case: case.runs("INT3", "INTO"),
    ),
    Known("interrupted-event", "vtx", apm(SVM, "State Saved on Exit"), _interrupted_event),
    all_of_it("int1", "vtx", _INTERCEPTS, _int1),
    all_of_it("undefined-before-privilege", "vtx", apm("Exceptions and Interrupts", "Priorities"), _privilege_first),
    in_fields(
        "null-ldt",
        "vtx",
        LAYOUT,
        ("LDTR attributes",),
        lambda ours, theirs: not ours & 0x80 and bool(theirs & 0x80),
        lambda case: not case.one.get("LDTR selector", 0),
    ),
    REAL_MODE_ERROR_CODE,
    all_of_it("rdpmc", "vtx", _INTERCEPTS, lambda case: case.runs("RDPMC") and case.raised(Vector.UD) == (False, True)),
    SYSENTER,
    all_of_it("page-directory-pointers", "vtx", apm(SVM, "Legacy PAE Mode"), _page_directory_pointers),
    overlooks("cr4-features", CHECKS, _OVERLOOKED, _CR4),
    *IN_SOME_PROGRAMS,
    all_of_it(
        "single-step",
        "vtx",
        RFLAGS,
        lambda case: case.runs("STI", "PAUSE") and bool(case["RFLAGS"] & Rflags.TF) and case.raised(Vector.DB)[0],
    ),
    all_of_it("lock-prefix", "vtx", _VECTORS, _lock_prefix),
    all_of_it("other-intercepts", "vtx", _INTERCEPTS, _other_intercept),
    in_fields(
        "legacy-linear-addresses",
        "vtx",
        apm("Segmented Virtual Memory", "Segment-Protection Overview"),
        ("EXITINFO2", "CR2"),
        lambda ours, theirs: ours == theirs & MASK32,
        lambda case: not case.long_mode,
    ),
    in_fields(
        "virtual-8086-loads",
        "vtx",
        apm("Segmented Virtual Memory", "Virtual-8086 Mode Segmentation"),
        ("SS attributes", "SS limit"),
        lambda ours, theirs: ours in (0xF3, 0xFFFF),
        lambda case: case.virtual_8086 and case.runs("MOV SS"),
    ),
    in_fields(
        "syscall-flags",
        "vtx",
        apm("System Instruction Reference", "SYSCALL"),
        ("RFLAGS",),
        lambda ours, theirs: not (ours ^ theirs) & RFLAGS_DEFINED & ~_ARITHMETIC_AND_DF,
        lambda case: case.runs("SYSCALL"),
    ),
    in_fields(
        "inner-stack-order",
        "both",
        apm("Exceptions and Interrupts", "Priorities"),
        ("EXITINFO2", "CR2"),
        lambda ours, theirs: ours - theirs in _STACK_SEGMENT,
        lambda case: not case.long_mode and bool(case.one.get("EXITINTINFO", 0) & layouts.EVENT_VALID),
    ),
    in_fields(
        "read-modify-write",
        "vtx",
        apm("Page Translation and Protection", "Page-Protection Checks"),
        ("EXITINFO1",),
        lambda ours, theirs: ours ^ theirs == _WRITE and bool(ours & _WRITE),
        lambda case: case.ours.code in (Exit.NPF, Exit.EXCEPTION_0 + Vector.PF),
    ),
    in_fields(
        "page-directory-pointers",
        "vtx",
        apm(SVM, "Legacy PAE Mode"),
        ("EXITINFO1",),
        lambda ours, theirs: bool(ours & _RESERVED) and not theirs & _RESERVED,
        lambda case: case.ours.code == Exit.EXCEPTION_0 + Vector.PF and _pae(case),
    ),
    in_fields(
        "virtual-interrupt-delivery",
        "vtx",
        apm(SVM, "Injecting Virtual (INTR) Interrupts"),
        ("EXITINTINFO",),
        lambda ours, theirs: theirs == ours | layouts.InjectedType.EXCEPTION << layouts.EVENT_TYPE_SHIFT,
        lambda case: bool(case["virtual interrupt control"] & layouts.V_IRQ),
    ),
    in_fields(
        "virtual-interrupt-delivery",
        "vtx",
        apm(SVM, "Injecting Virtual (INTR) Interrupts"),
        ("virtual interrupt control",),
        lambda ours, theirs: theirs == ours | layouts.V_IRQ,
        lambda case: bool(case.one.get("EXITINTINFO", 0) & layouts.EVENT_VALID),
    ),
    all_of_it("canonical", "vtx", _VECTORS, _stack_not_canonical),
    all_of_it("canonical", "vtx", _VECTORS, _write_not_canonical),
    all_of_it(
        "tss-type",
        "vtx",
        VMRUN,
        lambda case: case.theirs.kind != "exit" and case["TR attributes"] & 0x9F != _AVAILABLE_TSS,
    ),
    SKINIT,
    in_fields(
        "reserved-is-present",
        "vtx",
        apm("Page Translation and Protection", "Page-Protection Checks"),
        ("EXITINFO1",),
        lambda ours, theirs: ours ^ theirs == _PRESENT and bool(ours & _RESERVED),
        lambda case: case.ours.code in (Exit.NPF, Exit.EXCEPTION_0 + Vector.PF),
    ),
    all_of_it(
        "null-tss",
        "vtx",
        apm("System Instruction Reference", "LTR"),
        lambda case: (
            case.runs("LTR")
            and (case.raised(Vector.GP)[0] or case.ours.code in _FATAL)
            and not case.raised(Vector.GP)[1]
        ),
    ),
    NO_MEMORY,
)
