"""The processor state in which an image is entered, for each kind of entry.

Protected and 64-bit entry come with a GDT and a small stack in low memory, which Multiboot does not promise but does
not forbid; the IDT is empty, so an exception before the image has its own is a shutdown and not a jump into nowhere.
"""

from __future__ import annotations

import struct

from attrs import frozen

from vtx.boot.layout import PAGE, Layout
from vtx.x86.memory import HIGH_RAM_START
from vtx.x86.state import (
    AccessRights,
    CpuState,
    Cr0,
    Cr4,
    DescriptorTable,
    Efer,
    Gpr,
    Rflags,
    Segment,
    SegmentRegister,
)

STACK_SIZE = 16 << 10
BOOT_DRIVE = 0x80

CODE_SELECTOR, DATA_SELECTOR, LONG_CODE_SELECTOR = 0x08, 0x10, 0x18
_CODE_DESCRIPTOR = 0x00CF_9B00_0000_FFFF
_LONG_CODE_DESCRIPTOR = 0x00AF_9B00_0000_FFFF
_DATA_DESCRIPTOR = 0x00CF_9300_0000_FFFF
GDT = struct.pack("<4Q", 0, _CODE_DESCRIPTOR, _DATA_DESCRIPTOR, _LONG_CODE_DESCRIPTOR)


@frozen
class BootSegments:
    """A boot GDT and the selectors of its flat code and data segments."""

    gdt: bytes
    code: int
    data: int


OWN_32 = BootSegments(GDT, CODE_SELECTOR, DATA_SELECTOR)
OWN_64 = BootSegments(GDT, LONG_CODE_SELECTOR, DATA_SELECTOR)
LINUX_32 = BootSegments(struct.pack("<4Q", 0, 0, _CODE_DESCRIPTOR, _DATA_DESCRIPTOR), 0x10, 0x18)
LINUX_64 = BootSegments(struct.pack("<4Q", 0, 0, _LONG_CODE_DESCRIPTOR, _DATA_DESCRIPTOR), 0x10, 0x18)
"""The selectors that the Linux boot protocol fixes (__BOOT_CS and __BOOT_DS)."""

_FLAT = AccessRights.GRANULARITY | AccessRights.PRESENT | AccessRights.CODE_OR_DATA | AccessRights.ACCESSED
_DATA = int(_FLAT | AccessRights.DEFAULT_BIG | AccessRights.WRITABLE_OR_READABLE)
_CODE = int(_FLAT | AccessRights.WRITABLE_OR_READABLE | AccessRights.CODE | AccessRights.DEFAULT_BIG)
_LONG_CODE = int(_FLAT | AccessRights.WRITABLE_OR_READABLE | AccessRights.CODE | AccessRights.LONG)

_PRESENT_WRITABLE = 0x3
_LARGE_PAGE = 0x83
_LARGE_PAGE_SIZE = 2 << 20
_TABLE_ENTRIES = 512


def enter_real_mode(cpu: CpuState, entry: int) -> None:
    """16-bit real-address mode at physical ``entry`` below 1 MiB, as firmware enters a boot sector.

    Interrupts are off; `vtx.boot.firmware` has set up the vectors at 0. DL is the first hard disk.
    """
    paragraph = entry >> 4 if entry > 0xFFFF else 0
    for register in SegmentRegister:
        cpu.segments[register] = Segment()
    cpu.segments[SegmentRegister.CS] = Segment(paragraph, paragraph << 4, 0xFFFF, 0x9B)
    cpu.rip = entry - (paragraph << 4)
    cpu.rflags = int(Rflags.FIXED_1)
    cpu.cr0 = int(Cr0.ET)
    cpu.idtr = DescriptorTable(0, 0x3FF)
    cpu.gpr[Gpr.RSP] = min(entry, 0x7C00) & ~1
    cpu.gpr[Gpr.RDX] = BOOT_DRIVE


def enter_protected_mode(cpu: CpuState, layout: Layout, entry: int, segments: BootSegments = OWN_32) -> None:
    """32-bit protected mode with flat segments, paging and interrupts off.

    Spec: Multiboot Specification, "Machine state".
    """
    _load_segments(cpu, layout, segments, _CODE)
    cpu.cr0 = int(Cr0.PE | Cr0.ET)
    cpu.rip = entry


def enter_64_bit_mode(cpu: CpuState, layout: Layout, entry: int, segments: BootSegments = OWN_64) -> None:
    """64-bit mode; all RAM and the first 4 GiB are mapped one to one, writable, in 2-MiB pages.

    Spec: SDM Vol. 3, "Initializing IA-32e Mode".
    """
    _load_segments(cpu, layout, segments, _LONG_CODE)
    cpu.cr3 = _identity_map(layout)
    cpu.cr4 = int(Cr4.PAE)
    cpu.efer = int(Efer.LME | Efer.LMA)
    cpu.cr0 = int(Cr0.PG | Cr0.PE | Cr0.ET)
    cpu.rip = entry


def _load_segments(cpu: CpuState, layout: Layout, segments: BootSegments, code_rights: int) -> None:
    gdt = layout.allocate_low(len(segments.gdt), "the boot GDT")
    layout.memory.write(gdt, segments.gdt)
    stack = layout.allocate_low(STACK_SIZE, "the boot stack")
    for register in SegmentRegister:
        cpu.segments[register] = Segment(segments.data, 0, 0xFFFF_FFFF, _DATA)
    cpu.segments[SegmentRegister.CS] = Segment(segments.code, 0, 0xFFFF_FFFF, code_rights)
    cpu.ldtr = Segment(0, 0, 0, int(AccessRights.UNUSABLE))
    cpu.tr = Segment(0, 0, 0xFFFF, 0x8B)
    cpu.gdtr = DescriptorTable(gdt, len(segments.gdt) - 1)
    cpu.idtr = DescriptorTable(0, 0)
    cpu.rflags = int(Rflags.FIXED_1)
    cpu.gpr[Gpr.RSP] = stack + STACK_SIZE


def _identity_map(layout: Layout) -> int:
    """Build the page tables and return the address of the top one."""
    top = max(HIGH_RAM_START, *(ram.start + ram.size for ram in layout.memory.ram))
    entries = [_LARGE_PAGE | address for address in range(0, top, _LARGE_PAGE_SIZE)]
    address = 0
    for level in ("page directories", "page-directory-pointer tables", "PML4 table"):
        tables = -(-len(entries) // _TABLE_ENTRIES)
        address = layout.allocate_low(tables * PAGE, f"the boot {level}", PAGE)
        layout.memory.write(address, struct.pack(f"<{len(entries)}Q", *entries))
        entries = [_PRESENT_WRITABLE | address + table * PAGE for table in range(tables)]
    return address
