"""Basic VM-entry checks: is there a VMCS to enter with, and is it in the right launch state.

Privilege, mode and VMX operation come before these and cause faults; they are the instruction's concern.

Spec: SDM Vol. 3, "VM Entries", "Basic VM-Entry Checks".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vmcs.exits import InstructionError
from vmcs.refs import sdm
from vmcs.region import LaunchState
from vmcs.rules.model import Condition, Demand, EntryContext, FailInvalid, FailValid, Outcome, Rule, Test
from vmcs.rules.shapes import context_is

_REF = sdm("VM Entries", "Basic VM-Entry Checks")


def _demand(holds: Test, repair: Callable[[EntryContext], None]) -> Demand:
    return Demand((), holds, repair, volatile=True)


def _rule(name: str, sentence: str, demand: Demand, outcome: Outcome, when: Condition) -> Rule:
    return Rule(f"basic.{name}", sentence, demand, _REF, outcome, when)


def _make_current(context: EntryContext) -> None:
    context.vmcs_current = True


def _make_ordinary(context: EntryContext) -> None:
    context.vmcs.shadow = False


def _lift_blocking(context: EntryContext) -> None:
    context.blocked_by_mov_ss = False


def _make_clear(context: EntryContext) -> None:
    context.vmcs.launch_state = LaunchState.CLEAR


def _make_launched(context: EntryContext) -> None:
    context.vmcs.launch_state = LaunchState.LAUNCHED


_VMLAUNCH = context_is("the instruction is VMLAUNCH", lambda context: context.launching)
_VMRESUME = context_is("the instruction is VMRESUME", lambda context: not context.launching)

# The order is architectural: a missing VMCS hides blocking by MOV SS, which hides the launch state.
RULES: Final[tuple[Rule, ...]] = (
    _rule(
        "current-vmcs",
        "there is a current VMCS",
        _demand(lambda context: context.vmcs_current, _make_current),
        FailInvalid(),
        Condition(),
    ),
    _rule(
        "ordinary-vmcs",
        "the current VMCS is an ordinary VMCS, not a shadow VMCS",
        _demand(lambda context: not context.vmcs.shadow, _make_ordinary),
        FailInvalid(),
        Condition(),
    ),
    _rule(
        "mov-ss-blocking",
        "events are not blocked by MOV SS",
        _demand(lambda context: not context.blocked_by_mov_ss, _lift_blocking),
        FailValid(InstructionError.VM_ENTRY_WITH_EVENTS_BLOCKED_BY_MOV_SS),
        Condition(),
    ),
    _rule(
        "launch-needs-clear",
        "the launch state of the VMCS is clear",
        _demand(lambda context: context.vmcs.launch_state is LaunchState.CLEAR, _make_clear),
        FailValid(InstructionError.VMLAUNCH_WITH_NON_CLEAR_VMCS),
        _VMLAUNCH,
    ),
    _rule(
        "resume-needs-launched",
        "the launch state of the VMCS is launched",
        _demand(lambda context: context.vmcs.launch_state is LaunchState.LAUNCHED, _make_launched),
        FailValid(InstructionError.VMRESUME_WITH_NON_LAUNCHED_VMCS),
        _VMRESUME,
    ),
)
