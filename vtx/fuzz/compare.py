"""The same states on both, and what differs: reduced to the changes that matter, and sorted into classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Final

from attrs import frozen

from vmcs.fields import BY_ENCODING
from vtx.fuzz.exchange import NO_ANSWER, Report, Result, module, parse
from vtx.fuzz.states import Generator, State

Runner = Callable[[bytes], str]

BATCH: Final = 8_000
_MOST_BYTES: Final = 3 << 20


@frozen
class Disagreement:
    """A state that ended in two ways; ``rules`` are the ids of all rules that it breaks in this model."""

    state: State
    ours: Result
    theirs: Result
    rules: tuple[str, ...]

    def __str__(self) -> str:
        rules = f"\n  breaks {', '.join(self.rules)}" if self.rules else ""
        return f"{self.state}\n  vtx   {self.ours}\n  other {self.theirs}{rules}"


def run(generator: Generator, states: Sequence[State], runner: Runner) -> tuple[dict[int, Result], Report]:
    """Results by position in ``states``, with the first report.

    A state after which nothing more is heard of the harness has the result `NO_ANSWER`; the rest is run without it.
    """
    results: dict[int, Result] = {}
    first: Report | None = None
    done = 0
    while done < len(states) or first is None:
        batch = list(_fitting(states[done:]))
        report = parse(runner(module(generator.memory, generator.bases, batch, done)))
        first = first or report
        results.update(report.results)
        done += len(report.results)
        if not report.complete:
            if not report.processor:
                raise RuntimeError(f"the harness does not start: {report.complaint or 'it prints nothing'}")
            results[done] = NO_ANSWER
            done += 1
    return results, first


def _fitting(states: Iterable[State]) -> Iterator[State]:
    size = 0
    for state in islice(states, BATCH):
        size += 16 * (len(state.deltas) + 1)
        if size > _MOST_BYTES:
            return
        yield state


def compare(generator: Generator, states: Sequence[State], ours: Runner, theirs: Runner) -> list[Disagreement]:
    """Where two runners disagree."""
    our_results, _ = run(generator, states, ours)
    their_results, _ = run(generator, states, theirs)
    return [
        Disagreement(state, our_results[number], their_results[number], _broken(generator, state))
        for number, state in enumerate(states)
        if our_results[number] != their_results[number]
    ]


def _broken(generator: Generator, state: State) -> tuple[str, ...]:
    return tuple(violation.rule.id for violation in generator.violations(state))


def reduce(
    generator: Generator, found: Sequence[Disagreement], ours: Runner, theirs: Runner, rounds: int = 12
) -> list[Disagreement]:
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
        still = compare(generator, [state for _, state in attempts], ours, theirs) if attempts else []
        by_state = {each.state: each for each in still}
        progress: dict[int, Disagreement] = {}
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


def _shorter(deltas: tuple[tuple[int, int], ...]) -> Iterator[tuple[tuple[int, int], ...]]:
    for position in range(len(deltas)):
        yield deltas[:position] + deltas[position + 1 :]


def _alike(one: Disagreement, other: Disagreement) -> bool:
    return (one.ours.name, one.theirs.name) == (other.ours.name, other.theirs.name)


def by_class(found: Iterable[Disagreement]) -> Mapping[tuple[str, str, str], list[Disagreement]]:
    """Disagreements by what both said, and the rule or the fields that it is about."""
    classes: dict[tuple[str, str, str], list[Disagreement]] = {}
    for each in found:
        about = each.rules[0] if each.rules else ", ".join(BY_ENCODING[code].name for code, _ in each.state.deltas)
        classes.setdefault((each.ours.name, each.theirs.name, about), []).append(each)
    return classes
