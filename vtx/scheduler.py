"""Taking turns: several processors on one thread, in an order that virtual time alone decides.

Each processor has its own clock. The one that is furthest behind runs next, until it is a quantum ahead of the others.
The quantum is short where processors have to do with each other, and grows while they do not: it starts anew whenever
one sends something to another, who then has the next turn. A processor that waits for an interrupt takes no turns; when
it is woken, its clock is set to the time of the event.

A processor that spins gives up its turn, and its clock goes on to where the next one is: until then nothing that it
waits for can happen. While all of them spin, each time for longer, they wait for something that time brings. Without
PAUSE, one seems to spin whose registers are the same at the ends of its turns: it has short ones then.

Nothing here depends on the host: the same machine and image give the same order of turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from attrs import define, evolve, field

SHORTEST_QUANTUM: Final = 4_000
"""Ticks that a processor may run ahead of the slowest one after it has sent something: an interrupt's handler."""

LONGEST_QUANTUM: Final = 4_000_000
"""The same when nothing has been sent for long: a turn then outweighs what it costs to begin one."""

IDLE_TURN: Final = 1_000
"""Ticks that a turn takes at most in which a processor does nothing but spin."""


class Scheduled(Protocol):
    """A processor as the scheduler sees it."""

    contended: bool
    """Set by the scheduler for a turn: whether others could run instead."""

    spins: bool
    """Set by the processor when it gives way because it only waits for others; the scheduler clears it."""

    @property
    def awake(self) -> bool:
        """Whether it executes instructions or would take an interrupt that is pending."""
        ...

    @property
    def finished(self) -> bool:
        """Whether it must not run any more: a stop was requested, or it shut down."""
        ...

    def now(self) -> int:
        """Its own time."""
        ...

    def sleep_until(self, tick: int) -> None:
        """Let time pass without executing, and devices act on it."""
        ...

    def idle_until(self, tick: int) -> None:
        """The same while no processor is awake: to where something may wake this one."""
        ...

    def wake_time(self) -> int | None:
        """The tick at which something may wake it by itself, or None."""
        ...

    def run(self, until: int | None = None) -> None:
        """Run until its time is ``until``, it finishes, or it gives way."""
        ...

    def give_way(self) -> None:
        """Make `run` return soon."""
        ...

    def registers(self) -> tuple[int, ...]:
        """Its general-purpose registers."""
        ...


@define(slots=True)
class Turns:
    """Whose turn it is: what a snapshot needs besides the processors. Processors are indices here.

    ``running`` has or had the last turn, ``runnable`` were awake then. ``signalled`` have been sent something since
    they last ran, at the tick given. ``quantum`` is in ticks; ``spins`` counts the last turns that were nothing but
    spinning. ``registers`` are those at the ends of turns whose time was up, ``stuck`` those they did not change for.
    """

    running: int = 0
    runnable: frozenset[int] = frozenset()
    signalled: dict[int, int] = field(factory=dict)
    quantum: int = SHORTEST_QUANTUM
    spins: int = 0
    registers: dict[int, tuple[int, ...]] = field(factory=dict)
    stuck: set[int] = field(factory=set)

    def copy(self) -> Turns:
        """The same, to go on differently from."""
        return evolve(self, signalled=dict(self.signalled), registers=dict(self.registers), stuck=set(self.stuck))


