"""Multiboot 2 images: ELF files or flat binaries with a tagged header in their first 32 KiB.

Spec: Multiboot2 Specification version 2.0, "OS image format", "Machine state", "Boot information format".
"""

from __future__ import annotations

import struct

from attrs import define, field

from vtx.boot.elf import is_elf, parse_elf
from vtx.boot.entry import enter_protected_mode
from vtx.boot.image import LOADER_NAME, BootError, BootOptions, ImageFormat, LoadedImage, c_string
from vtx.boot.layout import Layout, lower_and_upper_kib, memory_map
from vtx.boot.multiboot1 import place_by_addresses, place_modules
from vtx.x86.state import CpuState, Gpr

HEADER_MAGIC = 0xE852_50D6
BOOT_MAGIC = 0x36D7_6289
SEARCH_LIMIT = 32768
ALIGNMENT = 8
ARCHITECTURE_I386 = 0
FILE_START = 0xFFFF_FFFF

# Header tags.
TAG_END = 0
TAG_INFORMATION_REQUEST = 1
TAG_ADDRESS = 2
TAG_ENTRY_ADDRESS = 3
TAG_CONSOLE_FLAGS = 4
TAG_MODULE_ALIGNMENT = 6
TAG_RELOCATABLE = 10
TAG_OPTIONAL = 1 << 0
CONSOLE_REQUIRED = 1 << 0

# Information tags.
INFO_END = 0
INFO_COMMAND_LINE = 1
INFO_LOADER_NAME = 2
INFO_MODULE = 3
INFO_MEMORY = 4
INFO_MEMORY_MAP = 6
PROVIDED = (INFO_COMMAND_LINE, INFO_LOADER_NAME, INFO_MODULE, INFO_MEMORY, INFO_MEMORY_MAP)
MAP_ENTRY = struct.Struct("<2Q2I")


@define(slots=True)
class Header:
    """A Multiboot 2 header: its offset, and its tags as (type, flags, contents)."""

    offset: int
    tags: list[tuple[int, int, bytes]] = field(factory=list)

    def find(self, wanted: int, layout: str) -> tuple[int, ...] | None:
        """The contents of the first tag of type ``wanted``, unpacked, or None."""
        for kind, _, contents in self.tags:
            if kind == wanted:
                if len(contents) < struct.calcsize(layout):
                    raise BootError(f"malformed Multiboot2 header: tag {kind} is too short")
                return struct.unpack_from(layout, contents)
        return None


def find_header(image: bytes) -> Header | None:
    """The first Multiboot 2 header of ``image``, None if it has none."""
    magic = struct.pack("<I", HEADER_MAGIC)
    searched = image[:SEARCH_LIMIT]
    offset = searched.find(magic)
    while offset >= 0:
        if offset % ALIGNMENT == 0 and offset + 16 <= len(searched):
            architecture, length, checksum = struct.unpack_from("<3I", searched, offset + 4)
            if (HEADER_MAGIC + architecture + length + checksum) & 0xFFFF_FFFF == 0:
                return _parse_tags(searched, offset, architecture, length)
        offset = searched.find(magic, offset + 1)
    return None


def _parse_tags(searched: bytes, offset: int, architecture: int, length: int) -> Header:
    if architecture != ARCHITECTURE_I386:
        raise BootError(f"Multiboot2 image is not for x86: architecture {architecture}")
    header = Header(offset)
    end = offset + length
    position = offset + 16
    while position + 8 <= min(end, len(searched)):
        kind, flags, size = struct.unpack_from("<2HI", searched, position)
        if size < 8 or position + size > min(end, len(searched)):
            break
        if kind == TAG_END:
            return header
        header.tags.append((kind, flags, searched[position + 8 : position + size]))
        position += (size + ALIGNMENT - 1) & -ALIGNMENT
    raise BootError("malformed Multiboot2 header: its tags do not end within it")


