"""The same states on two processors, and what differs: reduced to the changes that matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, Generic, Protocol, TypeVar

from attrs import frozen

from vtx.fuzz.drawing import Deltas, Generator, State
from vtx.fuzz.exchange import Format, Report, parse, size_of


class Outcome(Protocol):
    """How a state ended."""

    @property
    def name(self) -> str:
        """In few words."""
        ...


R = TypeVar("R", bound=Outcome)
R_contra = TypeVar("R_contra", bound=Outcome, contravariant=True)

Runner = Callable[[bytes], str]

BATCH: Final = 8_000
_MOST_BYTES: Final = 3 << 20


class Differences(Protocol[R_contra]):
    """Names what differs in two results of ``state``.

    If ours is ``of`` another state, what neither run has touched does not differ.
    """

    def __call__(self, state: State, ours: R_contra, theirs: R_contra, *, of: State | None = None) -> frozenset[str]:
        """The names."""
        ...


@frozen
class Experiment(Generic[R]):
    """What is compared: states of ``generator``, given to a guest in ``format``; ``result_of`` reads its lines.

    ``no_answer`` is the result of a state after which the guest is not heard of again.
    """

    generator: Generator[Any]
    format: Format
    result_of: Callable[[str, list[int]], R]
    no_answer: R
    differences: Differences[R]

    def module(self, states: Sequence[State], first: int = 0) -> bytes:
        """What the guest is given for ``states``, of which the first has the number ``first``."""
        bases = [[(each.encoding, value) for each, value in base.items()] for base in self.generator.bases]
        return self.format.module(self.generator.memory, bases, states, first)

    def parse(self, text: str) -> Report[R]:
        """What the guest printed."""
        return parse(text, self.result_of)


@frozen
class Disagreement(Generic[R]):
    """A state, ``words`` in words, that ended in two ways; ``differing`` names what differs.

    ``rules`` are the ids of all rules that it breaks in this model.
    """

    state: State
    words: str
    ours: R
    theirs: R
    rules: tuple[str, ...]
    differing: frozenset[str]

    def __str__(self) -> str:
        rules = f"\n  breaks {', '.join(self.rules)}" if self.rules else ""
        return f"{self.words}\n  vtx   {self.ours}\n  other {self.theirs}{rules}"


def run(experiment: Experiment[R], states: Sequence[State], runner: Runner) -> tuple[dict[int, R], Report[R]]:
    """Results by position in ``states``, with the first report.

    A state after which nothing more is heard of the guest has no answer; the rest is run without it.
    """
    results: dict[int, R] = {}
    first: Report[R] | None = None
    done = 0
    while done < len(states) or first is None:
        batch = list(_fitting(states[done:]))
        report = experiment.parse(runner(experiment.module(batch, done)))
        first = first or report
        results.update(report.results)
        done += len(report.results)
        if not report.complete:
            if not report.processor:
                raise RuntimeError(f"the harness does not start: {report.complaint or 'it prints nothing'}")
            results[done] = experiment.no_answer
            done += 1
    return results, first


def _fitting(states: Iterable[State]) -> Iterator[State]:
    size = 0
    for state in islice(states, BATCH):
        size += size_of(state.deltas)
        if size > _MOST_BYTES:
            return
        yield state


def compare(experiment: Experiment[R], states: Sequence[State], ours: Runner, theirs: Runner) -> list[Disagreement[R]]:
    """Where two runners disagree."""
    our_results, _ = run(experiment, states, ours)
    their_results, _ = run(experiment, states, theirs)
    generator, found = experiment.generator, []
    for number, state in enumerate(states):
        one, other = our_results[number], their_results[number]
        if differing := experiment.differences(state, one, other):
            found.append(disagreement(generator, state, one, other, differing))
    return found


def disagreement(
    generator: Generator[Any], state: State, ours: R, theirs: R, differing: frozenset[str]
) -> Disagreement[R]:
    """What is known of ``state``, in two results of which ``differing`` differ."""
    rules = tuple(violation.rule.id for violation in generator.violations(state))
    return Disagreement(state, generator.describe(state), ours, theirs, rules, differing)


def reduce(
    experiment: Experiment[R], found: Sequence[Disagreement[R]], ours: Runner, theirs: Runner, rounds: int = 12
) -> list[Disagreement[R]]:
    """Each disagreement with as few changes as still give the same two kinds of result.

    Every round runs all states with one change less, all at once.
    """
    reduced = list(found)
    open_ones = set(range(len(found)))
    for _ in range(rounds):
        attempts = [
            (number, State(reduced[number].state.base, deltas))
            for number in sorted(open_ones)
            for deltas in _shorter(reduced[number].state.deltas)
        ]
        still = compare(experiment, [state for _, state in attempts], ours, theirs) if attempts else []
        by_state = {each.state: each for each in still}
        progress: dict[int, Disagreement[R]] = {}
        for number, state in attempts:
            shorter = by_state.get(state)
            if shorter and number not in progress and _alike(shorter, reduced[number]):
                progress[number] = shorter
        if not progress:
            break
        for number, shorter in progress.items():
            reduced[number] = shorter
        open_ones &= set(progress)
    return reduced


def _shorter(deltas: Deltas) -> Iterator[Deltas]:
    for position in range(len(deltas)):
        yield deltas[:position] + deltas[position + 1 :]


def _alike(one: Disagreement[R], other: Disagreement[R]) -> bool:
    return (one.ours.name, one.theirs.name) == (other.ours.name, other.theirs.name)
