"""Functional coverage: declared bins, what was hit, and what must not happen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping


class UndeclaredBin(AssertionError):  # noqa: N818 - the finding of a check, not an error of the program
    """Something happened that the coverage model says cannot happen."""


class Coverage:
    """Hits per bin in named groups; the goal is every declared bin.

    ``groups`` maps a group's name to the bins that can happen. Sampling anything else raises `UndeclaredBin`, so the
    table of bins is a check of its own.
    """

    def __init__(self, groups: Mapping[str, frozenset[Hashable]]) -> None:
        self.groups = groups
        self.hits: dict[str, Counter[Hashable]] = {name: Counter() for name in groups}

    def sample(self, group: str, happened: Hashable) -> None:
        """Count ``happened`` in ``group``."""
        if happened not in self.groups[group]:
            raise UndeclaredBin(f"{group}: {happened} is not a declared bin")
        self.hits[group][happened] += 1

    @property
    def goal(self) -> int:
        """Number of declared bins."""
        return sum(len(bins) for bins in self.groups.values())

    @property
    def covered(self) -> int:
        """Number of bins hit at least once."""
        return sum(len(hits) for hits in self.hits.values())

    def missing(self) -> list[str]:
        """The bins never hit, as text, sorted."""
        return sorted(f"{name}: {bin_}" for name, bins in self.groups.items() for bin_ in bins - set(self.hits[name]))
