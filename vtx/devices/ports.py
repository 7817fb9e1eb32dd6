"""What port devices look like to the machine, and how a byte-wide device answers wider accesses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

InterruptLine = Callable[[bool], None]
"""Drives one interrupt request line: True asserts it, False deasserts it."""


class PortDevice(Protocol):
    """A device in I/O space; ``offset`` counts from the device's first port, ``size`` is 1, 2 or 4 bytes."""

    def port_read(self, offset: int, size: int) -> int:
        """Value of ``size`` bytes at ``offset``."""
        ...

    def port_write(self, offset: int, size: int, value: int) -> None:
        """Store the low ``size`` bytes of ``value`` at ``offset``."""
        ...


def unconnected(level: bool) -> None:
    """An interrupt line that leads nowhere."""


def read_as_bytes(read_byte: Callable[[int], int], offset: int, size: int) -> int:
    """Read of an 8-bit device: the bus splits a wider access into byte accesses at ascending ports."""
    value = 0
    for index in range(size):
        value |= read_byte(offset + index) << (8 * index)
    return value


def write_as_bytes(write_byte: Callable[[int, int], None], offset: int, size: int, value: int) -> None:
    """Write to an 8-bit device: the bus splits a wider access into byte accesses at ascending ports."""
    for index in range(size):
        write_byte(offset + index, value >> (8 * index) & 0xFF)
