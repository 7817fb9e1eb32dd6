"""The performance counters of one logical processor: instructions retired, cycles, and their overflow interrupt.

Deterministic, because everything counted follows from virtual time: an unhalted cycle is a tick of the time-stamp
counter in which the processor was not halted, a reference cycle the same. Events that never happen here (caches,
branch prediction) are not counted. At most one instruction retires in a cycle, and never in two in a row. Counters are
brought up to date when something looks, and at the tick at which one that interrupts may overflow.

Threats: the guest chooses every value, and rates up to one overflow per tick; an overflow masks its own interrupt (the
local APIC's LVT entry), and no count is ever stepped through one by one.

Spec: SDM Vol. 3B, "Architectural Performance Monitoring Version 2", "Pre-defined Architectural Performance Events".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from attrs import define, field

from vtx.x86.branches import LBR
from vtx.x86.msr_table import IA32_DEBUGCTL
from vtx.x86.msrs import MsrFile
from vtx.x86.outcome import NotModelled
from vtx.x86.performance import (
    FIRST_FIXED,
    FIXED_CONTROL_BITS,
    FREEZE_LBRS_ON_PMI,
    FREEZE_PERFMON_ON_PMI,
    IA32_FIXED_CTR0,
    IA32_FIXED_CTR_CTRL,
    IA32_PERF_GLOBAL_CTRL,
    IA32_PERF_GLOBAL_OVF_CTRL,
    IA32_PERF_GLOBAL_STATUS,
    IA32_PERFEVTSEL0,
    IA32_PMC0,
    PerformanceMonitoring,
)
from vtx.x86.state import MASK32
from vtx.x86.timing import TICKS_PER_BYTE

_OS_AND_USER: Final = 0b11
_SELECT_INTERRUPT, _SELECT_ENABLE = 1 << 20, 1 << 22
_SELECT_EDGE, _SELECT_INVERT = 1 << 18, 1 << 23
_SELECT_MASK_SHIFT: Final = 24
_FIXED_INTERRUPT: Final = 1 << 3

INSTRUCTIONS, CYCLES, OTHER_CYCLES = range(3)
"""What is counted; the last are cycles in which no instruction retires."""
# Unit mask and event select of the events that happen, and what each fixed counter counts.
_EVENTS: Final = {0x00C0: INSTRUCTIONS, 0x003C: CYCLES, 0x013C: CYCLES}
_FIXED_EVENTS: Final = (INSTRUCTIONS, CYCLES, CYCLES)
_TICKS: Final = (TICKS_PER_BYTE, 1, 1)  # that one event takes at least
_WITH_MASK_1: Final = {
    (INSTRUCTIONS, False): INSTRUCTIONS,
    (INSTRUCTIONS, True): OTHER_CYCLES,
    (CYCLES, False): CYCLES,
    (None, True): CYCLES,
}


class Work(Protocol):
    """What a processor has done since power-up."""

    @property
    def instructions(self) -> int:
        """Instructions executed."""
        ...

    @property
    def halted(self) -> int:
        """Ticks for which it was halted."""
        ...

    def now(self) -> int:
        """Ticks."""
        ...


@define(slots=True)
class PerformanceState:
    """Everything a snapshot needs. Counters are in the order of the global registers' bits, general ones first.

    ``counts`` are the counts when ``seen``, events by kind, was what the processor had done.
    """

    counts: list[int]
    selects: list[int]
    seen: tuple[int, int] = (0, 0)
    fixed_control: int = 0
    global_control: int = 0
    status: int = 0
    deadline: int | None = field(default=None)


class PerformanceCounters:
    """The counters of ``facility``, counting the ``work`` of a processor.

    ``interrupt`` is called when a counter overflows that interrupts.
    """

    def __init__(self, facility: PerformanceMonitoring, work: Work, interrupt: Callable[[], None]) -> None:
        self.facility = facility
        self._work = work
        self._interrupt = interrupt
        self.reset()

    def reset(self) -> None:
        """Power-up and RESET: all counters clear, and off but for the global enables of the general ones."""
        general = self.facility.general
        counts, selects = [0] * (general + self.facility.fixed), [0] * general
        self.state = PerformanceState(counts, selects, global_control=(1 << general) - 1)

    # --- MSRs --------------------------------------------------------------------------------------------------------

    def msr_read(self, index: int) -> int | None:
        """RDMSR of one of the facility's MSRs."""
        self._update()
        state, number = self.state, self._counter(index)
        if number is not None:
            return state.counts[number]
        if index == IA32_FIXED_CTR_CTRL:
            return state.fixed_control
        if index == IA32_PERF_GLOBAL_CTRL:
            return state.global_control
        if index == IA32_PERF_GLOBAL_STATUS:
            return state.status
        if index == IA32_PERF_GLOBAL_OVF_CTRL:
            return 0
        return state.selects[index - IA32_PERFEVTSEL0]

    def msr_write(self, index: int, value: int) -> bool:
        """WRMSR of a value whose reserved bits are clear."""
        self._update()
        state, number = self.state, self._counter(index)
        if number is not None:
            state.counts[number] = self._extended(value) if number < self.facility.general else value
        elif index == IA32_FIXED_CTR_CTRL:
            for n in range(self.facility.fixed):
                _require_both_levels(value >> FIXED_CONTROL_BITS * n & _OS_AND_USER)
            state.fixed_control = value
        elif index == IA32_PERF_GLOBAL_CTRL:
            state.global_control = value
        elif index == IA32_PERF_GLOBAL_OVF_CTRL:
            state.status &= ~value
        else:
            if value & _SELECT_ENABLE:
                _require_both_levels(value >> 16 & _OS_AND_USER)
                if value & _SELECT_EDGE and _condition(value) == CYCLES:
                    raise NotModelled("performance event with edge detection of unhalted cycles")
            state.selects[index - IA32_PERFEVTSEL0] = value
        self._plan()
        return True

    def _counter(self, index: int) -> int | None:
        facility = self.facility
        if 0 <= index - IA32_PMC0 < facility.general:
            return index - IA32_PMC0
        if 0 <= index - IA32_FIXED_CTR0 < facility.fixed:
            return facility.general + index - IA32_FIXED_CTR0
        return None

    def _extended(self, value: int) -> int:
        """A write to a general counter: 32 bits, sign-extended to its width."""
        mask = (1 << self.facility.general_width) - 1
        return (value | ~MASK32) & mask if value & 1 << 31 else value & MASK32

    # --- Time --------------------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> int | None:
        """The tick at which `advance` must be called again, or None."""
        return self.state.deadline

    def advance(self, now: int) -> None:
        """Let counters overflow if tick ``now`` has reached the deadline."""
        deadline = self.state.deadline
        if deadline is not None and now >= deadline:
            self._update()
            self._plan()

    def freeze(self) -> None:
        """Stop all counters, as an overflow interrupt does on request of IA32_DEBUGCTL."""
        self.state.global_control = 0
        self._plan()

    def _update(self) -> None:
        """Count what has happened since the last time."""
        state, facility = self.state, self.facility
        done = self._work.instructions, self._work.now() - self._work.halted
        instructions, cycles = done[INSTRUCTIONS] - state.seen[INSTRUCTIONS], done[CYCLES] - state.seen[CYCLES]
        past = instructions, cycles, cycles - instructions
        state.seen = done
        interrupts = False
        for number in range(len(state.counts)):
            event = self._event(number)
            if event is None:
                continue
            general = number < facility.general
            width = facility.general_width if general else facility.fixed_width
            count = state.counts[number] + past[event]
            if count >> width:
                state.status |= self._global_bit(number)
                interrupts |= self._interrupts(number)
            state.counts[number] = count & ((1 << width) - 1)
        if interrupts:
            self._interrupt()

    def _plan(self) -> None:
        """Find the first tick at which a counter that interrupts may overflow."""
        state, facility, now = self.state, self.facility, self._work.now()
        deadlines = []
        for number, count in enumerate(state.counts):
            event = self._event(number)
            if event is not None and self._interrupts(number):
                width = facility.general_width if number < facility.general else facility.fixed_width
                deadlines.append(now + ((1 << width) - count) * _TICKS[event])
        state.deadline = min(deadlines, default=None)

    def _global_bit(self, number: int) -> int:
        general = self.facility.general
        return 1 << number if number < general else 1 << FIRST_FIXED + number - general

    def _fixed_control(self, number: int) -> int:
        return self.state.fixed_control >> FIXED_CONTROL_BITS * (number - self.facility.general)

    def _event(self, number: int) -> int | None:
        """What counter ``number`` counts now, None if nothing."""
        state, general = self.state, self.facility.general
        if not state.global_control & self._global_bit(number):
            return None
        if number >= general:
            return _FIXED_EVENTS[number - general] if self._fixed_control(number) & _OS_AND_USER else None
        select = state.selects[number]
        if not select & _SELECT_ENABLE or not select >> 16 & _OS_AND_USER:
            return None
        condition = _condition(select)
        return INSTRUCTIONS if condition == OTHER_CYCLES and select & _SELECT_EDGE else condition

    def _interrupts(self, number: int) -> bool:
        if number >= self.facility.general:
            return bool(self._fixed_control(number) & _FIXED_INTERRUPT)
        return bool(self.state.selects[number] & _SELECT_INTERRUPT)


