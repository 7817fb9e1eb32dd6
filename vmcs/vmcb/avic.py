"""AVIC as data: how each register of the virtual APIC may be accessed, the APIC ID tables, what its #VMEXITs report.

Spec: APM Vol. 2, "Advanced Virtual Interrupt Controller", "Virtual APIC Register Accesses", "Physical APIC ID Table",
"Logical APIC ID Table", "AVIC IPI Delivery Not Completed", "AVIC Access to Un-accelerated vAPIC register", "x2AVIC".
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Final

from attrs import frozen

from vmcs.bits import MASK64, bit_range


class Behavior(enum.Enum):
    """What an access of the guest does: uses the backing page, is acted on by the processor, or exits."""

    ALLOWED = "allowed"
    ACCELERATED = "accelerated"
    FAULT = "#VMEXIT before the access"
    TRAP = "#VMEXIT after the access"


@frozen
class VirtualRegister:
    """A register of the virtual APIC, at ``offset`` of the backing page."""

    offset: int
    name: str
    read: Behavior
    write: Behavior


_ALLOWED, _ACCELERATED, _FAULT, _TRAP = Behavior


def _several(offset: int, name: str, count: int, read: Behavior, write: Behavior) -> Iterator[VirtualRegister]:
    for number in range(count):
        yield VirtualRegister(offset + 16 * number, f"{name}{number}", read, write)


REGISTERS: Final[tuple[VirtualRegister, ...]] = (
    VirtualRegister(0x020, "APIC ID", _ALLOWED, _TRAP),
    VirtualRegister(0x030, "APIC version", _ALLOWED, _FAULT),
    VirtualRegister(0x080, "task priority", _ALLOWED, _ACCELERATED),
    VirtualRegister(0x090, "arbitration priority", _FAULT, _FAULT),
    VirtualRegister(0x0A0, "processor priority", _ALLOWED, _FAULT),
    VirtualRegister(0x0B0, "end of interrupt", _ALLOWED, _ACCELERATED),
    VirtualRegister(0x0C0, "remote read", _ALLOWED, _TRAP),
    VirtualRegister(0x0D0, "logical destination", _ALLOWED, _TRAP),
    VirtualRegister(0x0E0, "destination format", _ALLOWED, _TRAP),
    VirtualRegister(0x0F0, "spurious-interrupt vector", _ALLOWED, _TRAP),
    *_several(0x100, "in-service ", 8, _ALLOWED, _FAULT),
    *_several(0x180, "trigger mode ", 8, _ALLOWED, _FAULT),
    *_several(0x200, "interrupt request ", 8, _ALLOWED, _FAULT),
    VirtualRegister(0x280, "error status", _ALLOWED, _TRAP),
    VirtualRegister(0x300, "interrupt command, low", _ALLOWED, _ACCELERATED),
    VirtualRegister(0x310, "interrupt command, high", _ALLOWED, _ALLOWED),
    VirtualRegister(0x320, "timer vector", _ALLOWED, _TRAP),
    VirtualRegister(0x330, "thermal vector", _ALLOWED, _TRAP),
    VirtualRegister(0x340, "performance-counter vector", _ALLOWED, _TRAP),
    VirtualRegister(0x350, "LINT0 vector", _ALLOWED, _TRAP),
    VirtualRegister(0x360, "LINT1 vector", _ALLOWED, _TRAP),
    VirtualRegister(0x370, "error vector", _ALLOWED, _TRAP),
    VirtualRegister(0x380, "timer initial count", _ALLOWED, _TRAP),
    VirtualRegister(0x390, "timer current count", _FAULT, _FAULT),
    VirtualRegister(0x3E0, "timer divide configuration", _ALLOWED, _TRAP),
    VirtualRegister(0x400, "extended APIC feature", _FAULT, _FAULT),
    VirtualRegister(0x410, "extended APIC control", _FAULT, _FAULT),
    VirtualRegister(0x420, "specific end of interrupt", _FAULT, _FAULT),
    *_several(0x480, "interrupt enable ", 8, _FAULT, _FAULT),
    *_several(0x500, "extended interrupt vector ", 4, _FAULT, _FAULT),
)
BY_OFFSET: Final[Mapping[int, VirtualRegister]] = {each.offset: each for each in REGISTERS}
_FIRST_RESERVED: Final = 0x540


def behavior(offset: int, *, write: bool) -> Behavior:
    """What an access of the register at ``offset``, a multiple of 16, does."""
    register = BY_OFFSET.get(offset)
    if register is None:
        return _FAULT if offset >= _FIRST_RESERVED else _ALLOWED
    return register.write if write else register.read


# x2AVIC: registers as MSRs.

FIRST_X2APIC_MSR: Final = 0x800
LAST_X2APIC_MSR: Final = 0x8FF
SELF_IPI_OFFSET: Final = 0x3F0
ICR_OFFSET: Final = 0x300
_NOT_AS_MSRS: Final = frozenset((0x0C0, 0x0E0, 0x310))

X2APIC_RESERVED: Final[Mapping[int, int]] = {
    0x020: MASK64,
    0x080: MASK64 & ~0xFF,
    0x0B0: MASK64,
    0x280: MASK64,
    0x300: bit_range(31, 20) | bit_range(17, 16) | bit_range(13, 12),
    0x3F0: MASK64 & ~0xFF,
}
"""Bits that WRMSR must not set, by the register's offset; 63:32 where there is no row."""


def is_x2apic_register(offset: int, *, write: bool) -> bool:
    """Whether x2APIC mode has an MSR for the register at ``offset`` that can be read, or written."""
    if offset == SELF_IPI_OFFSET:
        return write
    return offset in BY_OFFSET and offset not in _NOT_AS_MSRS


# The tables of APIC IDs.

TABLE_ADDRESS: Final = bit_range(51, 12)
"""Of a pointer in the VMCB, and of an entry of the physical table: the address of a page."""
LAST_INDEX: Final = 0xFFF
"""Of AVIC PHYSICAL_TABLE: AVIC_PHYSICAL_MAX_INDEX."""
MOST_XAVIC: Final = 0xFF
MOST_X2AVIC: Final = 0x1FF
PHYSICAL_ENTRY_SIZE: Final = 8
PHYSICAL_VALID: Final = 1 << 63
PHYSICAL_IS_RUNNING: Final = 1 << 62
PHYSICAL_HOST_ID: Final = 0xFFF
LOGICAL_ENTRY_SIZE: Final = 4
LOGICAL_VALID: Final = 1 << 31
LOGICAL_GUEST_ID: Final = LOGICAL_VALID - 1


class IpiFailure(enum.IntEnum):
    """Why an interprocessor interrupt is incomplete: ID in EXITINFO2."""

    INVALID_TYPE = 0
    TARGET_NOT_RUNNING = 1
    INVALID_TARGET = 2
    INVALID_BACKING_PAGE = 3
    INVALID_VECTOR = 4


IPI_FAILURE_SHIFT: Final = 32
NOACCEL_WRITE: Final = 1 << 32
"""EXITINFO1 of AVIC_NOACCEL: the access was a write; bits 11:4 are those of the register's offset."""
