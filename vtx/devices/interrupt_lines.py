"""Interrupt lines the guest drives itself, one a port, as conformance suites expect of a test board.

Threats: the guest can raise any line it names, as a device would; lines that are not connected do nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from vtx.devices.ports import InterruptLine


class InterruptTestLines:
    """A write of nonzero to offset n asserts line n of ``lines``, zero deasserts it; reads as zero."""

    def __init__(self, lines: Sequence[InterruptLine]) -> None:
        self._lines = lines

    def port_read(self, offset: int, size: int) -> int:
        """Reads as zero."""
        return 0

    def port_write(self, offset: int, size: int, value: int) -> None:
        """Drive line ``offset`` to ``value`` (1, 2 or 4 bytes)."""
        if offset < len(self._lines):
            self._lines[offset](value & ((1 << (8 * size)) - 1) != 0)
