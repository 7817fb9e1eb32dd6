"""Physical memory: RAM shared with the engine, firmware's ROM, device windows, and nothing.

One page is each processor's own, with its local APIC behind it: a processor finds it where it has put it, even over
RAM, and no other processor sees it there.

RAM is one anonymous mapping, so the model and the engine see the same bytes without copies. As on a PC, RAM above
3 GiB continues at 4 GiB, and the last page below 4 GiB, where the reset vector is, is ROM; it is also seen below 1 MiB
if RAM does not reach there. An address that is neither RAM nor ROM nor a device reads as ones; only RAM and devices
take writes.
"""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from attrs import frozen

from vtx.addresses import PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE

LOW_RAM_END = 0xC000_0000
HIGH_RAM_START = 0x1_0000_0000
ZERO_PAGE = bytes(PAGE_SIZE)
ROM_PAGES = (0xF_FFFF, 0xFF)


class MmioDevice(Protocol):
    """A device seen through a window of physical addresses; offsets only, no knowledge of where it sits."""

    def mmio_read(self, offset: int, size: int) -> int:
        """Value of ``size`` bytes (1, 2, 4 or 8) at ``offset``."""
        ...

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """Store ``size`` bytes at ``offset``."""
        ...


@frozen
class RamRange:
    """``size`` bytes of RAM at physical address ``start``, at ``offset`` in the backing mapping."""

    start: int
    size: int
    offset: int


@frozen
class MmioWindow:
    """A device's window; start and size are page-aligned."""

    start: int
    size: int
    device: MmioDevice


