"""Who occupies which physical memory at boot, and the memory map the image is told.

As on a PC, 9FC00H-FFFFFH is reserved although RAM backs it, and RAM beyond 3 GiB continues at 4 GiB.
"""

from __future__ import annotations

import bisect
import enum

from attrs import frozen

from vtx.boot.image import BootError, Range
from vtx.x86.memory import HIGH_RAM_START, PhysicalMemory

KIB = 1 << 10
MIB = 1 << 20
CONVENTIONAL_END = 0x9_FC00
PAGE = 1 << 12
LOWEST_ALLOCATION = PAGE  # page 0 has the real-mode vectors
ZEROS = bytes(MIB)
APIC_WINDOWS = (0xFEC0_0000, 0xFEE0_0000)


class MemoryType(enum.IntEnum):
    """Types of the memory map, the same numbers in Multiboot 1 and 2."""

    AVAILABLE = 1
    RESERVED = 2


@frozen
class MemoryMapEntry:
    """``size`` bytes at physical address ``start``."""

    start: int
    size: int
    type: MemoryType

    @property
    def end(self) -> int:
        """The first address beyond."""
        return self.start + self.size


def memory_map(memory: PhysicalMemory) -> tuple[MemoryMapEntry, ...]:
    """The machine's memory map in ascending order."""
    low, *high = memory.ram
    entries = [MemoryMapEntry(0, min(low.size, CONVENTIONAL_END), MemoryType.AVAILABLE)]
    if low.size > CONVENTIONAL_END:
        reserved = min(low.size, MIB) - CONVENTIONAL_END
        entries.append(MemoryMapEntry(CONVENTIONAL_END, reserved, MemoryType.RESERVED))
    if low.size > MIB:
        entries.append(MemoryMapEntry(MIB, low.size - MIB, MemoryType.AVAILABLE))
    entries += [MemoryMapEntry(start, PAGE, MemoryType.RESERVED) for start in APIC_WINDOWS]
    entries += [MemoryMapEntry(ram.start, ram.size, MemoryType.AVAILABLE) for ram in high]
    return tuple(entries)


def lower_and_upper_kib(memory: PhysicalMemory) -> tuple[int, int]:
    """KiB of available memory from 0 and from 1 MiB up to the first hole, as Multiboot's basic information has it."""
    low = memory.ram[0].size
    return min(low, CONVENTIONAL_END) // KIB, max(low - MIB, 0) // KIB


def _no_room(what: str, size: int) -> BootError:
    return BootError(f"no room in memory for {what} ({size:#x} bytes)")


class Layout:
    """The memory in use, as it fills up; refuses what does not fit with a `BootError`."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self.memory = memory
        self.ranges: list[Range] = []
        self._available = [entry for entry in memory_map(memory) if entry.type is MemoryType.AVAILABLE]

    def place(self, start: int, data: bytes | memoryview, size: int, what: str) -> None:
        """Put ``data`` at ``start``, followed by zeros up to ``size`` bytes."""
        if not size:
            return
        wanted = Range(start, size, what)
        self._check(wanted)
        bisect.insort(self.ranges, wanted, key=lambda used: used.start)
        self.memory.write(start, data)
        self._clear(start + len(data), wanted.end)

    def allocate_low(self, size: int, what: str, alignment: int = 16) -> int:
        """Address of ``size`` zeroed bytes, high in conventional memory if possible, else the lowest that is free."""
        start = self._highest(LOWEST_ALLOCATION, CONVENTIONAL_END, size, alignment)
        if start is None:
            return self.allocate_from(LOWEST_ALLOCATION, size, what, alignment)
        self.place(start, b"", size, what)
        return start

    def allocate_high(self, low: int, high: int, size: int, what: str, alignment: int = PAGE) -> int:
        """Address of ``size`` zeroed bytes, the last free between ``low`` and ``high``, both at most 4 GiB."""
        start = self._highest(low, min(high, HIGH_RAM_START), size, alignment)
        if start is None:
            raise _no_room(what, size)
        self.place(start, b"", size, what)
        return start

    def _highest(self, low: int, high: int, size: int, alignment: int) -> int | None:
        for gap_start, gap_end in reversed(self._gaps(low, high)):
            start = (gap_end - size) & -alignment
            if start >= gap_start:
                return start
        return None

    def allocate_from(self, low: int, size: int, what: str, alignment: int = PAGE) -> int:
        """Address of ``size`` zeroed bytes, the first free from ``low`` up to 4 GiB."""
        start = self.find_free(low, size, what, alignment)
        self.place(start, b"", size, what)
        return start

    def find_free(self, low: int, size: int, what: str, alignment: int = PAGE) -> int:
        """The first address from ``low`` up to 4 GiB at which ``size`` bytes are free; they stay free."""
        for gap_start, gap_end in self._gaps(low, HIGH_RAM_START):
            start = -(-gap_start // alignment) * alignment
            if start + size <= gap_end:
                return start
        raise _no_room(what, size)

    def is_free(self, start: int, size: int) -> bool:
        """Whether all of ``size`` bytes at ``start`` are available and not in use."""
        return any(low <= start and start + size <= high for low, high in self._gaps(start, start + size))

    def image_end(self) -> int:
        """The first address beyond everything placed below 4 GiB."""
        return max((used.end for used in self.ranges if used.start < HIGH_RAM_START), default=0)

    def _check(self, wanted: Range) -> None:
        """Refuse a range outside available memory or in use."""
        if not any(entry.start <= wanted.start and wanted.end <= entry.end for entry in self._available):
            if (
                wanted.start < MIB
                and wanted.end > CONVENTIONAL_END
                and self.memory.is_backed(wanted.start, wanted.size)
            ):
                raise BootError(f"{wanted.what} overlaps the reserved memory {CONVENTIONAL_END:#x}-{MIB - 1:#x}")
            end = self._available[-1].end
            raise BootError(f"{wanted.what} needs RAM up to {wanted.end - 1:#x}, machine has RAM up to {end - 1:#x}")
        index = bisect.bisect_left(self.ranges, wanted.start, key=lambda used: used.start)
        for used in self.ranges[max(index - 1, 0) : index + 1]:
            if used.start < wanted.end and wanted.start < used.end:
                raise BootError(f"{wanted.what} overlaps {used.what} at {max(used.start, wanted.start):#x}")

    def _gaps(self, low: int, high: int) -> list[tuple[int, int]]:
        """Start and end of the available memory between ``low`` and ``high`` that is free, ascending."""
        gaps = []
        for entry in self._available:
            start, end = max(entry.start, low), min(entry.end, high)
            for used in self.ranges:
                if start < used.end and used.start < end:
                    if start < used.start:
                        gaps.append((start, used.start))
                    start = used.end
            if start < end:
                gaps.append((start, end))
        return gaps

    def _clear(self, start: int, end: int) -> None:
        """Zero memory without touching pages that are zero already, so untouched RAM stays unallocated."""
        while start < end:
            size = min(end - start, len(ZEROS))
            if self.memory.read(start, size) != ZEROS[:size]:
                self.memory.write(start, ZEROS[:size])
            start += size
