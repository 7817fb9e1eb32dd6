"""The debug-exit device: a write ends the run and carries the guest's verdict.

Threats: the guest chooses the value and when; it reaches the host as a number of at most 32 bits and nothing else. A
guest inside a guest can write the port too unless its hypervisor intercepts it, as with the device this one stands for.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen


@frozen
class DebugExit:
    """A port that ends the run; ``exit_run`` gets the value written, zero-extended from 1, 2 or 4 bytes."""

    exit_run: Callable[[int], None]

    def port_read(self, offset: int, size: int) -> int:
        """Reads as zero."""
        return 0

    def port_write(self, offset: int, size: int, value: int) -> None:
        """End the run."""
        self.exit_run(value & ((1 << (8 * size)) - 1))