class _Nothing:
    """What answers where there is nothing."""

    def mmio_read(self, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        pass


class PhysicalMemory:
    """The physical address space of a machine.

    ``size`` is the RAM size in bytes, a multiple of the page size, ``rom`` what the one page of ROM holds; without it
    there is none. ``code_written`` is called with the page number
    whenever the model writes to a page listed in ``code_pages`` (pages the engine has translated code from).
    ``own_page`` is the number of the page at which the running processor finds ``own_device``, None if it is hidden.
    ``dirty`` has the numbers of the pages that may have been written since somebody last cleared it: the model's writes
    are noted here, the engine's when it is allowed to make them.
    """

    def __init__(self, size: int, rom: bytes = b"") -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise ValueError(f"RAM size {size:#x} is not a positive multiple of {PAGE_SIZE:#x}")
        if len(rom) not in (0, PAGE_SIZE):
            raise ValueError(f"ROM of {len(rom)} bytes is not one page")
        self.size = size
        self.rom = rom
        self.backing = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = memoryview(self.backing)
        self._qwords = self._bytes.cast("Q")
        self._dwords = self._bytes.cast("I")
        low = min(size, LOW_RAM_END)
        self.ram: tuple[RamRange, ...] = (RamRange(0, low, 0),)
        if size > low:
            self.ram += (RamRange(HIGH_RAM_START, size - low, low),)
        self._low_end = low
        self._high_end = HIGH_RAM_START + (size - low)
        self.windows: list[MmioWindow] = []
        self.own_page: int | None = None
        self.own_device: MmioDevice = _Nothing()
        self.code_pages: set[int] = set()
        self.dirty: set[int] = set()
        self.code_written: Callable[[int], None] = lambda page: None

    def add_window(self, start: int, size: int, device: MmioDevice) -> None:
        """Map ``device`` at page-aligned ``start``; windows do not overlap RAM or each other."""
        bisect.insort(self.windows, MmioWindow(start, size, device), key=lambda window: window.start)

    def window_at(self, address: int) -> MmioWindow | None:
        """The device window that holds ``address``, if any."""
        if address >> PAGE_SHIFT == self.own_page:
            return MmioWindow(address & ~PAGE_OFFSET_MASK, PAGE_SIZE, self.own_device)
        for window in self.windows:
            if window.start <= address < window.start + window.size:
                return window
        return None

    def ram_offset(self, address: int) -> int | None:
        """Offset of physical ``address`` in the backing mapping, or None where there is no RAM."""
        if 0 <= address < self._low_end:
            return address
        if HIGH_RAM_START <= address < self._high_end:
            return address - HIGH_RAM_START + self._low_end
        return None

    def is_rom(self, page: int) -> bool:
        """Whether the page of this number is ROM."""
        return page in ROM_PAGES and bool(self.rom) and self.ram_offset(page << PAGE_SHIFT) is None

    def is_backed(self, address: int, size: int = 1) -> bool:
        """Whether RAM holds all of ``size`` bytes at ``address``."""
        first = self.ram_offset(address)
        last = self.ram_offset(address + size - 1)
        return first is not None and last is not None and last - first == size - 1

    def read(self, address: int, size: int) -> bytes:
        """``size`` bytes at ``address``; ones where nothing answers."""
        offset = self.ram_offset(address)
        if offset is not None and self.is_backed(address, size):
            return self._bytes[offset : offset + size].tobytes()
        pieces = bytearray()
        while size:
            length = min(size, PAGE_SIZE - address % PAGE_SIZE)
            offset = self.ram_offset(address)
            if offset is not None:
                pieces += self._bytes[offset : offset + length]
            elif self.is_rom(address >> PAGE_SHIFT):
                pieces += self.rom[address % PAGE_SIZE :][:length]
            elif (window := self.window_at(address)) and length in (1, 2, 4, 8):
                value = window.device.mmio_read(address - window.start, length)
                pieces += value.to_bytes(length, "little")
            else:
                pieces += b"\xff" * length
            address += length
            size -= length
        return bytes(pieces)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``address``; dropped where nothing answers."""
        position, offset = 0, self.ram_offset(address)
        if offset is not None and address % PAGE_SIZE + len(data) <= PAGE_SIZE:
            self._bytes[offset : offset + len(data)] = data
            self.note_written(address >> PAGE_SHIFT)
            return
        while position < len(data):
            length = min(len(data) - position, PAGE_SIZE - address % PAGE_SIZE)
            piece = data[position : position + length]
            offset = self.ram_offset(address)
            if offset is not None:
                self._bytes[offset : offset + length] = piece
                self.dirty.add(address >> PAGE_SHIFT)
                if address >> PAGE_SHIFT in self.code_pages:
                    self.code_written(address >> PAGE_SHIFT)
            elif (window := self.window_at(address)) and length in (1, 2, 4, 8):
                window.device.mmio_write(address - window.start, length, int.from_bytes(piece, "little"))
            address += length
            position += length

    def note_written(self, page: int) -> None:
        """Somebody stored to RAM through ``backing``, in the page of this number: has to be called every time."""
        self.dirty.add(page)
        if page in self.code_pages:
            self.code_written(page)

    def put_pages(self, pages: Collection[int], contents: Mapping[int, bytes]) -> None:
        """Store ``contents``, zeros where they have none, in the RAM pages of these numbers. Not noted in ``dirty``."""
        view, low_end, content_of = self.backing, self._low_end, contents.get
        for page in pages:
            offset = page << PAGE_SHIFT
            if offset >= low_end:
                offset += low_end - HIGH_RAM_START
            view[offset : offset + PAGE_SIZE] = content_of(page, ZERO_PAGE)
        for page in sorted(self.code_pages.intersection(pages)):
            self.code_written(page)

    def read_u64(self, address: int) -> int:
        """The 8-byte value at ``address``."""
        if not address & 7:
            offset = self.ram_offset(address)
            if offset is not None:
                return self._qwords[offset >> 3]
        return int.from_bytes(self.read(address, 8), "little")

    def read_at(self, offset: int) -> int:
        """The 8-byte value at an aligned ``offset`` in RAM (see `ram_offset`)."""
        return self._qwords[offset >> 3]

    def write_u64(self, address: int, value: int) -> None:
        """Store an 8-byte value."""
        if not address & 7:
            offset = self.ram_offset(address)
            if offset is not None:
                self._qwords[offset >> 3] = value
                self.dirty.add(address >> PAGE_SHIFT)
                if address >> PAGE_SHIFT in self.code_pages:
                    self.code_written(address >> PAGE_SHIFT)
                return
        self.write(address, value.to_bytes(8, "little"))

    def read_u32(self, address: int) -> int:
        """The 4-byte value at ``address``."""
        if not address & 3:
            offset = self.ram_offset(address)
            if offset is not None:
                return self._dwords[offset >> 2]
        return int.from_bytes(self.read(address, 4), "little")

    def write_u32(self, address: int, value: int) -> None:
        """Store a 4-byte value."""
        self.write(address, value.to_bytes(4, "little"))

    def read_u16(self, address: int) -> int:
        """The 2-byte value at ``address``."""
        return int.from_bytes(self.read(address, 2), "little")

    def write_u16(self, address: int, value: int) -> None:
        """Store a 2-byte value."""
        self.write(address, value.to_bytes(2, "little"))

    def read_u8(self, address: int) -> int:
        """The byte at ``address``."""
        return self.read(address, 1)[0]

    def write_u8(self, address: int, value: int) -> None:
        """Store a byte."""
        self.write(address, bytes((value,)))
