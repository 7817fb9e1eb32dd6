"""The sub-page-permission tables: which 128-byte parts of a guest-physical page may be written.

Spec: SDM Vol. 3, "VMX Support for Address Translation", "Sub-Page Write Permissions".
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vtx.addresses import PAGE_OFFSET_MASK, GuestPhysicalAddress
from vtx.x86.paging import PagedMemory
from vtx.x86.second_level import SecondLevelFault

SUB_PAGE_SHIFT: Final = 7
_VALID: Final = 1
_TABLE_SHIFTS: Final = (39, 30, 21)  # of the index into the tables that reference tables
_LAST_SHIFT: Final = 12
_RESERVED: Final = 0xFFE | 0xFFF << 52
_RESERVED_IN_LAST: Final = 0xAAAA_AAAA_AAAA_AAAA


@frozen
class SubPageEvent(SecondLevelFault):
    """VM exit with reason 66: an entry of the tables is not valid (``miss``), or misconfigured."""

    miss: bool


@frozen
class SubPageTables:
    """The tables at physical ``root``, the sub-page-permission-table pointer."""

    root: int
    physical_address_width: int
    memory: PagedMemory

    def allows(self, address: GuestPhysicalAddress, size: int) -> bool | SubPageEvent:
        """Whether ``size`` bytes from ``address``, all in one page, may be written."""
        reserved = _RESERVED | (1 << 52) - (1 << self.physical_address_width)
        table = self.root
        for shift in _TABLE_SHIFTS:
            entry = self._entry(table, address, shift)
            if not entry & _VALID:
                return SubPageEvent(address, None, miss=True)
            if entry & reserved:
                return SubPageEvent(address, None, miss=False)
            table = entry & ~PAGE_OFFSET_MASK
        permissions = self._entry(table, address, _LAST_SHIFT)
        if permissions & _RESERVED_IN_LAST:
            return SubPageEvent(address, None, miss=False)
        first = (address & PAGE_OFFSET_MASK) >> SUB_PAGE_SHIFT
        last = (address + size - 1 & PAGE_OFFSET_MASK) >> SUB_PAGE_SHIFT
        return all(permissions >> 2 * number & 1 for number in range(first, last + 1))

    def _entry(self, table: int, address: int, shift: int) -> int:
        return self.memory.read_u64(table | (address >> shift & 0x1FF) << 3)
