"""What things cost in virtual time, in ticks of the time-stamp counter.

Only the order of magnitude is that of a real processor. What matters is that the same code takes the same time in every
run, and that waiting loops get to their end.
"""

from typing import Final

TICKS_PER_BYTE: Final = 4
"""Virtual time: ticks of the time-stamp counter per byte of code executed; an average instruction has four bytes."""

TRAP_TICKS: Final = 24
"""What an instruction costs on top when the model executes it: these are slow instructions on every processor."""

EVENT_TICKS: Final = 300
"""Delivery of an interrupt or exception."""

IDLE_TICKS: Final = 10_000
"""What passes at least when a processor waits for another one."""

TRANSITION_TICKS: Final = 600
"""A VM entry or a VM exit, passing once it is complete: the order of magnitude of current processors."""
