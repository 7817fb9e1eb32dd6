"""Multiboot 1 images: ELF files or flat binaries with the Multiboot header in their first 8 KiB.

Spec: Multiboot Specification version 0.6.96, "OS image format", "Machine state", "Boot information format".
"""

from __future__ import annotations

import struct

from attrs import frozen

from vtx.boot.elf import is_elf, parse_elf
from vtx.boot.entry import enter_protected_mode
from vtx.boot.image import LOADER_NAME, BootError, BootOptions, ImageFormat, LoadedImage, c_string
from vtx.boot.layout import MIB, Layout, lower_and_upper_kib, memory_map
from vtx.x86.state import CpuState, Gpr

HEADER_MAGIC = 0x1BAD_B002
BOOT_MAGIC = 0x2BAD_B002
SEARCH_LIMIT = 8192
ALIGNMENT = 4

# Header flags 15:0 are requirements. Modules are always page-aligned and memory information is always there; asked for
# a video mode, the loader may tell of none, which the absent flags of the boot information do.
KNOWN_REQUIREMENTS = 0x7
ADDRESS_FIELDS = 1 << 16

INFO_MEMORY = 1 << 0
INFO_COMMAND_LINE = 1 << 2
INFO_MODULES = 1 << 3
INFO_MEMORY_MAP = 1 << 6
INFO_LOADER_NAME = 1 << 9

INFORMATION = struct.Struct("<7I16x2I12xI48x")
MODULE = struct.Struct("<4I")
MAP_ENTRY = struct.Struct("<I2QI")


@frozen
class Header:
    """A Multiboot header and its offset in the image; the addresses count only with `ADDRESS_FIELDS`."""

    offset: int
    flags: int
    header_address: int = 0
    load_address: int = 0
    load_end: int = 0
    bss_end: int = 0
    entry: int = 0


def find_header(image: bytes) -> Header | None:
    """The first Multiboot header of ``image``, None if it has none."""
    magic = struct.pack("<I", HEADER_MAGIC)
    searched = image[:SEARCH_LIMIT]
    offset = searched.find(magic)
    while offset >= 0:
        if offset % ALIGNMENT == 0 and offset + 12 <= len(searched):
            flags, checksum = struct.unpack_from("<2I", searched, offset + 4)
            if (HEADER_MAGIC + flags + checksum) & 0xFFFF_FFFF == 0:
                return _complete(image, offset, flags)
        offset = searched.find(magic, offset + 1)
    return None


def _complete(image: bytes, offset: int, flags: int) -> Header:
    if not flags & ADDRESS_FIELDS:
        return Header(offset, flags)
    if offset + 32 > len(image):
        raise BootError("truncated Multiboot header: no room for its address fields")
    return Header(offset, flags, *struct.unpack_from("<5I", image, offset + 12))


def load_multiboot1(image: bytes, header: Header, layout: Layout, options: BootOptions, cpu: CpuState) -> LoadedImage:
    """Load ``image`` and its modules, write the boot information, and set ``cpu`` up for the entry point."""
    unknown = header.flags & 0xFFFF & ~KNOWN_REQUIREMENTS
    if unknown:
        raise BootError(f"Multiboot header requires unknown features: flags {unknown:#x}")
    if header.flags & ADDRESS_FIELDS:
        entry = place_by_addresses(
            image,
            layout,
            header_offset=header.offset,
            header_address=header.header_address,
            load=header.load_address,
            load_end=header.load_end,
            bss_end=header.bss_end,
            entry=header.entry,
        )
    elif is_elf(image):
        elf = parse_elf(image)
        elf.place(image, layout)
        entry = elf.entry
    else:
        raise BootError("Multiboot image is neither an ELF file nor has load addresses in its header")
    information = _write_information(layout, options)
    enter_protected_mode(cpu, layout, entry)
    cpu.gpr[Gpr.RAX] = BOOT_MAGIC
    cpu.gpr[Gpr.RBX] = information
    return LoadedImage(ImageFormat.MULTIBOOT1, entry, cpu, tuple(layout.ranges), information)


def place_by_addresses(
    image: bytes,
    layout: Layout,
    *,
    header_offset: int,
    header_address: int,
    load: int,
    load_end: int,
    bss_end: int,
    entry: int,
) -> int:
    """Load a flat binary by the addresses in its header and return its entry point.

    The header, at ``header_offset`` in the file, goes to ``header_address``; what is loaded begins at ``load`` and ends
    at ``load_end`` (0: with the file), and zeros follow up to ``bss_end`` (0: none).
    """
    offset = header_offset - (header_address - load)
    if load > header_address:
        raise BootError(f"Multiboot load address {load:#x} is above the header's address {header_address:#x}")
    if offset < 0:
        raise BootError(f"Multiboot load address {load:#x} lies before the start of the file")
    size = load_end - load if load_end else len(image) - offset
    if size <= 0:
        raise BootError(f"Multiboot load end {load_end:#x} is not above the load address {load:#x}")
    if offset + size > len(image):
        raise BootError(f"truncated Multiboot image: needs {offset + size:#x} bytes, file has {len(image):#x}")
    memory_size = bss_end - load if bss_end else size
    if memory_size < size:
        raise BootError(f"Multiboot bss end {bss_end:#x} is below the load end {load + size:#x}")
    layout.place(load, memoryview(image)[offset : offset + size], memory_size, "Multiboot image")
    if not load <= entry < load + memory_size:
        raise BootError(f"Multiboot entry point {entry:#x} lies outside the image")
    return entry


def place_modules(layout: Layout, options: BootOptions) -> list[tuple[int, int, bytes]]:
    """Put the modules page-aligned above the image; start, end and string of each."""
    modules = []
    for number, module in enumerate(options.modules):
        text = c_string(module.command_line, f"command line of module {number}")
        low = max(layout.image_end(), MIB)
        start = layout.allocate_from(low, max(len(module.data), 1), f"module {number}")
        layout.memory.write(start, module.data)
        modules.append((start, start + len(module.data), text))
    return modules


def _write_information(layout: Layout, options: BootOptions) -> int:
    """The boot information with everything it points to in one block; returns its address."""
    command_line = c_string(options.full_command_line, "command line")
    modules = place_modules(layout, options)
    entries = b"".join(
        MAP_ENTRY.pack(MAP_ENTRY.size - 4, entry.start, entry.size, entry.type) for entry in memory_map(layout.memory)
    )
    strings = LOADER_NAME + command_line
    tables = INFORMATION.size + len(entries) + MODULE.size * len(modules)
    size = tables + len(strings) + sum(len(text) for _, _, text in modules)
    address = layout.allocate_low(size, "the Multiboot information")

    map_address = address + INFORMATION.size
    modules_address = map_address + len(entries)
    name_address = address + tables
    command_line_address = name_address + len(LOADER_NAME)
    text_address = name_address + len(strings)
    module_table = b""
    for start, end, text in modules:
        module_table += MODULE.pack(start, end, text_address, 0)
        strings += text
        text_address += len(text)
    flags = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME
    lower, upper = lower_and_upper_kib(layout.memory)
    information = INFORMATION.pack(
        flags,
        lower,
        upper,
        0,  # boot device: none, as the flags say
        command_line_address,
        len(modules),
        modules_address,
        len(entries),
        map_address,
        name_address,
    )
    layout.memory.write(address, information + entries + module_table + strings)
    return address
