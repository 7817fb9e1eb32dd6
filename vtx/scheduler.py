"""Taking turns: several processors on one thread, in an order that virtual time alone decides.

Each processor has its own clock. The one that is furthest behind runs next, until it is a quantum ahead of the others
or something concerns another processor (an interprocessor interrupt wakes it). A processor that waits for an interrupt
takes no turns; when it is woken its clock is set to the time of the event, so nobody ever acts in another's past by
more than a quantum.

Nothing here depends on the host: the same machine and image give the same order of turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

QUANTUM: Final = 10_000
"""Ticks that a processor may run ahead of the slowest one."""


class Scheduled(Protocol):
    """A processor as the scheduler sees it."""

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

    def wake_time(self) -> int | None:
        """The tick at which something may wake it by itself, or None."""
        ...

    def run(self, until: int | None = None) -> None:
        """Run until its time is ``until``, it finishes, or it is told to give way."""
        ...

    def give_way(self) -> None:
        """Make `run` return soon."""
        ...


class Scheduler:
    """Runs ``processors``; ``switch`` is called with the index of the one that runs next.

    ``running`` is the index of the processor whose turn is or was the last, ``planned`` are those that were awake then.
    """

    def __init__(self, processors: Sequence[Scheduled], switch: Callable[[int], None]) -> None:
        self._processors = processors
        self._switch = switch
        self.running = 0
        self.planned: tuple[int, ...] = ()

    def run(self) -> None:
        """Run until a processor finishes or none can ever run again."""
        while not any(processor.finished for processor in self._processors):
            awake = self._awake()
            if awake:
                self._turn(awake)
            elif not self._pass_time():
                return

    def reconsider(self) -> None:
        """Something happened that may have woken a processor that takes no turns."""
        if self._awake() != self.planned:
            self._processors[self.running].give_way()

    def _awake(self) -> tuple[int, ...]:
        return tuple(i for i, processor in enumerate(self._processors) if processor.awake)

    def _turn(self, awake: tuple[int, ...]) -> None:
        processors = self._processors
        latest = max(processors[i].now() for i in self.planned) if self.planned else 0
        for i in awake:
            if i not in self.planned and processors[i].now() < latest:
                processors[i].sleep_until(latest)
        self.planned = awake
        times = sorted((processors[i].now(), i) for i in awake)
        self.running = times[0][1]
        self._switch(self.running)
        wakes = [wake for i, processor in enumerate(processors) if i not in awake and (wake := processor.wake_time())]
        limits = [max(wake, times[0][0] + 1) for wake in wakes]
        if len(times) > 1:
            limits.append(times[1][0] + QUANTUM)
        processors[self.running].run(min(limits, default=None))
        for i, processor in enumerate(processors):
            wake = None if i in awake else processor.wake_time()
            if wake is not None and wake <= processors[self.running].now():
                self._switch(i)
                processor.sleep_until(wake)

    def _pass_time(self) -> bool:
        """Nobody runs: go to the next moment at which somebody may wake. False if there is none."""
        wakes = [
            (wake, i) for i, processor in enumerate(self._processors) if (wake := processor.wake_time()) is not None
        ]
        if not wakes:
            return False
        wake, i = min(wakes)
        self._switch(i)
        self._processors[i].sleep_until(wake)
        return True
