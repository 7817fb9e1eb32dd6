"""The local APIC timer: one-shot, periodic and TSC-deadline.

The input clock is the core crystal clock, as CPUID leaf 15H tells software: a whole number of ticks of the time-stamp
counter a count, before the divide configuration. Where that leaf is absent, and the rate for software to measure, it is
one tick. Nothing counts: the timer knows the tick at which the count reaches zero.

Spec: SDM Vol. 3, "APIC Timer", "TSC-Deadline Mode".
"""

from __future__ import annotations

import enum

from attrs import define

MASK64 = (1 << 64) - 1
MASK32 = (1 << 32) - 1


class TimerMode(enum.IntEnum):
    """Bits 18:17 of the timer's local vector table entry; the reserved mode never expires."""

    ONE_SHOT = 0
    PERIODIC = 1
    TSC_DEADLINE = 2
    RESERVED = 3


def divisor(configuration: int) -> int:
    """The divisor (1, 2, 4 ... 128) that bits 3, 1 and 0 of the divide configuration register choose."""
    code = configuration & 3 | configuration >> 1 & 4
    return 1 << ((code + 1) & 7)


@define(slots=True)
class ApicTimer:
    """The timer's state; every method that depends on time takes the current tick.

    ``divide`` is the ticks a count takes: those of the input clock times the divide configuration.

    ``expires_at`` is the tick at which the current count reaches zero, None while nothing counts. ``tsc_offset`` is
    what the processor adds to ticks, modulo 2**64, to get IA32_TIME_STAMP_COUNTER. ``tsc_deadline`` 0 means disarmed.
    """

    divide: int
    mode: TimerMode = TimerMode.ONE_SHOT
    initial_count: int = 0
    expires_at: int | None = None
    tsc_deadline: int = 0
    tsc_offset: int = 0

    def set_mode(self, mode: TimerMode) -> None:
        """Entering or leaving TSC-deadline mode disarms; between the other modes the count goes on."""
        if mode is not self.mode and TimerMode.TSC_DEADLINE in (mode, self.mode):
            self.expires_at = None
            self.tsc_deadline = 0
        self.mode = mode

    def set_initial_count(self, now: int, count: int) -> None:
        """Start counting down from ``count``; 0 stops. Ignored in TSC-deadline mode."""
        if self.mode is TimerMode.TSC_DEADLINE:
            return
        self.initial_count = count
        self.expires_at = now + count * self.divide if count else None

    def set_divide(self, now: int, divide: int) -> None:
        """Count on from the current count at the new rate."""
        if self.expires_at is not None:
            self.expires_at = now + self.current_count(now) * divide
        self.divide = divide

    def set_tsc_deadline(self, deadline: int) -> None:
        """Arm for the TSC value ``deadline``, or disarm with 0. Ignored outside TSC-deadline mode."""
        if self.mode is TimerMode.TSC_DEADLINE:
            self.tsc_deadline = deadline

    def current_count(self, now: int) -> int:
        """The count at ``now``; what is due must have been taken by `expire` first."""
        if self.expires_at is None:
            return 0
        return -((now - self.expires_at) // self.divide)

    def expire(self, now: int) -> bool:
        """Whether the timer expired, once or more, since the last call; a periodic timer is then running again."""
        if self.mode is TimerMode.TSC_DEADLINE:
            expired = 0 < self.tsc_deadline <= (now + self.tsc_offset) & MASK64
            if expired:
                self.tsc_deadline = 0
            return expired
        if self.expires_at is None or now < self.expires_at:
            return False
        if self.mode is TimerMode.PERIODIC:
            period = self.initial_count * self.divide
            self.expires_at += ((now - self.expires_at) // period + 1) * period
        else:
            self.expires_at = None
        return self.mode is not TimerMode.RESERVED

    def next_expiry(self, now: int) -> int | None:
        """The tick of the next expiry, which may be past, or None."""
        if self.mode is TimerMode.TSC_DEADLINE:
            if not self.tsc_deadline:
                return None
            return now + max(0, self.tsc_deadline - ((now + self.tsc_offset) & MASK64))
        return self.expires_at
