"""Interrupt lines driven by software: one port a line, for tests of interrupt controllers.

A write of any size to offset n makes line n active if the value is not zero, and inactive if it is. Reads give ones.

Threats: the guest drives any line at any time; a line is one bit.

Spec: QEMU documentation, the ISA test device ("pc-testdev"); the ports are 2000H-2017H there.
"""

from __future__ import annotations

from collections.abc import Sequence

from vtx.devices.ports import InterruptLine


class TestInterruptLines:
    """The device; ``lines`` are what its ports drive, in order."""

    __test__ = False  # not a test class, whatever its name looks like

    def __init__(self, lines: Sequence[InterruptLine]) -> None:
        self._lines = tuple(lines)

    def port_read(self, offset: int, size: int) -> int:
        """Reads as ones."""
        return (1 << 8 * size) - 1

    def port_write(self, offset: int, size: int, value: int) -> None:
        """Drive the line at ``offset``."""
        if offset < len(self._lines):
            self._lines[offset](value & (1 << 8 * size) - 1 != 0)
