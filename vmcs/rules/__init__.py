"""The rules of VM entry: run in order by the processor, all at once by the explainer, one by one by everybody else.

`check` is what VMLAUNCH and VMRESUME do: stop at the first violation. `explain` finds all of them. A repeated entry
names the bits that changed since the last successful check, and only rules that read one of them are evaluated, plus
the few that look at memory or at the processor.

Spec: SDM Vol. 3, "VM Entries".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Final

from vmcs.rules import basic, controls, guest, guest_non_register, guest_segments, host
from vmcs.rules.model import (
    EntryContext,
    EntryFails,
    FailInvalid,
    FailValid,
    Outcome,
    Rule,
    Stage,
    Test,
    Violation,
    violation_of,
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

# Neighbouring rules with the same condition are a group: (condition, ((holds, rule), ...)).
_Groups = tuple[tuple[Test | None, tuple[tuple[Test, Rule], ...]], ...]


def _group(rules: Iterable[Rule]) -> _Groups:
    groups = groupby(rules, key=lambda rule: rule.when)
    return tuple((when.test, tuple((rule.demand.holds, rule) for rule in group)) for when, group in groups)


class RuleSet:
    """Rules in the order of evaluation, with an index from bits of fields to the rules that read them."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self.rules = rules
        self._all = _group(rules)
        self._volatile = 0  # sets of rules are integers: bit n stands for rule n
        self._selected: dict[int, _Groups] = {}
        readers: dict[int, dict[int, int]] = {}
        for number, rule in enumerate(rules):
            self._volatile |= rule.volatile << number
            for field, bits in rule.reads:
                by_bits = readers.setdefault(field.encoding, {})
                by_bits[bits] = by_bits.get(bits, 0) | 1 << number
        self._readers = {encoding: tuple(by_bits.items()) for encoding, by_bits in readers.items()}

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def without(self, rule_id: str) -> RuleSet:
        """The set with one rule switched off; KeyError if it has no such rule."""
        rest = tuple(rule for rule in self.rules if rule.id != rule_id)
        if len(rest) == len(self.rules):
            raise KeyError(rule_id)
        return RuleSet(rest)

    def affected_by(self, changed: Mapping[int, int]) -> tuple[Rule, ...]:
        """The rules to evaluate when these bits of these encodings changed, volatile rules included."""
        return tuple(rule for _, group in self._select(changed) for _, rule in group)

    def _select(self, changed: Mapping[int, int]) -> _Groups:
        numbers = self._volatile
        readers = self._readers
        for encoding, bits in changed.items():
            for read, rules in readers.get(encoding, ()):
                if read & bits:
                    numbers |= rules
        selected = self._selected.get(numbers)
        if selected is None:
            selected = _group(self._members(numbers))
            if len(self._selected) < 1024:  # a guest cannot make this grow without bound
                self._selected[numbers] = selected
        return selected

    def _members(self, numbers: int) -> Iterator[Rule]:
        """The rules of a set, in order."""
        while numbers:
            lowest = numbers & -numbers
            yield self.rules[lowest.bit_length() - 1]
            numbers ^= lowest

    def check(self, context: EntryContext, changed: Mapping[int, int] | None = None) -> Violation | None:
        """The first violation, or None.

        ``changed`` maps encodings to the bits that may have changed since all rules of this set last held for this
        VMCS in this context (`vmcs.region.Vmcs.changed`); None evaluates every rule.
        """
        for applies, group in self._all if changed is None else self._select(changed):
            if applies is None or applies(context):
                for holds, rule in group:
                    if not holds(context):
                        return violation_of(rule, context)
        return None

    def explain(self, context: EntryContext) -> list[Violation]:
        """Every violation, in order."""
        return [violation_of(rule, context) for rule in self.rules if not rule.holds(context)]


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
    """Change the VMCS until controls, host state and guest state pass, and give the rules that had to be repaired.

    Repairing one rule may break another, so the rules are gone over again, up to ``rounds`` times; ValueError if that
    was not enough. What passes already stays as it is.
    """
    repaired: dict[str, Rule] = {}
    for _ in range(rounds):
        broken = [rule for rule in CONSISTENCY.rules if not rule.holds(context)]
        if not broken:
            return list(repaired.values())
        for rule in broken:
            rule.repair(context)
            repaired[rule.id] = rule
    raise ValueError("still violated: " + ", ".join(violation.rule.id for violation in CONSISTENCY.explain(context)))
