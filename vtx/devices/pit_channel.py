"""One counter of the 8254 interval timer, in all six modes.

Nothing counts here. A counter knows at which clock pulse its count was loaded, so its value, its output and the next
change of its output at any pulse are arithmetic. Every method takes the number of the latest pulse, ``clock``, which
must not run backwards. What is written after pulse n is loaded at pulse n + 1, as on the chip.

Spec: 8254 data sheet, "Mode Definitions", "Operation Common to All Modes".
"""

from __future__ import annotations

import enum

from attrs import define


class Mode(enum.IntEnum):
    """Counting modes by the number in the control word."""

    INTERRUPT_ON_TERMINAL_COUNT = 0
    HARDWARE_ONE_SHOT = 1
    RATE_GENERATOR = 2
    SQUARE_WAVE = 3
    SOFTWARE_STROBE = 4
    HARDWARE_STROBE = 5


ONE_TIME = (Mode.INTERRUPT_ON_TERMINAL_COUNT, Mode.SOFTWARE_STROBE)
PERIODIC = (Mode.RATE_GENERATOR, Mode.SQUARE_WAVE)
TRIGGERED = (Mode.HARDWARE_ONE_SHOT, Mode.HARDWARE_STROBE)
STROBES = (Mode.SOFTWARE_STROBE, Mode.HARDWARE_STROBE)
BINARY_RANGE = 1 << 16
BCD_RANGE = 10_000


@define(slots=True)
class CounterState:
    """Everything of a counting element a snapshot needs.

    ``register`` is the count as written; ``count`` the one in use, 1 to the range. ``loaded`` tells that one is in use
    since the control word. It was loaded at pulse ``start``; until then ``old_value`` and ``old_output`` hold.
    ``elapsed`` pulses were counted up to pulse ``since``; None means that counting is suspended. ``reload`` is the
    pulse at which a periodic mode goes over to a new count, None if there is none. ``taken`` is the pulse at which the
    count written last is or was taken over, None if that waits for something to happen. ``struck`` is the pulse of a
    strobe during which counting was suspended.
    """

    mode: Mode = Mode.INTERRUPT_ON_TERMINAL_COUNT
    bcd: bool = False
    gate: bool = True
    register: int = 0
    written: bool = False
    loaded: bool = False
    count: int = BINARY_RANGE
    start: int = 0
    reload: int | None = None
    taken: int | None = None
    elapsed: int = 0
    since: int | None = None
    struck: int | None = None
    old_value: int = 0
    old_output: bool = False


