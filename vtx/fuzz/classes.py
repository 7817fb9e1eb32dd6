"""Sorting disagreements into the classes that explain them, each with who is right, and where the manual says so.

A class is as narrow as the behaviour it is about: a disagreement belongs to it only if that behaviour can explain it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from attrs import define, field, frozen

from vmcs.refs import Reference
from vtx.fuzz.compare import Disagreement

K = TypeVar("K")


@frozen(eq=False)
class Known(Generic[K]):
    """A class: ``id``, who is right (``vtx``, the other, or ``both``), the section that says so, and its members.

    ``explains`` names what of a disagreement it explains, nothing for one that does not belong to it. ``overlooked``
    are rules that the other one does not check, or not at their stage.
    """

    id: str
    verdict: str
    ref: Reference | None
    explains: Callable[[K], Collection[str]]
    overlooked: tuple[str, ...] = ()


class Class(Protocol):
    """Any kind of class."""

    @property
    def id(self) -> str:
        """What it is called; several may share a name, where a difference shows in several ways."""
        ...

    @property
    def verdict(self) -> str:
        """Who is right."""
        ...


@define
class Sorted:
    """Disagreements by the classes that explain them, and those that none does."""

    explained: dict[Class, list[Disagreement[Any]]] = field(factory=dict)
    unexplained: list[Disagreement[Any]] = field(factory=list)

    def counts(self) -> dict[tuple[str, str], int]:
        """How many disagreements the classes of a name and a verdict explain, in the order in which they were met.

        Several classes of one name may explain the same one; equal ones, of a state drawn twice, are two.
        """
        found: dict[tuple[str, str], set[int]] = {}
        for each, explained in self.explained.items():
            found.setdefault((each.id, each.verdict), set()).update(id(one) for one in explained)
        return {name: len(those) for name, those in found.items()}


def sort(
    known: Sequence[Known[K]], case_of: Callable[[Disagreement[Any]], K], found: Iterable[Disagreement[Any]]
) -> Sorted:
    """Find the classes of each disagreement among ``known``; ``case_of`` gives what these look at."""
    outcome = Sorted()
    for each in found:
        classes = explanation(known, case_of(each), each.differing)
        if not classes:
            outcome.unexplained.append(each)
        for one in classes:
            outcome.explained.setdefault(one, []).append(each)
    return outcome


def explanation(known: Sequence[Known[K]], case: K, differing: frozenset[str]) -> tuple[Known[K], ...]:
    """The first classes that together explain all that differs; none if something is left."""
    left, found = differing, []
    for each in known:
        explained = left.intersection(each.explains(case))
        if explained:
            found.append(each)
            left -= explained
        if not left:
            return tuple(found)
    return ()