def load_multiboot2(image: bytes, header: Header, layout: Layout, options: BootOptions, cpu: CpuState) -> LoadedImage:
    """Load ``image`` and its modules, write the boot information, and set ``cpu`` up for the entry point."""
    _check_requirements(header)
    entry = _place(image, header, layout)
    information = _write_information(layout, options)
    enter_protected_mode(cpu, layout, entry)
    cpu.gpr[Gpr.RAX] = BOOT_MAGIC
    cpu.gpr[Gpr.RBX] = information
    return LoadedImage(ImageFormat.MULTIBOOT2, entry, cpu, tuple(layout.ranges), information)


def _check_requirements(header: Header) -> None:
    """Refuse what the header needs and this machine lacks: a screen, EFI, information of other types."""
    known = (TAG_ADDRESS, TAG_ENTRY_ADDRESS, TAG_MODULE_ALIGNMENT, TAG_RELOCATABLE)
    for kind, flags, contents in header.tags:
        if flags & TAG_OPTIONAL or kind in known:
            continue
        if kind == TAG_INFORMATION_REQUEST:
            requested = struct.unpack(f"<{len(contents) // 4}I", contents[: len(contents) & ~3])
            missing = [number for number in requested if number not in PROVIDED]
            if missing:
                raise BootError(f"Multiboot2 header requires information of type {missing[0]}, which there is none of")
        elif kind == TAG_CONSOLE_FLAGS:
            if any(contents[:1]) and contents[0] & CONSOLE_REQUIRED:
                raise BootError("Multiboot2 header requires a console, the machine has a serial port only")
        else:
            raise BootError(f"Multiboot2 header requires an unknown feature: tag {kind}")


def _place(image: bytes, header: Header, layout: Layout) -> int:
    """Load the image where its header, or else its ELF headers, say; returns the entry point."""
    address = header.find(TAG_ADDRESS, "<4I")
    entry = header.find(TAG_ENTRY_ADDRESS, "<I")
    if address is None:
        if not is_elf(image):
            raise BootError("Multiboot2 image is neither an ELF file nor has load addresses in its header")
        elf = parse_elf(image)
        elf.place(image, layout)
        if entry is None:
            return elf.entry
        if not any(used.start <= entry[0] < used.end for used in layout.ranges):
            raise BootError(f"Multiboot entry point {entry[0]:#x} lies outside the image")
        return entry[0]
    if entry is None:
        raise BootError("Multiboot2 header has load addresses but no entry point")
    header_address, load, load_end, bss_end = address
    if load == FILE_START:
        load = header_address - header.offset
    return place_by_addresses(
        image,
        layout,
        header_offset=header.offset,
        header_address=header_address,
        load=load,
        load_end=load_end,
        bss_end=bss_end,
        entry=entry[0],
    )


def _write_information(layout: Layout, options: BootOptions) -> int:
    """The boot information; returns its address."""
    command_line = c_string(options.full_command_line, "command line")
    modules = place_modules(layout, options)
    entries = [MAP_ENTRY.pack(entry.start, entry.size, entry.type, 0) for entry in memory_map(layout.memory)]
    tags = [
        _tag(INFO_COMMAND_LINE, command_line),
        _tag(INFO_LOADER_NAME, LOADER_NAME),
        _tag(INFO_MEMORY, struct.pack("<2I", *lower_and_upper_kib(layout.memory))),
        _tag(INFO_MEMORY_MAP, struct.pack("<2I", MAP_ENTRY.size, 0) + b"".join(entries)),
        *(_tag(INFO_MODULE, struct.pack("<2I", start, end) + text) for start, end, text in modules),
        _tag(INFO_END, b""),
    ]
    body = b"".join(tags)
    information = struct.pack("<2I", len(body) + 8, 0) + body
    address = layout.allocate_low(len(information), "the Multiboot information")
    layout.memory.write(address, information)
    return address


def _tag(kind: int, contents: bytes) -> bytes:
    """An information tag, padded to the next one's alignment; its size does not count the padding."""
    tag = struct.pack("<2I", kind, len(contents) + 8) + contents
    return tag + bytes(-len(tag) % ALIGNMENT)