class Counter:
    """A counting element with its gate and its output."""

    def __init__(self) -> None:
        self.state = CounterState()

    def set_mode(self, clock: int, mode: Mode, bcd: bool) -> None:
        """A control word: the output takes its initial level at once, and counting waits for a count."""
        self.state = CounterState(mode=mode, bcd=bcd, gate=self.state.gate, old_value=self.value(clock))

    def suspend(self, clock: int) -> None:
        """The first byte of a two-byte count: in mode 0 it stops counting and forces the output low."""
        if self.state.mode is Mode.INTERRUPT_ON_TERMINAL_COUNT:
            self.state.old_value = self.value(clock)
            self.state.loaded = False
            self.state.taken = None

    def set_count(self, clock: int, value: int) -> None:
        """A complete count, as the 16 bits written."""
        self._settle(clock)
        state = self.state
        state.register = value
        state.written = True
        state.taken = None
        if state.mode in ONE_TIME or (state.mode in PERIODIC and not state.loaded):
            self._load(clock)
        elif state.loaded and clock < state.start:
            state.count = self._written_count()  # the pulse that was to load the old one loads this one
            state.taken = state.start
        elif state.mode in PERIODIC and state.since is not None:
            state.reload = state.taken = self._next_reload(clock)

    def set_gate(self, clock: int, level: bool) -> None:
        """Drive the gate input."""
        self._settle(clock)
        state = self.state
        if level == state.gate:
            return
        state.gate = level
        if state.mode in TRIGGERED or (state.mode in PERIODIC and level):
            if level and state.written:
                self._load(clock)
                # A gate that was low has forced a periodic output high.
                state.old_output = state.old_output or state.mode in PERIODIC
        elif level:
            state.since = max(clock, state.start)
        else:
            state.elapsed = self._elapsed(clock)
            state.since = None
            if state.elapsed == state.count and state.struck is None:
                state.struck = clock
            if state.reload is not None:
                state.reload = state.taken = None

    def value(self, clock: int) -> int:
        """What the counting element holds, as 16 bits, binary or BCD."""
        self._settle(clock)
        state = self.state
        if not state.loaded or clock < state.start:
            return state.old_value
        elapsed = self._elapsed(clock)
        if state.mode is Mode.RATE_GENERATOR:
            value = state.count - elapsed % state.count
        elif state.mode is Mode.SQUARE_WAVE:
            position, high = elapsed % state.count, self._high_pulses
            value = (state.count & ~1) - 2 * (position if position < high else position - high)
        else:
            value = state.count - elapsed
        value %= self._range
        return _to_bcd(value) if state.bcd else value

    def output(self, clock: int) -> bool:
        """Level of the output."""
        self._settle(clock)
        state = self.state
        if not state.loaded:
            return state.mode is not Mode.INTERRUPT_ON_TERMINAL_COUNT
        if clock < state.start:
            return state.old_output
        elapsed = self._elapsed(clock)
        if state.mode in STROBES:
            return elapsed != state.count or (state.struck is not None and clock > state.struck)
        if state.mode not in PERIODIC:
            return elapsed >= state.count
        if not state.gate:
            return True
        if state.mode is Mode.RATE_GENERATOR:
            return elapsed % state.count != state.count - 1
        return elapsed % state.count < self._high_pulses

    def next_change(self, clock: int) -> int | None:
        """The first pulse after ``clock`` at which the output differs from what it is at ``clock``, or None."""
        self._settle(clock)
        state = self.state
        if not state.loaded:
            return None
        first = max(clock, state.start)
        if self.output(first) != self.output(clock):
            return first
        elapsed = self._elapsed(first)
        if state.mode in STROBES and elapsed == state.count:
            return None if self.output(first) else first + 1
        if state.since is None:
            return None
        if state.mode in PERIODIC:
            if state.count == 1:
                return None
            position = elapsed % state.count
            turn = state.count - 1 if state.mode is Mode.RATE_GENERATOR else self._high_pulses
            return first + (turn if position < turn else state.count) - position
        return first + state.count - elapsed if elapsed < state.count else None

    def null_count(self, clock: int) -> bool:
        """Whether the count last written is not in use yet."""
        taken = self.state.taken
        return taken is None or clock < taken

    @property
    def _range(self) -> int:
        return BCD_RANGE if self.state.bcd else BINARY_RANGE

    @property
    def _high_pulses(self) -> int:
        """The part of a square wave's period its output is high; an odd count has one pulse more of it."""
        return (self.state.count + 1) // 2

    def _written_count(self) -> int:
        value = self.state.register
        if self.state.bcd:
            value = sum((value >> 4 * digit & 0xF) * 10**digit for digit in range(4))
        return value % self._range or self._range

    def _elapsed(self, clock: int) -> int:
        state = self.state
        if state.since is None or clock < state.since:
            return state.elapsed
        return state.elapsed + clock - state.since

    def _load(self, clock: int) -> None:
        """Take the register over at the next pulse and count it from there."""
        state = self.state
        low_at_once = state.mode is Mode.INTERRUPT_ON_TERMINAL_COUNT
        old_value, old_output = self.value(clock), self.output(clock) and not low_at_once
        state.old_value, state.old_output = old_value, old_output
        state.loaded = True
        state.start = clock + 1
        state.reload = state.struck = None
        if state.taken is None:
            state.taken = state.start
        state.count = self._written_count()
        state.elapsed = 0
        state.since = clock + 1 if state.gate or state.mode in TRIGGERED else None

    def _next_reload(self, clock: int) -> int:
        """The pulse that ends the current period, or half of it in square-wave mode."""
        state = self.state
        first = max(clock, state.start)
        position = self._elapsed(first) % state.count
        half = state.mode is Mode.SQUARE_WAVE and position < self._high_pulses
        return first + (self._high_pulses if half else state.count) - position

    def _settle(self, clock: int) -> None:
        """Take over a new count of a periodic mode once the pulse for it has come."""
        state = self.state
        if state.reload is None or clock < state.reload:
            return
        ends_high_half = state.mode is Mode.SQUARE_WAVE and self._elapsed(state.reload) % state.count != 0
        state.count = self._written_count()
        state.start = state.since = state.reload
        state.elapsed = self._high_pulses if ends_high_half else 0
        state.reload = None


def _to_bcd(value: int) -> int:
    return sum(value // 10**digit % 10 << 4 * digit for digit in range(4))
