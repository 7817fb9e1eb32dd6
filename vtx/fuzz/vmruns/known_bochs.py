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
    HIGH_HALVES,
    INJECTION,
    MAPS_NOT_IN_USE,
    MSR_WIDTHS,
    NO_MEMORY,
    NO_REPETITION,
    RESERVED_CR0,
    RESERVED_FLAGS,
    RF,
    SVM,
    TABLE_LIMITS,
    UNOBSERVED_ATTRIBUTES,
    VMLOAD,
    VMRUN,
    WITHIN_TABLE_LIMITS,
)
from vtx.x86.outcome import Vector
from vtx.x86.state import Rflags

_EXIT: Final = apm(SVM, "#VMEXIT")
_EXCEPTIONS: Final = apm(SVM, "Exception Intercepts")
_BS: Final = 1 << 14


def _virtual_interrupt(case: Case) -> bool:
    """A virtual interrupt is due; Bochs has one only when something else makes it look."""
    return bool(case["virtual interrupt control"] & layouts.V_IRQ and case["RFLAGS"] & Rflags.IF)


def _without_next_rip(case: Case) -> bool:
    code = BY_NUMBER.get(case.ours.code)
    return code is None or not code.saves_next_rip


def _injected_type(case: Case) -> int | None:
    word = case["EVENTINJ"]
    return word >> layouts.EVENT_TYPE_SHIFT & 7 if word & layouts.EVENT_VALID else None


def _pushed_rip(case: Case) -> Collection[str]:
    """The return address of a software interrupt that is injected: nRIP here, RIP there."""
    if _injected_type(case) not in (layouts.InjectedType.SOFTWARE_INTERRUPT, layouts.InjectedType.EXCEPTION):
        return ()
    return case.where(case.memory, lambda ours, theirs: True)


OF_BOCHS: Final[tuple[Known[Case], ...]] = (
    overlooks("cr3-reserved", CHECKS, "vmrun.cr3-reserved"),
    in_fields("cr2", "vtx", VMRUN, ("CR2",), lambda ours, theirs: True),
    in_fields("next-rip", "vtx", _EXIT, ("nRIP",), lambda ours, theirs: not ours, _without_next_rip),
    TABLE_LIMITS,
    HIGH_HALVES,
    MSR_WIDTHS,
    RESERVED_FLAGS,
    RESERVED_CR0,
    UNOBSERVED_ATTRIBUTES,
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
        lambda ours, theirs: ours ^ theirs == _BS,
        lambda case: case.ours.code == Exit.EXCEPTION_0 + Vector.DB,
    ),
    in_fields("resume-flag-of-a-double-fault", "vtx", _EXIT, ("RFLAGS",), lambda ours, theirs: ours ^ theirs == RF),
    all_of_it("virtual-interrupt", "vtx", apm(SVM, "Injecting Virtual (INTR) Interrupts"), _virtual_interrupt),
    all_of_it("vmload-moves-the-block", "vtx", VMLOAD, lambda case: case.runs("VMLOAD", "VMSAVE")),
    all_of_it(
        "sysenter-in-long-mode",
        "vtx",
        apm("System Instruction Reference", "SYSENTER"),
        lambda case: case.runs("SYSENTER") and case.long_mode,
    ),
    NO_REPETITION,
    MAPS_NOT_IN_USE,
    WITHIN_TABLE_LIMITS,
    NO_MEMORY,
)
