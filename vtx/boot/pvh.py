"""Kernels with a PVH entry point: ELF files that say in a note where they are entered in 32-bit protected mode.

Spec: Xen documentation, "x86/HVM direct boot ABI".
"""

from __future__ import annotations

import struct
from typing import Final

from vtx.boot import acpi
from vtx.boot.elf import ElfImage
from vtx.boot.entry import enter_protected_mode
from vtx.boot.image import BootError, BootOptions, ImageFormat, LoadedImage, c_string
from vtx.boot.layout import Layout, memory_map
from vtx.boot.linux import DEFAULT_RAMDISK_HIGHEST, place_ramdisk
from vtx.x86.state import CpuState, Gpr, Segment

NOTE_OWNER: Final = "Xen"
NOTE_ENTRY: Final = 18  # XEN_ELFNOTE_PHYS32_ENTRY

START_INFO: Final = struct.Struct("<4I4Q2I")
MODULE: Final = struct.Struct("<4Q")
MAP_ENTRY: Final = struct.Struct("<QQII")
MAGIC: Final = 0x336E_C578
VERSION: Final = 1
_BUSY_32_BIT_TSS: Final = 0x8B
_TSS_LIMIT: Final = 0x67


def entry_of(elf: ElfImage) -> int | None:
    """Physical address of the PVH entry point, None if the image has none."""
    for note in elf.notes:
        if note.owner == NOTE_OWNER and note.type == NOTE_ENTRY and len(note.contents) in (4, 8):
            return int.from_bytes(note.contents, "little")
    return None


def load_pvh(elf: ElfImage, image: bytes, layout: Layout, options: BootOptions, cpu: CpuState) -> LoadedImage:
    """Load the image, write its start-of-day information and set ``cpu`` up for the entry point."""
    entry = entry_of(elf)
    if entry is None:
        raise BootError("ELF file has no PVH entry point")
    if not any(each.physical <= entry < each.physical + each.memory_size for each in elf.segments):
        raise BootError(f"PVH entry point {entry:#x} lies in no segment")
    elf.place(image, layout)
    information = _write_start_info(layout, options)
    enter_protected_mode(cpu, layout, entry)
    cpu.tr = Segment(0, 0, _TSS_LIMIT, _BUSY_32_BIT_TSS)
    cpu.gpr[Gpr.RBX] = information
    return LoadedImage(ImageFormat.PVH, entry, cpu, tuple(layout.ranges), information)


def _write_start_info(layout: Layout, options: BootOptions) -> int:
    """The start-of-day information with everything it points to in one block; returns its address."""
    text = c_string(options.command_line, "command line")
    ramdisk, ramdisk_size = place_ramdisk(layout, options, DEFAULT_RAMDISK_HIGHEST)
    entries = memory_map(layout.memory)
    table = b"".join(MAP_ENTRY.pack(entry.start, entry.size, entry.type, 0) for entry in entries)
    modules = MODULE.pack(ramdisk, ramdisk_size, 0, 0) if ramdisk_size else b""
    size = START_INFO.size + len(table) + len(modules) + len(text)
    address = layout.allocate_low(size, "the PVH start information")
    map_address = address + START_INFO.size
    modules_address = map_address + len(table)
    information = START_INFO.pack(
        MAGIC,
        VERSION,
        0,
        1 if modules else 0,
        modules_address if modules else 0,
        modules_address + len(modules),
        acpi.rsdp_address(layout.memory) or 0,
        map_address,
        len(entries),
        0,
    )
    layout.memory.write(address, information + table + modules + text)
    return address
