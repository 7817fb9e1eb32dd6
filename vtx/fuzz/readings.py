"""Classes that an experiment decides: one of the two takes a state for another one, and is right or wrong in that.

That a processor overlooks an intercept, say, is shown by the same state without the intercept: it must end here as the
first one ended there, in everything that is compared. So such a class hides nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, Generic, TypeVar

from attrs import define, evolve, field, frozen

from vmcs.refs import Reference
from vtx.fuzz.classes import Class, Known, Sorted, explanation, sort
from vtx.fuzz.compare import Disagreement, Experiment, Outcome, Runner, disagreement, run
from vtx.fuzz.drawing import State

K = TypeVar("K")
R = TypeVar("R", bound=Outcome)


@frozen(eq=False)
class Reading(Generic[K]):
    """A class: ``changes`` are what is other in the state that this one is taken for, nothing if it is no member.

    Taken by the other one: it ends on this state as we do on the changed one. Taken ``by_us``: we end alike on both,
    and on the changed one the other ends like us. What other classes explain may differ.
    """

    id: str
    verdict: str
    ref: Reference | None
    changes: Callable[[K], Mapping[Any, int]]
    by_us: bool = False


@frozen(eq=False)
class Classes(Generic[K]):
    """All classes of differences from one oracle."""

    known: Sequence[Known[K]]
    readings: Sequence[Reading[K]] = ()


@frozen
class Attempt:
    """``readings`` of a disagreement together: ``ours`` is what we are to take its state for, ``theirs`` the other."""

    readings: tuple[Reading[Any], ...]
    ours: State
    theirs: State


@define
class _Results(Generic[R]):
    """Results by state, of one of the two; each state runs once."""

    experiment: Experiment[Any]
    runner: Runner
    by_state: dict[State, R] = field(factory=dict)

    def get(self, states: Iterator[State]) -> None:
        wanted = [state for state in dict.fromkeys(states) if state not in self.by_state]
        results, _ = run(self.experiment, wanted, self.runner) if wanted else ({}, None)
        self.by_state.update((state, results[number]) for number, state in enumerate(wanted))


def explain(
    experiment: Experiment[R],
    classes: Classes[K],
    case_of: Callable[[Disagreement[Any]], K],
    found: Sequence[Disagreement[R]],
    ours: Runner,
    theirs: Runner,
) -> Sorted:
    """Find the classes of each disagreement; with ``ours`` and ``theirs`` run what the experiments are about."""
    outcome = sort(classes.known, case_of, found)
    resolve(experiment, classes, case_of, outcome, ours, theirs)
    return outcome


def resolve(
    experiment: Experiment[Any],
    classes: Classes[K],
    case_of: Callable[[Disagreement[Any]], K],
    outcome: Sorted,
    ours: Runner,
    theirs: Runner,
) -> None:
    """Move what readings explain from the unexplained of ``outcome`` to the explained."""
    here: _Results[Any] = _Results(experiment, ours, {found.state: found.ours for found in outcome.unexplained})
    there: _Results[Any] = _Results(experiment, theirs, {found.state: found.theirs for found in outcome.unexplained})

    def changes(reading: Reading[K], found: Disagreement[Any]) -> Mapping[Any, int]:
        return reading.changes(case_of(found))

    for together in (_one_by_one, _all, _pairs):
        attempts = []
        for found in outcome.unexplained:
            applicable = [each for each in classes.readings if changes(each, found)]
            sets = together(sorted(applicable, key=lambda each: not each.by_us))
            attempts.append((found, list(_attempts(experiment, changes, sets, found))))
        here.get(state for _, each in attempts for attempt in each for state in (attempt.ours, attempt.theirs))
        there.get(attempt.ours for _, each in attempts for attempt in each)
        outcome.unexplained.clear()
        for found, each in attempts:
            for attempt in each:
                known = _explained(experiment, classes, case_of, found, attempt, here.by_state, there.by_state)
                if known is not None:
                    classes_of_it: tuple[Class, ...] = (*attempt.readings, *known)
                    for one in classes_of_it:
                        outcome.explained.setdefault(one, []).append(found)
                    break
            else:
                outcome.unexplained.append(found)


Readings = Sequence[Reading[Any]]


def _one_by_one(applicable: Readings) -> Sequence[Readings]:
    return [[each] for each in applicable]


def _all(applicable: Readings) -> Sequence[Readings]:
    return [applicable] if len(applicable) > 1 else []


def _pairs(applicable: Readings) -> Sequence[Readings]:
    return list(combinations(applicable, 2)) if len(applicable) > 2 else []


def _attempts(
    experiment: Experiment[Any],
    changes: Callable[[Reading[Any], Disagreement[Any]], Mapping[Any, int]],
    sets: Sequence[Readings],
    found: Disagreement[Any],
) -> Iterator[Attempt]:
    """Each of ``sets`` of readings, one after the other, ours first, for a disagreement."""
    generator = experiment.generator
    for chosen in sets:
        ours = theirs = found.state
        for reading in chosen:
            theirs = generator.changed(theirs, changes(reading, evolve(found, state=theirs)))
            if reading.by_us:
                ours = theirs
        if generator.may_be_tried(ours) and generator.may_be_tried(theirs):
            yield Attempt(tuple(chosen), ours, theirs)


def _explained(
    experiment: Experiment[Any],
    classes: Classes[K],
    case_of: Callable[[Disagreement[Any]], K],
    found: Disagreement[Any],
    attempt: Attempt,
    here: Mapping[State, Any],
    there: Mapping[State, Any],
) -> tuple[Known[K], ...] | None:
    """The other classes that explain, together with the readings of ``attempt``, all that differs; None if they do not.

    What we take the state for must be the same to us; and on that one, the other ends as we do on what it takes it for.
    """
    ours, theirs = here[attempt.theirs], there[attempt.ours]
    if experiment.differences(found.state, here[attempt.ours], found.ours, of=attempt.ours):
        return None
    differing = experiment.differences(attempt.ours, ours, theirs, of=attempt.theirs)
    if not differing:
        return ()
    for state in (attempt.theirs, attempt.ours):
        left = disagreement(experiment.generator, state, ours, theirs, differing)
        if known := explanation(classes.known, case_of(left), differing):
            return known
    return None