def _condition(select: int) -> int | None:
    """What happens in the cycles that the fields of IA32_PERFEVTSELx select; None if they select none.

    With a counter mask, the number of events in each cycle is compared with it.
    """
    event, mask = _EVENTS.get(select & 0xFFFF), select >> _SELECT_MASK_SHIFT
    inverted = bool(select & _SELECT_INVERT)
    if not mask:
        return event
    if mask == 1:
        return _WITH_MASK_1.get((event, inverted))
    return CYCLES if inverted else None


def _require_both_levels(levels: int) -> None:
    if levels not in (0, _OS_AND_USER):
        raise NotModelled("performance counter for one privilege level alone")


def bind_performance_counters(msrs: MsrFile, counters: PerformanceCounters) -> None:
    """Let ``counters`` stand for their MSRs."""
    for index in (IA32_PERF_GLOBAL_STATUS, *(row[0] for row in counters.facility.msrs())):
        msrs.bind(index, counters.msr_read, counters.msr_write)


def freeze_on_interrupt(msrs: MsrFile, counters: PerformanceCounters) -> None:
    """Stop what IA32_DEBUGCTL says an overflow interrupt stops: counting, branch records.

    Spec: SDM Vol. 3B, "Freezing LBR and Performance Counters on PMI".
    """
    debugctl = msrs.read(IA32_DEBUGCTL) or 0
    if debugctl & FREEZE_PERFMON_ON_PMI:
        counters.freeze()
    if debugctl & FREEZE_LBRS_ON_PMI:
        msrs.write(IA32_DEBUGCTL, debugctl & ~LBR)
