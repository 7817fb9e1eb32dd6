"""The rules outside the three big stages, basic checks and MSR areas: each accepts, rejects, can be switched off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vmcs_baseline import FULL, Memory, context_of, long_mode_guest

from vmcs.exits import InstructionError
from vmcs.region import LaunchState
from vmcs.rules import RULES, EntryContext, FailInvalid, FailValid, Outcome, Stage, msr_load
from vmcs.rules.msr_load import Area, MsrEntry

BASIC = RULES[Stage.BASIC]


def launched(context: EntryContext) -> None:
    context.vmcs.launch_state = LaunchState.LAUNCHED


def resume(context: EntryContext) -> None:
    context.launching = False


def resume_launched(context: EntryContext) -> None:
    launched(context)
    resume(context)


def without_vmcs(context: EntryContext) -> None:
    context.vmcs_current = False


def shadow(context: EntryContext) -> None:
    context.vmcs.shadow = True


def after_mov_ss(context: EntryContext) -> None:
    context.blocked_by_mov_ss = True


def launch(context: EntryContext) -> None:
    """As the baseline has it: VMLAUNCH of a clear VMCS."""


Prepare = Callable[[EntryContext], None]

# Rule: what it accepts while it applies, what it rejects alone, and what software then sees.
BASIC_CASES: dict[str, tuple[Prepare, Prepare, Outcome]] = {
    "basic.current-vmcs": (launch, without_vmcs, FailInvalid()),
    "basic.ordinary-vmcs": (launch, shadow, FailInvalid()),
    "basic.mov-ss-blocking": (launch, after_mov_ss, FailValid(InstructionError(26))),
    "basic.launch-needs-clear": (launch, launched, FailValid(InstructionError(4))),
    "basic.resume-needs-launched": (resume_launched, resume, FailValid(InstructionError(5))),
}


def prepared(prepare: Prepare) -> EntryContext:
    context = context_of(long_mode_guest())
    prepare(context)
    return context


def test_basic_cases__cover_every_rule() -> None:
    assert set(BASIC_CASES) == {rule.id for rule in BASIC}


@pytest.mark.parametrize("rule_id", BASIC_CASES)
def test_basic_rule__accepts(rule_id: str) -> None:
    context = prepared(BASIC_CASES[rule_id][0])
    rule = next(rule for rule in BASIC if rule.id == rule_id)
    assert rule.applies(context)
    assert BASIC.explain(context) == []


@pytest.mark.parametrize("rule_id", BASIC_CASES)
def test_basic_rule__rejects_alone(rule_id: str) -> None:
    _, prepare, outcome = BASIC_CASES[rule_id]
    context = prepared(prepare)
    assert [(violation.rule.id, violation.outcome) for violation in BASIC.explain(context)] == [(rule_id, outcome)]
    assert BASIC.without(rule_id).check(context) is None


LOAD, STORE, EXIT_LOAD = Area.ENTRY_LOAD, Area.EXIT_STORE, Area.EXIT_LOAD


def entry(index: int = 0x10, *, number: int = 1, reserved: int = 0, value: int = 0) -> MsrEntry:
    return MsrEntry(number, 0x7000, index, reserved, value)


Msr = tuple[Area, MsrEntry]

# Rule: entries it accepts, entries it rejects alone. The recommended maximum of the processor is 512 entries.
MSR_CASES: dict[str, tuple[tuple[Msr, ...], tuple[Msr, ...]]] = {
    "msr-load.recommended-maximum": (
        ((LOAD, entry(number=512)),),
        ((LOAD, entry(number=513)), (STORE, entry(number=513)), (EXIT_LOAD, entry(number=0xFFFF_FFFF))),
    ),
    "msr-load.reserved": (
        ((LOAD, entry()),),
        ((LOAD, entry(reserved=1)), (STORE, entry(reserved=1 << 31)), (EXIT_LOAD, entry(reserved=2))),
    ),
    "msr-load.segment-base": (
        ((LOAD, entry(0xC000_0102)), (STORE, entry(0xC000_0100))),
        ((LOAD, entry(0xC000_0100)), (LOAD, entry(0xC000_0101)), (EXIT_LOAD, entry(0xC000_0100))),
    ),
    "msr-load.x2apic": (
        ((LOAD, entry(0x7FF)), (LOAD, entry(0x900))),
        ((LOAD, entry(0x800)), (STORE, entry(0x8FF)), (EXIT_LOAD, entry(0x808))),
    ),
    "msr-load.smm-only": (((STORE, entry(0x9B)),), ((LOAD, entry(0x9B)), (EXIT_LOAD, entry(0x9B)))),
    "msr-store.smm-only": (((LOAD, entry(0x9E)),), ((STORE, entry(0x9E)),)),
    "msr-load.microcode": (
        ((STORE, entry(0x8B)),),
        ((LOAD, entry(0x79)), (LOAD, entry(0x8B)), (EXIT_LOAD, entry(0x79))),
    ),
    "msr-load.wrmsr": (
        ((LOAD, entry(0x277, value=6)), (STORE, entry(0x277, value=2))),
        ((LOAD, entry(0x277, value=2)), (EXIT_LOAD, entry(0x277, value=2))),
    ),
}


def msr_context(**more: Any) -> EntryContext:
    return context_of(
        long_mode_guest(FULL),
        read_physical=Memory().read,
        wrmsr_faults=lambda index, value: (index, value) == (0x277, 2),
        **more,
    )


def test_msr_cases__cover_every_rule() -> None:
    assert set(MSR_CASES) == {rule.id for rule in msr_load.RULES}


@pytest.mark.parametrize("rule_id", MSR_CASES)
def test_msr_rule__accepts(rule_id: str) -> None:
    for area, accepted in MSR_CASES[rule_id][0]:
        assert msr_load.violation(msr_context(), accepted, area) is None


@pytest.mark.parametrize("rule_id", MSR_CASES)
def test_msr_rule__rejects_alone(rule_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context = msr_context()
    rejected = MSR_CASES[rule_id][1]
    for area, each in rejected:
        violation = msr_load.violation(context, each, area)
        assert violation is not None
        assert violation.rule.id == rule_id
    monkeypatch.setattr(msr_load, "RULES", tuple(rule for rule in msr_load.RULES if rule.id != rule_id))
    for area, each in rejected:
        assert msr_load.violation(context, each, area) is None


@pytest.mark.parametrize(("area", "index"), [(LOAD, 0x9B), (EXIT_LOAD, 0x9B), (STORE, 0x9E)])
def test_msr_rules__of_smm_do_not_hold_inside_it(area: Area, index: int) -> None:
    assert msr_load.violation(msr_context(in_smm=True), entry(index), area) is None
