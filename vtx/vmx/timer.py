"""The VMX-preemption timer, as a deadline in time-stamp counter ticks.

The timer counts down by 1 whenever bit X of the TSC changes (X from IA32_VMX_MISC), so its value and a TSC deadline say
the same thing; the deadline needs no updating while the guest runs.

Spec: SDM Vol. 3, "VMX Non-Root Operation", "VMX-Preemption Timer".
"""

from __future__ import annotations


def deadline(tsc: int, value: int, shift: int) -> int:
    """TSC at which a timer that holds ``value`` now reaches 0; not after ``tsc`` if it already has."""
    return ((tsc >> shift) + value) << shift


def remaining(tsc: int, expiry: int, shift: int) -> int:
    """Value of the timer that expires at ``expiry``; it stays at 0 once it got there."""
    return max(0, (expiry >> shift) - (tsc >> shift))
