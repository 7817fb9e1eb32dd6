"""The machinery of checks: what a rule about a control structure is, how rules are run, what a violation says.

A rule is a record: an id that never changes, a sentence, a citation, the condition under which it applies, the demand
it makes, and what the processor does when the demand is not met. The rules of VM entry (`vmcs.rules`) and those of
VMRUN (`vmcs.vmcb.rules`) are such records: about fields of their own kind, judged in contexts of their own kind, with
outcomes of their own kind. A context has the values of all fields, by `CheckedField.encoding`, in ``values``.

Spec: SDM Vol. 3, "VM Entries"; APM Vol. 2, "Canonicalization and Consistency Checks".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, Final, Generic, Protocol, Self, TypeVar

from attrs import field, frozen

from vmcs.bits import describe_bits
from vmcs.refs import Reference


class CheckedField(Protocol):
    """What the machinery knows of a field."""

    @property
    def name(self) -> str:
        """The manual's name."""
        ...

    @property
    def encoding(self) -> int:
        """What finds its value among those of a context."""
        ...

    @property
    def mask(self) -> int:
        """All its bits."""
        ...

    def describe(self, value: int) -> str:
        """``value`` in words."""
        ...


F = TypeVar("F", bound=CheckedField)
C = TypeVar("C")
O = TypeVar("O")  # noqa: E741 - an outcome
R = TypeVar("R", bound="Check[Any, Any, Any]")


def _reads(items: Iterable[Any]) -> tuple[tuple[Any, int], ...]:
    """Which bits of which fields are read; a bare field stands for all its bits."""
    bits: dict[CheckedField, int] = {}
    for item in items:
        each, read = item if isinstance(item, tuple) else (item, item.mask)
        bits[each] = bits.get(each, 0) | read
    return tuple(bits.items())


@frozen(eq=False)
class Condition(Generic[F, C]):
    """When a rule applies. ``test`` is None for a condition that always holds; ``text`` follows the word "if"."""

    text: str = ""
    reads: tuple[tuple[F, int], ...] = field(default=(), converter=_reads)
    test: Callable[[C], bool] | None = None
    volatile: bool = False  # whether it reads more of the context than fields


@frozen(eq=False)
class Demand(Generic[F, C]):
    """What a rule demands of the fields it reads.

    ``faulty`` names the bits at fault when it does not hold. ``repair`` changes the control structure such that it
    does, or such that the rule no longer applies; what else that breaks is for the other rules to say. ``legal`` says
    what this processor accepts, where the rule's sentence leaves that open.
    """

    reads: tuple[tuple[F, int], ...] = field(converter=_reads)
    holds: Callable[[C], bool]
    repair: Callable[[C], None]
    faulty: Callable[[C], tuple[tuple[F, int], ...]] = lambda context: ()
    volatile: bool = False
    legal: Callable[[C], str] = lambda context: ""


ALWAYS: Final[Condition[Any, Any]] = Condition()


@frozen(eq=False)
class Check(Generic[F, C, O]):
    """One rule.

    ``id`` is stable, so that tests, coverage and users can refer to it. ``sentence`` states what must hold, in our
    words, without the condition.
    """

    id: str
    sentence: str
    demand: Demand[F, C] = field(repr=False)
    ref: Reference = field(repr=False)
    outcome: O = field(repr=False)
    when: Condition[F, C] = field(default=ALWAYS, repr=False)
    reads: tuple[tuple[F, int], ...] = field(init=False, repr=False)
    """Every field the rule depends on, with the bits that matter; the condition's fields first."""

    @reads.default
    def _reads_of_both(self) -> tuple[tuple[F, int], ...]:
        return _reads(self.when.reads + self.demand.reads)

    @property
    def volatile(self) -> bool:
        """Whether the rule depends on more than fields: memory, or the state of the processor."""
        return self.when.volatile or self.demand.volatile

    def applies(self, context: C) -> bool:
        """Whether the rule has anything to say now."""
        return self.when.test is None or bool(self.when.test(context))

    def holds(self, context: C) -> bool:
        """Whether the demand is met, or need not be."""
        return not self.applies(context) or bool(self.demand.holds(context))

    def repair(self, context: C) -> None:
        """Change the control structure such that the rule holds; nothing happens if it does already."""
        if not self.holds(context):
            self.demand.repair(context)

    def statement(self) -> str:
        """The sentence with its condition."""
        return f"If {self.when.text}: {self.sentence}" if self.when.text else self.sentence


