"""Failing VM entries and VMX instructions of one run: explained as they happen, and counted.

Hypervisors probe, and tests fail on purpose: an explanation is given once, some of one kind are enough, and a guest
that fails for ever costs no more than counting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vmcs.explanation import Explanation

_SHOWN_PER_RULE: Final = 3
_LOOKED_AT_PER_RULE: Final = 64


class Failures:
    """What failed, by the rule that was broken; ``show`` gets each explanation that is worth showing.

    ``counts`` are the failures by rule, ``explanations`` the different ones among the first failures of each rule.
    """

    def __init__(self, show: Callable[[str], None] | None = None) -> None:
        self._show = show
        self.counts: Counter[str] = Counter()
        self.explanations: dict[str, list[Explanation]] = {}

    def take(self, rule: str, explain: Callable[[], Explanation]) -> None:
        """Something broke ``rule``; ``explain`` tells the details."""
        self.counts[rule] += 1
        shown = self.explanations.setdefault(rule, [])
        if len(shown) == _SHOWN_PER_RULE or self.counts[rule] > _LOOKED_AT_PER_RULE:
            return
        explanation = explain()
        if explanation not in shown:
            shown.append(explanation)
            if self._show is not None:
                self._show(explanation.render())

    def to_json(self) -> list[dict[str, object]]:
        """One object a rule: its id, how often it was broken, and the explanations."""
        return [
            {"id": rule, "count": count, "explanations": [each.to_json() for each in self.explanations[rule]]}
            for rule, count in self.counts.items()
        ]