class Scheduler:
    """Runs ``processors``; ``switch`` is called with the index of the one that runs next."""

    def __init__(self, processors: Sequence[Scheduled], switch: Callable[[int], None]) -> None:
        self._processors = processors
        self._switch = switch
        self.turns = Turns()
        self._until: int | None = None

    def run(self) -> None:
        """Run until a processor finishes or none can ever run again."""
        while not any(processor.finished for processor in self._processors):
            awake = [i for i, processor in enumerate(self._processors) if processor.awake]
            if awake:
                self._turn(awake)
            elif not self._pass_time():
                return

    def signal(self, index: int) -> None:
        """Something was sent to processor ``index``: unless it sleeps on, it has the next turn, and has it soon.

        One that is ahead of the sender has it when the sender has caught up.
        """
        turns, target = self.turns, self._processors[index]
        if index != turns.running and target.awake:
            running = self._processors[turns.running]
            now = running.now()
            turns.signalled.setdefault(index, now)
            turns.quantum, turns.spins = SHORTEST_QUANTUM, 0
            latest = max(now, target.now() if index in turns.runnable else now) + SHORTEST_QUANTUM
            if self._until is None or self._until > latest:
                running.give_way()

    def _turn(self, awake: list[int]) -> None:
        processors, turns = self._processors, self.turns
        chosen = self._choose(awake)
        processor = processors[chosen]
        others = [processors[i].now() for i in awake if i != chosen]
        asleep = [i for i in range(len(processors)) if i not in turns.runnable]
        begin = processor.now()
        limits = [max(wake, begin + 1) for i in asleep if (wake := processors[i].wake_time()) is not None]
        if others:
            limits.append(max(min(others) + turns.quantum, begin + SHORTEST_QUANTUM))
        if others and chosen in turns.stuck:
            limits.append(begin + SHORTEST_QUANTUM)
        self._until = until = min(limits, default=None)
        processor.contended = bool(others)
        self._select(chosen)
        processor.run(until)
        end = processor.now()
        if processor.spins:
            processor.spins = False
            turns.spins = turns.spins + 1 if end - begin <= IDLE_TURN else 0
            self._skip(processor, others)
        else:
            turns.spins = 0
            if until is not None and end >= until:
                self._time_is_up(chosen, others)
            else:
                turns.stuck.discard(chosen)
        self._wake(asleep, end)

    def _choose(self, awake: Iterable[int]) -> int:
        """Who runs next: one that was sent something, else the one furthest behind."""
        processors, turns = self._processors, self.turns
        signalled = {i: tick for i, tick in turns.signalled.items() if i in awake}
        for i, tick in signalled.items():
            if i not in turns.runnable and processors[i].now() < tick:
                processors[i].sleep_until(tick)
        chosen = min(signalled or awake, key=lambda i: (processors[i].now(), i))
        signalled.pop(chosen, None)
        turns.signalled, turns.runnable = signalled, frozenset(awake)
        return chosen

    def _time_is_up(self, index: int, others: Sequence[int]) -> None:
        """A turn ended by its limit: the next ones may be longer, unless the processor seems to spin."""
        turns, processor = self.turns, self._processors[index]
        before, turns.registers[index] = turns.registers.get(index), processor.registers()
        if before != turns.registers[index]:
            turns.stuck.discard(index)
            turns.quantum = min(turns.quantum + turns.quantum // len(turns.runnable), LONGEST_QUANTUM)
        elif index not in turns.stuck:
            turns.stuck.add(index)
        elif others:
            self._skip(processor, others)

    def _skip(self, processor: Scheduled, others: Sequence[int]) -> None:
        """``processor`` spins: nothing it waits for can happen before ``others`` run, but for what devices do.

        If all of them spin, it is time that they wait for.
        """
        tick = min(others, default=-1) + 1  # so that the other is next
        rounds = self.turns.spins // (len(others) + 1)
        if rounds:
            tick = max(tick, processor.now() + min(SHORTEST_QUANTUM << rounds, LONGEST_QUANTUM))
        wakes = [wake for each in self._processors if (wake := each.wake_time()) is not None]
        tick = min([tick, *wakes])
        if tick > processor.now():
            processor.sleep_until(tick)

    def _wake(self, asleep: Iterable[int], now: int) -> None:
        """Let those asleep have the events that are due by ``now``."""
        for i in asleep:
            wake = self._processors[i].wake_time()
            if wake is not None and wake <= now:
                self._select(i)
                self._processors[i].sleep_until(wake)

    def _pass_time(self) -> bool:
        """Nobody runs: go to the next moment at which somebody may wake. False if there is none."""
        wakes = [
            (wake, i) for i, processor in enumerate(self._processors) if (wake := processor.wake_time()) is not None
        ]
        if not wakes:
            return False
        wake, i = min(wakes)
        self._select(i)
        self._processors[i].idle_until(wake)
        return True

    def _select(self, index: int) -> None:
        self.turns.running = index
        self._switch(index)
