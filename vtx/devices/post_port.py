"""The power-on self-test port: a latch that software writes progress codes to, and writes to for a short delay.

Threats: one byte the guest chooses.

Spec: IBM Personal Computer AT Technical Reference, "I/O Address Map".
"""

from __future__ import annotations

from attrs import define

from vtx.devices.ports import read_as_bytes, write_as_bytes


@define(slots=True)
class PostPortState:
    """The code written last."""

    code: int = 0


class PostPort:
    """The device, one port."""

    def __init__(self) -> None:
        self.state = PostPortState()

    def port_read(self, offset: int, size: int) -> int:
        """The code; ones beyond the port."""
        return read_as_bytes(lambda at: 0xFF if at else self.state.code, offset, size)

    def port_write(self, offset: int, size: int, value: int) -> None:
        """Latch a code; dropped beyond the port."""
        write_as_bytes(self._write, offset, size, value)

    def _write(self, offset: int, value: int) -> None:
        if offset == 0:
            self.state.code = value
