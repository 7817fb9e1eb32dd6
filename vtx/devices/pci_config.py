"""PCI configuration mechanism #1 in front of a bus without devices.

Offset 0 is the address register, which only a 4-byte access reaches; offset 4 the data window, behind which nothing
answers: it reads as ones, as configuration reads of an absent function do, and drops writes.

Threats: the guest chooses the address; it selects nothing.

Spec: PCI Local Bus Specification, "Software Generation of Configuration Transactions".
"""

from __future__ import annotations

from attrs import define

ADDRESS_BITS = 0x80FF_FFFC  # enable, bus, device, function, register


@define(slots=True)
class PciConfigState:
    """The address register."""

    address: int = 0


class PciConfig:
    """The device, eight ports."""

    def __init__(self) -> None:
        self.state = PciConfigState()

    def port_read(self, offset: int, size: int) -> int:
        """The address register, or ones."""
        if offset == 0 and size == 4:
            return self.state.address
        return (1 << 8 * size) - 1

    def port_write(self, offset: int, size: int, value: int) -> None:
        """Set the address register; everything else is dropped."""
        if offset == 0 and size == 4:
            self.state.address = value & ADDRESS_BITS
