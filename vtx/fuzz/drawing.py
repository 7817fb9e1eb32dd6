"""Near-valid states: each a valid control structure with a few changes, seeded, the same for the same seed everywhere.

Most changes are small; what they may change and to what follows from tables of fields, values and rules. What is drawn
and would not come back to the harness is drawn again.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, Generic, Protocol, TypeVar

from attrs import define, frozen

from vmcs.bits import bit_numbers
from vmcs.checks import CheckedField, RuleSet, Violation

Deltas = tuple[tuple[int, int], ...]


@frozen
class State:
    """A control structure: the number of a valid one, its base, and (encoding, value) of what differs from that."""

    base: int
    deltas: Deltas


F = TypeVar("F", bound=CheckedField)


F_contra = TypeVar("F_contra", bound=CheckedField, contravariant=True)


class Structure(Protocol[F_contra]):
    """A control structure in the making."""

    def __getitem__(self, key: F_contra) -> int: ...

    def __setitem__(self, key: F_contra, value: int) -> None: ...


@define(eq=False)
class Generator(ABC, Generic[F]):
    """Makes states; ``seed`` decides all of them.

    ``bases`` are the fields of each valid structure, ``memory`` pages by physical address that the states point to.
    """

    seed: int
    bases: tuple[dict[F, int], ...]
    memory: Mapping[int, bytes]
    _random: random.Random
    _fields: tuple[F, ...]  # that may be changed

    names: ClassVar[Sequence[str]]
    """What the bases are called."""
    by_encoding: ClassVar[Mapping[int, Any]]
    rules: ClassVar[RuleSet[Any, Any, Any]]

    # What the kind of structure decides.

    @property
    @abstractmethod
    def structure(self) -> Structure[F]:
        """What is being changed."""

    @property
    @abstractmethod
    def context(self) -> Any:
        """What the rules look at: the structure and the processor."""

    @abstractmethod
    def methods(self) -> Sequence[Callable[[], None]]:
        """Ways of drawing; how often each comes up is how often it stands here."""

    @abstractmethod
    def values(self, each: F) -> Sequence[int]:
        """Values of a field that mean something, or are close to what does."""

    @abstractmethod
    def returns(self, state: State) -> bool:
        """Whether the harness can go on after ``state``, as far as the rules can tell."""

    def may_be_tried(self, state: State) -> bool:
        """The same of a state that was not drawn, but made of one that was."""
        return self.returns(state)

    @abstractmethod
    def sources(self, each: F) -> Sequence[F]:
        """Fields whose value is something to try in ``each``."""

    def prepare(self) -> None:
        """What is chosen for every state, before a way of drawing."""

    def make_applicable(self, rule: Any) -> None:
        """Change the structure such that ``rule`` has something to say, if that is easy."""

    # States.

    def __iter__(self) -> Iterator[State]:
        """The states, without end; the bases as they are come first."""
        yield from (State(number, ()) for number in range(len(self.bases)))
        while True:
            state = self._draw()
            if self.returns(state):
                yield state

    def fields(self, state: State) -> dict[F, int]:
        """Every field of a state."""
        return self.bases[state.base] | {self.by_encoding[encoding]: value for encoding, value in state.deltas}

    def changed(self, state: State, changes: Mapping[F, int]) -> State:
        """``state`` with other values in the fields that ``changes`` names."""
        base, fields = self.bases[state.base], self.fields(state) | dict(changes)
        return State(state.base, tuple((each.encoding, value) for each, value in fields.items() if base[each] != value))

    def describe(self, state: State) -> str:
        """A state in words."""
        changes = ", ".join(f"{self.by_encoding[encoding].name} = {value:#x}" for encoding, value in state.deltas)
        return f"{self.names[state.base]}: {changes or 'as it is'}"

    def violation(self, state: State) -> Violation[Any, F] | None:
        """The first rule that ``state`` breaks in this model; None if it enters."""
        self.load(state)
        return self.rules.check(self.context)

    def violations(self, state: State) -> list[Violation[Any, F]]:
        """Every rule that it breaks."""
        self.load(state)
        return self.rules.explain(self.context)

    def check_bases(self) -> None:
        """ValueError if a base is not valid on this processor."""
        for number, name in enumerate(self.names):
            if violation := self.violation(State(number, ())):
                raise ValueError(f"base {name!r}: {violation}")

    def load(self, state: State) -> None:
        """Make the structure that of ``state``."""
        structure = self.structure
        for each, value in self.bases[state.base].items():
            structure[each] = value
        for encoding, value in state.deltas:
            structure[self.by_encoding[encoding]] = value

    # Drawing.

    def _draw(self) -> State:
        base = self._random.randrange(len(self.bases))
        self.load(State(base, ()))
        self.prepare()
        self._random.choice(self.methods())()
        structure = self.structure
        changed = (
            (each.encoding, structure[each]) for each, value in self.bases[base].items() if structure[each] != value
        )
        return State(base, tuple(changed))

    def flip(self, each: F, mask: int = -1) -> None:
        """One bit of a field, among those of ``mask``."""
        self.structure[each] ^= 1 << self._random.choice(list(bit_numbers(mask & each.mask)))

    def change(self, each: F) -> None:
        """One field: a flipped bit, a value that means something, or what another field holds."""
        structure, choose = self.structure, self._random
        kind = choose.randrange(4)
        if kind == 0:
            self.flip(each)
        elif kind == 3 and (sources := self.sources(each)):
            structure[each] = structure[choose.choice(sources)]
        else:
            structure[each] = choose.choice(self.values(each))

    def flip_one(self) -> None:
        """One bit."""
        self.flip(self._random.choice(self._fields))

    def change_one(self) -> None:
        """One field."""
        self.change(self._random.choice(self._fields))

    def change_some(self) -> None:
        """Two to four fields."""
        for _ in range(self._random.randint(2, 4)):
            self.change(self._random.choice(self._fields))

    def break_rule(self) -> None:
        """Fields that one rule reads, until it does not hold."""
        rule = self._random.choice(self.rules.rules)
        reads = [(each, mask) for each, mask in rule.reads if each in self.bases[0]]
        self.make_applicable(rule)
        for _ in range(_TRIES if reads else 0):
            if not rule.holds(self.context):
                return
            each, mask = self._random.choice(reads)
            if self._random.randrange(2):
                self.flip(each, mask)
            else:
                self.change(each)

    def round_then_flip(self) -> None:
        """Random fields made valid again, then, or not, one flipped bit."""
        structure = self.structure
        for each in self._random.sample(self._fields, self._random.randint(3, 10)):
            structure[each] = self._random.getrandbits(each.mask.bit_length())
        try:
            self.rules.repair(self.context)
        except ValueError:
            return
        if self._random.randrange(3):
            self.flip(self._random.choice(self._fields))


_TRIES: Final = 12
