"""A page of memory that stands for a local APIC's registers while a guest runs.

It is VT-x's virtual-APIC page and AVIC's backing page. The processor itself keeps requested and in-service interrupts
there, and the priority that follows. Who may access the page, and what else comes of it, is each extension's affair.

Spec: SDM Vol. 3, "APIC Virtualization and Virtual Interrupts"; APM Vol. 2, "Virtual APIC Register Accesses".
"""

from __future__ import annotations

from typing import Final

from vtx.x86.memory import PhysicalMemory

# Offsets of registers; ISR, TMR and IRR are eight registers of 32 vectors each.
ID: Final = 0x020
TPR: Final = 0x080
PPR: Final = 0x0A0
EOI: Final = 0x0B0
DFR: Final = 0x0E0
ISR: Final = 0x100
TMR: Final = 0x180
IRR: Final = 0x200
ICR_LOW: Final = 0x300
ICR_HIGH: Final = 0x310
SELF_IPI: Final = 0x3F0

PRIORITY_CLASS: Final = 0xF0
"""Bits of a vector or task priority that interrupt priority looks at."""

_REGISTER_SHIFT: Final = 4  # of the offset, from a register's number
_VECTOR_REGISTERS: Final = 8


def priority(task: int, in_service: int) -> int:
    """The processor priority for a task priority and the vector in service, 0 without one."""
    return task if task & PRIORITY_CLASS >= in_service & PRIORITY_CLASS else in_service & PRIORITY_CLASS


class ApicPage:
    """The page at physical address ``page``."""

    def __init__(self, memory: PhysicalMemory, page: int) -> None:
        self.memory = memory
        self.page = page

    def read(self, offset: int, size: int = 4) -> int:
        """``size`` bytes of the page at ``offset``."""
        return int.from_bytes(self.memory.read(self.page + offset, size), "little")

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Store ``size`` bytes at ``offset`` of the page."""
        self.memory.write(self.page + offset, value.to_bytes(size, "little"))

    def _address(self, base: int, vector: int) -> int:
        return self.page + base + (vector >> 5 << _REGISTER_SHIFT)

    def is_set(self, base: int, vector: int) -> bool:
        """Whether the bit of ``vector`` is 1 in ISR, TMR or IRR."""
        return bool(self.memory.read_u32(self._address(base, vector)) >> (vector & 31) & 1)

    def set(self, base: int, vector: int) -> None:
        """Set the bit of ``vector``."""
        address = self._address(base, vector)
        self.memory.write_u32(address, self.memory.read_u32(address) | 1 << (vector & 31))

    def clear(self, base: int, vector: int) -> int:
        """Clear the bit of ``vector``; the highest vector still set, 0 without one."""
        address = self._address(base, vector)
        self.memory.write_u32(address, self.memory.read_u32(address) & ~(1 << (vector & 31)))
        return self.highest(base)

    def highest(self, base: int) -> int:
        """The highest vector whose bit is 1, 0 without one."""
        for number in range(_VECTOR_REGISTERS - 1, -1, -1):
            bits = self.memory.read_u32(self.page + base + (number << _REGISTER_SHIFT))
            if bits:
                return number << 5 | bits.bit_length() - 1
        return 0
