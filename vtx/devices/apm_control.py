"""The ports through which software asks firmware for a service, as advanced power management did: B2H and B3H.

A write to B2H latches a command and causes a system-management interrupt, on the processor that wrote it; B3H only
holds a byte for the handler.

Interpretations. Chipsets assert the SMI# pins of all processors; here, as in other virtual PCs, one handler runs.

Threats: the guest causes as many system-management interrupts as it likes; one can be pending at a time.

Spec: Intel 82371AB (PIIX4) data sheet, "Advanced Power Management Control Port", "Advanced Power Management Status
Port".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import define

from vtx.devices.ports import read_as_bytes, write_as_bytes

CONTROL: Final = 0
STATUS: Final = 1


@define(slots=True)
class ApmState:
    """The bytes written last."""

    control: int = 0
    status: int = 0


class ApmControl:
    """Ports B2H (offset 0) and B3H; ``interrupt`` causes the system-management interrupt."""

    def __init__(self, interrupt: Callable[[], None]) -> None:
        self.state = ApmState()
        self._interrupt = interrupt

    def port_read(self, offset: int, size: int) -> int:
        """The bytes written last."""
        return read_as_bytes(self._read, offset, size)

    def port_write(self, offset: int, size: int, value: int) -> None:
        """Latch; a write of the control port interrupts."""
        write_as_bytes(self._write, offset, size, value)

    def _read(self, offset: int) -> int:
        return {CONTROL: self.state.control, STATUS: self.state.status}.get(offset, 0xFF)

    def _write(self, offset: int, value: int) -> None:
        if offset == CONTROL:
            self.state.control = value
            self._interrupt()
        elif offset == STATUS:
            self.state.status = value
