"""The rules of VM entry: run in order by the processor, all at once by the explainer, one by one by everybody else.

`check` is what VMLAUNCH and VMRESUME do: stop at the first violation. `explain` finds all of them. A repeated entry
names the bits that changed since the last successful check, and only rules that read one of them are evaluated, plus
the few that look at memory or at the processor.

Spec: SDM Vol. 3, "VM Entries".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vmcs.rules import basic, controls, guest, guest_non_register, guest_segments, host
from vmcs.rules.model import (
    EntryContext,
    EntryFails,
    FailInvalid,
    FailValid,
    Outcome,
    Rule,
    RuleSet,
    Stage,
    Violation,
)

__all__ = [
    "ALL_RULES",
    "BY_ID",
    "CONSISTENCY",
    "RULES",
    "EntryContext",
    "EntryFails",
    "FailInvalid",
    "FailValid",
    "Outcome",
    "Rule",
    "RuleSet",
    "Stage",
    "Violation",
    "check",
    "check_consistency",
    "explain",
    "repair",
]

RULES: Final[dict[Stage, RuleSet]] = {
    Stage.BASIC: RuleSet(basic.RULES),
    Stage.CONTROLS: RuleSet(controls.RULES),
    Stage.HOST: RuleSet(host.RULES),
    Stage.GUEST: RuleSet((*guest.RULES, *guest_segments.RULES, *guest_non_register.RULES)),
}

# What VM entry checks once the basic checks have passed, as one set: the outcome of a violation tells the stages apart.
CONSISTENCY: Final = RuleSet(
    tuple(rule for stage in (Stage.CONTROLS, Stage.HOST, Stage.GUEST) for rule in RULES[stage].rules)
)

ALL_RULES: Final[tuple[Rule, ...]] = (*RULES[Stage.BASIC].rules, *CONSISTENCY.rules)
BY_ID: Final[dict[str, Rule]] = {rule.id: rule for rule in ALL_RULES}


def check(stage: Stage, context: EntryContext, changed: Mapping[int, int] | None = None) -> Violation | None:
    """The first violation of one stage; see `RuleSet.check`."""
    return RULES[stage].check(context, changed)


def check_consistency(context: EntryContext, changed: Mapping[int, int] | None = None) -> Violation | None:
    """The first violation of the checks on controls, host state and guest state, in this order."""
    return CONSISTENCY.check(context, changed)


def explain(context: EntryContext) -> list[Violation]:
    """Every violation of every stage but MSR loading, which has records of its own in `vmcs.rules.msr_load`."""
    return [violation for rules in RULES.values() for violation in rules.explain(context)]


def repair(context: EntryContext, rounds: int = 16) -> list[Rule]:
    """Change the VMCS until controls, host state and guest state pass; see `RuleSet.repair`."""
    return CONSISTENCY.repair(context, rounds)
