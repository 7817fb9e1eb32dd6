"""Classes of differences that an experiment decides: what a VMCB is taken for, by the others or by this model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from vmcs.refs import apm
from vmcs.vmcb import layouts
from vmcs.vmcb.fields import BY_NAME, VmcbField
from vmcs.vmcb.intercepts import Exit
from vtx.fuzz.readings import Reading
from vtx.fuzz.vmruns import scene
from vtx.fuzz.vmruns.case import Case
from vtx.fuzz.vmruns.known_common import CHECKS, INJECTION, LAYOUT, RFLAGS, SEGMENTS, SVM, VMLOAD, VMRUN
from vtx.x86.outcome import Vector
from vtx.x86.state import MASK32, Cr4, Efer, Gpr, Rflags

Changes = Mapping[VmcbField, int]
_BY_KEYWORD: Final = {name.replace(" ", "_"): each for name, each in BY_NAME.items()}
_NOTHING: Final[Changes] = {}
_INTERCEPTS: Final = apm(SVM, "Instruction Intercepts")
_EXCEPTIONS: Final = apm(SVM, "Exception Intercepts")
_TRAPS: Final = apm(SVM, "Control Register Write Traps")
_DEBUG: Final = apm("Software Debug and Performance Resources", "Debug Registers")
_VECTORS: Final = apm("Exceptions and Interrupts", "Vectors")
_SEGMENTATION: Final = "Segmented Virtual Memory"
_LIMIT: Final = 0xFFFF
_PRESENT: Final = 0x80
_LONG: Final = 1 << 9
_BIG: Final = 1 << 10
_DPL: Final = 3 << 5
_GD: Final = 1 << 13
_VECTOR: Final = 0xFF << layouts.V_INTR_VECTOR_SHIFT
_BEYOND_VECTOR: Final = 0xFFFF_FF00 << layouts.V_INTR_VECTOR_SHIFT
_FFXSR: Final = 1 << 14
_DATA_SEGMENTS: Final = ("ES", "SS", "DS", "FS", "GS")


def _set(case: Case, **values: int) -> Changes:
    """New values of fields, by name with _ for a space; those that have them already are left out."""
    named = {_BY_KEYWORD[name]: value for name, value in values.items()}
    return {each: value for each, value in named.items() if case.fields[each] != value}


def _without(*numbers: int) -> Callable[[Case], Changes]:
    """Intercepts that are on, switched off."""

    def changes(case: Case) -> Changes:
        words: dict[VmcbField, int] = {}
        for number in numbers:
            if case.intercepts(number):
                each = scene.INTERCEPTS[number >> 5]
                words[each] = words.get(each, case.fields[each]) & ~(1 << (number & 31))
        return words

    return changes


def _if_runs(programs: tuple[str, ...], changes: Callable[[Case], Changes]) -> Callable[[Case], Changes]:
    return lambda case: changes(case) if case.runs(*programs) else _NOTHING


# What others take a VMCB for.


def _always_exits(case: Case) -> Changes:
    """VMLOAD and VMSAVE with their intercepts."""
    number = Exit.VMLOAD if case.runs("VMLOAD") else Exit.VMSAVE
    if not case.runs("VMLOAD", "VMSAVE") or case.intercepts(number):
        return _NOTHING
    each = scene.INTERCEPTS[number >> 5]
    return {each: case.fields[each] | 1 << (number & 31)}


_WITH_ERROR_CODE: Final = frozenset((8, 10, 11, 12, 13, 14, 17, 21, 29, 30))


def _error_code(case: Case) -> Changes:
    """An error code with just the exceptions that have one."""
    word = case["EVENTINJ"]
    if not word & layouts.EVENT_VALID:
        return _NOTHING
    is_exception = word >> layouts.EVENT_TYPE_SHIFT & 7 == layouts.InjectedType.EXCEPTION
    has_one = is_exception and word & 0xFF in _WITH_ERROR_CODE
    valid = layouts.EVENT_ERROR_CODE_VALID
    return _set(case, EVENTINJ=word | valid if has_one else word & ~valid)


def _equal_priority(case: Case) -> Changes:
    """A virtual interrupt of the priority of V_TPR as one that ignores that."""
    control = case["virtual interrupt control"]
    equal = control >> layouts.V_INTR_PRIO_SHIFT & 0xF == control & layouts.V_TPR & 0xF
    if not equal or not control & layouts.V_IRQ:
        return _NOTHING
    return _set(case, virtual_interrupt_control=control | layouts.V_IGN_TPR)


def _level_of_stack(case: Case) -> Changes:
    """The DPL of SS for the privilege level."""
    return _NOTHING if case.real or case.virtual_8086 else _set(case, CPL=case["SS attributes"] >> 5 & 3)


def _flat(case: Case) -> Changes:
    """Segments without limits, all of them present, writable or readable code."""
    if case.in_64_bit_mode:
        return _NOTHING
    values = {f"{name}_limit": MASK32 for name in (*_DATA_SEGMENTS, "CS")}
    values |= {f"{name}_attributes": case[f"{name} attributes"] & (0xC00 | _DPL) | 0x93 for name in _DATA_SEGMENTS}
    values["CS_attributes"] = case["CS attributes"] & (0xC00 | _LONG | _DPL) | 0x9B
    return _set(case, **values)


def _address_of_data(case: Case) -> Changes:
    """MONITOR of what can be read."""
    base = next(each for each in scene.BASES if each.name == case.base)
    segment = {each: value for each, value in scene.fields_of(base).items() if each.name in _OF_DS}
    changes = segment | {scene.RAX: base.origin + scene.DATA - scene.CODE}
    return {each: value for each, value in changes.items() if case.fields[each] != value}


_OF_DS: Final = ("DS attributes", "DS limit", "DS base")


def _canonical_addresses(case: Case) -> Changes:
    """MSRs with addresses made canonical."""
    names = ("LSTAR", "CSTAR", "SYSENTER_EIP", "SYSENTER_ESP")
    return _set(case, **{name: scene.canonical(case[name]) for name in names})


# What this model takes a VMCB for.


def _canonical_limits(case: Case) -> Changes:
    """Limits of descriptor tables of 16 bits."""
    return _set(case, GDTR_limit=case["GDTR limit"] & _LIMIT, IDTR_limit=case["IDTR limit"] & _LIMIT)


def _level_of_mode(case: Case) -> Changes:
    """The DPL of SS that the mode has."""
    if not case.real and not case.virtual_8086:
        return _NOTHING
    return _set(case, SS_attributes=case["SS attributes"] & ~_DPL | (_DPL if case.virtual_8086 else 0))


def _long_mode_active(case: Case) -> Changes:
    """EFER.LMA as EFER.LME and CR0.PG have it."""
    return _set(case, EFER=case["EFER"] & ~Efer.LMA | (Efer.LMA if case.long_mode else 0))


def _low_bases(case: Case) -> Changes:
    """Outside long mode, bases of 32 bits."""
    if case.long_mode:
        return _NOTHING
    return _set(case, **{f"{name}_base": case[f"{name} base"] & MASK32 for name in (*SEGMENTS, "GDTR", "IDTR")})


def _as_in_virtual_8086_mode(case: Case) -> Changes:
    if not case.virtual_8086:
        return _NOTHING
    return _set(case, **{f"{name}_attributes": 0xF3 for name in (*_DATA_SEGMENTS, "CS")})


_SEGMENT, _CODE, _LDT, _TSS = 0x10, 0xB, 2, 9


def _kinds_of_segments(case: Case) -> Changes:
    """Code or data in the registers for these, an LDT in LDTR, a TSS in TR."""
    values = {name: case[f"{name} attributes"] | _SEGMENT for name in _DATA_SEGMENTS}
    values["CS"] = case["CS attributes"] & ~0x1F | _SEGMENT | _CODE
    values["LDTR"] = case["LDTR attributes"] & ~0x1F | _LDT
    values["TR"] = case["TR attributes"] & ~0x1F | _TSS
    return _set(case, **{f"{name}_attributes": value for name, value in values.items()})


_VM_IN_LONG_MODE: Final = Reading[Case](
    "vm-in-long-mode",
    "vtx",
    RFLAGS,
    lambda case: _set(case, RFLAGS=case["RFLAGS"] & ~Rflags.VM) if case.long_mode else _NOTHING,
    by_us=True,
)
_VM_IN_REAL_MODE: Final = Reading[Case](
    "vm-in-real-mode",
    "both",
    RFLAGS,
    lambda case: _set(case, RFLAGS=case["RFLAGS"] & ~Rflags.VM) if case.real else _NOTHING,
    by_us=True,
)
_COMMON: Final = (
    Reading[Case](
        "implicit-access",
        "vtx",
        apm("Page Translation and Protection", "Page-Protection Checks"),
        lambda case: _set(case, CR4=case["CR4"] & ~Cr4.SMAP) if case["RFLAGS"] & Rflags.AC else _NOTHING,
    ),
    Reading[Case]("efer-ffxsr", "both", CHECKS, lambda case: _set(case, EFER=case["EFER"] & ~_FFXSR)),
    Reading[Case]("lmsw", "vtx", _INTERCEPTS, _if_runs(("LMSW",), _without(Exit.CR0_SEL_WRITE))),
    Reading[Case](
        "write-traps",
        "both",
        _TRAPS,
        _without(Exit.EFER_WRITE_TRAP, *range(Exit.CR0_WRITE_TRAP, Exit.CR0_WRITE_TRAP + 16)),
    ),
    Reading[Case]("table-limits", "vtx", LAYOUT, _canonical_limits, by_us=True),
    _VM_IN_LONG_MODE,
    _VM_IN_REAL_MODE,
)

OF_QEMU: Final[tuple[Reading[Case], ...]] = (
    Reading(
        "interrupt-shadow",
        "vtx",
        LAYOUT,
        lambda case: _set(case, interrupt_state=case["interrupt state"] & ~layouts.INTERRUPT_SHADOW),
    ),
    Reading("double-fault", "vtx", _EXCEPTIONS, _without(Exit.EXCEPTION_0 + Vector.DF)),
    Reading("missing-intercepts", "vtx", _INTERCEPTS, _if_runs(("RDTSCP",), _without(Exit.RDTSCP))),
    Reading("missing-intercepts", "vtx", _INTERCEPTS, _if_runs(("INVD",), _without(Exit.INVD))),
    Reading("missing-intercepts", "vtx", _INTERCEPTS, _if_runs(("INT ",), _without(Exit.SWINT))),
    Reading("missing-intercepts", "vtx", _INTERCEPTS, _if_runs(("INT3",), _without(Exit.EXCEPTION_0 + Vector.BP))),
    Reading("missing-intercepts", "vtx", _INTERCEPTS, _if_runs(("INTO",), _without(Exit.EXCEPTION_0 + Vector.OF))),
    Reading("vmload-always-exits", "vtx", VMLOAD, _always_exits),
    Reading("task-priority", "vtx", apm(SVM, "Injecting Virtual (INTR) Interrupts"), _equal_priority),
    Reading("event-error-code", "vtx", INJECTION, _error_code),
    Reading("privilege-level", "vtx", VMRUN, _level_of_stack),
    Reading("privilege-level", "vtx", VMRUN, _level_of_mode, by_us=True),
    Reading("general-detect", "vtx", _DEBUG, lambda case: _set(case, DR7=case["DR7"] & ~_GD)),
    Reading(
        "real-mode-stack",
        "vtx",
        _VECTORS,
        lambda case: _set(case, SS_attributes=case["SS attributes"] & ~_BIG) if case.real else _NOTHING,
    ),
    Reading("segment-checks", "vtx", apm(_SEGMENTATION, "Limit Checks"), _flat),
    Reading("monitor-access", "vtx", _INTERCEPTS, _if_runs(("MONITOR",), _address_of_data)),
    Reading("efer-lma", "vtx", VMRUN, _long_mode_active, by_us=True),
    Reading(
        "map-low-bits",
        "vtx",
        LAYOUT,
        lambda case: _set(
            case, IOPM_BASE_PA=case["IOPM_BASE_PA"] & ~0xFFF, MSRPM_BASE_PA=case["MSRPM_BASE_PA"] & ~0xFFF
        ),
        by_us=True,
    ),
    Reading(
        "msr-index",
        "vtx",
        _INTERCEPTS,
        _if_runs(
            ("RDMSR", "WRMSR"), lambda case: {scene.REGISTERS[Gpr.RCX]: case.fields[scene.REGISTERS[Gpr.RCX]] & MASK32}
        ),
        by_us=True,
    ),
    Reading(
        "virtual-vector",
        "vtx",
        LAYOUT,
        lambda case: _set(case, virtual_interrupt_control=case["virtual interrupt control"] & ~_BEYOND_VECTOR),
        by_us=True,
    ),
    Reading(
        "legacy-linear-addresses",
        "vtx",
        apm(_SEGMENTATION, "Segment-Protection Overview"),
        _low_bases,
        by_us=True,
    ),
    *_COMMON,
)

OF_BOCHS: Final[tuple[Reading[Case], ...]] = (
    Reading("cpl-bits", "vtx", LAYOUT, lambda case: _set(case, CPL=case["CPL"] & 3), by_us=True),
    Reading("rsm-intercept", "vtx", _INTERCEPTS, _if_runs(("RSM",), _without(Exit.RSM))),
    Reading("monitor-intercept", "vtx", _INTERCEPTS, _if_runs(("MONITOR",), _without(Exit.MONITOR))),
    Reading(
        "virtual-interrupt",
        "vtx",
        apm(SVM, "Injecting Virtual (INTR) Interrupts"),
        lambda case: _set(case, virtual_interrupt_control=case["virtual interrupt control"] & ~layouts.V_IRQ),
    ),
    Reading(
        "nested-paging-byte",
        "vtx",
        LAYOUT,
        lambda case: (
            _set(
                case,
                nested_paging_and_encryption_control=case["nested paging and encryption control"] | layouts.NP_ENABLE,
            )
            if case["nested paging and encryption control"] & 0xFF
            else _NOTHING
        ),
    ),
    Reading(
        "segments-of-virtual-8086-mode",
        "vtx",
        apm(_SEGMENTATION, "Segment-Protection Overview"),
        _as_in_virtual_8086_mode,
        by_us=True,
    ),
    Reading("absent-tss", "both", VMLOAD, lambda case: _set(case, TR_attributes=case["TR attributes"] | _PRESENT)),
    Reading("another-kind-of-segment", "vtx", CHECKS, _kinds_of_segments, by_us=True),
    Reading(
        "stack-segment",
        "both",
        CHECKS,
        lambda case: (
            _NOTHING
            if case.in_64_bit_mode or case["SS attributes"] & 0x1A == 0x12
            else _set(case, SS_limit=0, SS_attributes=case["SS attributes"] & ~0x1F | 0x13)
        ),
    ),
    Reading("msr-widths", "both", VMLOAD, _canonical_addresses),
    Reading(
        "l-and-d",
        "vtx",
        CHECKS,
        lambda case: _NOTHING if case.long_mode else _set(case, CS_attributes=case["CS attributes"] & ~_LONG),
        by_us=True,
    ),
    Reading(
        "general-detect",
        "both",
        _DEBUG,
        _if_runs(
            ("MOV DR", "MOV ECX, DR"),
            lambda case: _without(*range(Exit.DR0_READ, Exit.DR0_WRITE + 16))(case) if case["DR7"] & _GD else _NOTHING,
        ),
    ),
    *_COMMON,
)
