"""Storage on ports and in device memory that does nothing but remember: conformance suites test accesses with it.

Threats: none; it is four bytes and 64 KiB of the guest's own data, and no access leaves them.
"""

from __future__ import annotations

from typing import Final

from attrs import define, field

MEMORY_SIZE: Final = 0x1_0000
PORTS: Final = 4


@define(slots=True)
class TestPorts:
    """Four ports that hold a byte each and are read and written together or apart."""

    __test__ = False  # the name is not a test's

    state: bytearray = field(factory=lambda: bytearray(PORTS))

    def port_read(self, offset: int, size: int) -> int:
        """The bytes at ``offset``; zero beyond the last."""
        return int.from_bytes(self.state[offset : offset + size], "little")

    def port_write(self, offset: int, size: int, value: int) -> None:
        """Store bytes at ``offset``; those beyond the last are dropped."""
        room = min(size, PORTS - offset)
        self.state[offset : offset + room] = value.to_bytes(8, "little")[:room]


@define(slots=True)
class TestMemory:
    """64 KiB of memory behind a device window, so that every access is a device access."""

    __test__ = False

    state: bytearray = field(factory=lambda: bytearray(MEMORY_SIZE))

    def mmio_read(self, offset: int, size: int) -> int:
        """The bytes at ``offset``."""
        return int.from_bytes(self.state[offset : offset + size], "little")

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """Store bytes at ``offset``."""
        self.state[offset : offset + size] = value.to_bytes(8, "little")[:size]