@frozen
class Violation(Generic[R, F]):
    """A rule that does not hold, with the values that broke it: (field, value, bits at fault), in reading order."""

    rule: R
    values: tuple[tuple[F, int, int], ...]

    @property
    def outcome(self) -> Any:
        """What the processor does about it."""
        return self.rule.outcome

    def render(self) -> str:
        """The message: rule and statement, outcome, every field read, and the citation, one per line."""
        lines = [f"{self.rule.id}: {self.rule.statement()}", f"  outcome: {self.outcome}"]
        for each, value, bits in self.values:
            at_fault = f" <- {describe_bits(bits)}" if bits else ""
            lines.append(f"  {each.name} = {each.describe(value)}{at_fault}")
        lines.append(f"  see {self.rule.ref}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.render()


def violation_of(rule: R, context: Any) -> Violation[R, Any]:
    """The violation of a rule known not to hold."""
    bits = dict(rule.demand.faulty(context))
    values = context.values
    return Violation(rule, tuple((each, values[each.encoding], bits.get(each, 0)) for each, _ in rule.reads))


# Neighbouring rules with the same condition are a group: (condition, ((holds, rule), ...)).
_Groups = tuple[tuple[Callable[[Any], bool] | None, tuple[tuple[Callable[[Any], bool], R], ...]], ...]


def _group(rules: Iterable[R]) -> _Groups[R]:
    groups = groupby(rules, key=lambda rule: rule.when)
    return tuple((when.test, tuple((rule.demand.holds, rule) for rule in group)) for when, group in groups)


class RuleSet(Generic[R, C, F]):
    """Rules in the order of evaluation, with an index from bits of fields to the rules that read them."""

    def __init__(self, rules: tuple[R, ...]) -> None:
        self.rules = rules
        self._all = _group(rules)
        self._volatile = 0  # sets of rules are integers: bit n stands for rule n
        self._selected: dict[int, _Groups[R]] = {}
        readers: dict[int, dict[int, int]] = {}
        for number, rule in enumerate(rules):
            self._volatile |= rule.volatile << number
            for each, bits in rule.reads:
                by_bits = readers.setdefault(each.encoding, {})
                by_bits[bits] = by_bits.get(bits, 0) | 1 << number
        self._readers = {encoding: tuple(by_bits.items()) for encoding, by_bits in readers.items()}

    def __iter__(self) -> Iterator[R]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def without(self, rule_id: str) -> Self:
        """The set with one rule switched off; KeyError if it has no such rule."""
        rest = tuple(rule for rule in self.rules if rule.id != rule_id)
        if len(rest) == len(self.rules):
            raise KeyError(rule_id)
        return type(self)(rest)

    def affected_by(self, changed: Mapping[int, int]) -> tuple[R, ...]:
        """The rules to evaluate when these bits of these encodings changed, volatile rules included."""
        return tuple(rule for _, group in self._select(changed) for _, rule in group)

    def _select(self, changed: Mapping[int, int]) -> _Groups[R]:
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

    def _members(self, numbers: int) -> Iterator[R]:
        """The rules of a set, in order."""
        while numbers:
            lowest = numbers & -numbers
            yield self.rules[lowest.bit_length() - 1]
            numbers ^= lowest

    def check(self, context: C, changed: Mapping[int, int] | None = None) -> Violation[R, F] | None:
        """The first violation, or None.

        ``changed`` maps encodings to the bits that may have changed since all rules of this set last held for this
        control structure in this context; None evaluates every rule.
        """
        for applies, group in self._all if changed is None else self._select(changed):
            if applies is None or applies(context):
                for holds, rule in group:
                    if not holds(context):
                        return violation_of(rule, context)
        return None

    def explain(self, context: C) -> list[Violation[R, F]]:
        """Every violation, in order."""
        return [violation_of(rule, context) for rule in self.rules if not rule.holds(context)]

    def repair(self, context: C, rounds: int = 16) -> list[R]:
        """Change the control structure until every rule holds, and give the rules that had to be repaired.

        Repairing one rule may break another, so the rules are gone over again, up to ``rounds`` times; ValueError if
        that was not enough. What passes already stays as it is.
        """
        repaired: dict[str, R] = {}
        for _ in range(rounds):
            broken = [rule for rule in self.rules if not rule.holds(context)]
            if not broken:
                return list(repaired.values())
            for rule in broken:
                rule.repair(context)
                repaired[rule.id] = rule
        raise ValueError("still violated: " + ", ".join(violation.rule.id for violation in self.explain(context)))
