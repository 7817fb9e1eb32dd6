"""Linux kernels: the compressed bzImage and the ELF file vmlinux, by the Linux boot protocol.

A bzImage is entered by the protocol's 64-bit entry point if it has one, else by its 32-bit one; the 16-bit set-up code
in its first sectors is not run. A vmlinux without a PVH entry point is entered at its 64-bit ``startup_64``. Either way
the kernel is told of the machine in a *zero page*: memory map, command line, initial RAM disk, the ACPI RSDP.

Spec: The Linux Kernel documentation, "The Linux/x86 Boot Protocol", "Zero Page".
"""

from __future__ import annotations

import struct
from typing import Final

from attrs import frozen

from vtx.boot import acpi
from vtx.boot.elf import ElfImage
from vtx.boot.entry import LINUX_32, LINUX_64, enter_64_bit_mode, enter_protected_mode
from vtx.boot.image import BootError, BootOptions, ImageFormat, LoadedImage, c_string
from vtx.boot.layout import MIB, PAGE, Layout, memory_map
from vtx.x86.state import CpuState, Gpr

NOTE_OWNER: Final = "Linux"
"""Who defines the notes in a vmlinux."""

SIGNATURE_OFFSET: Final = 0x202
SIGNATURE: Final = b"HdrS"
SECTOR: Final = 512
OLDEST_VERSION: Final = 0x206
RELOCATION_VERSION: Final = 0x20A  # from here on with a preferred address and the memory needed to start
XLOADFLAGS_VERSION: Final = 0x20C

# The setup header: offsets in the first sector of the file and in the zero page alike.
HEADER: Final = 0x1F1
HEADER_READ: Final = 0x268  # what is read of it ends here
HEADER_END: Final = 0x290  # all that the zero page has room for
SETUP_SECTORS: Final = 0x1F1
SYSTEM_SIZE: Final = 0x1F4
VIDEO_MODE: Final = 0x1FA
VERSION: Final = 0x206
LOADER_TYPE: Final = 0x210
LOAD_FLAGS: Final = 0x211
START_32: Final = 0x214
RAMDISK: Final = 0x218
COMMAND_LINE: Final = 0x228
RAMDISK_HIGHEST: Final = 0x22C
ALIGNMENT: Final = 0x230
RELOCATABLE: Final = 0x234
EXTENDED_LOAD_FLAGS: Final = 0x236
COMMAND_LINE_SIZE: Final = 0x238
PREFERRED_ADDRESS: Final = 0x258
INITIAL_SIZE: Final = 0x260

# The rest of the zero page.
RSDP: Final = 0x070
MAP_COUNT: Final = 0x1E8
MEMORY_MAP: Final = 0x2D0
MAP_ENTRY: Final = struct.Struct("<QQI")

LOADED_HIGH: Final = 1 << 0
KERNEL_64: Final = 1 << 0
UNKNOWN_LOADER: Final = 0xFF
NORMAL_VIDEO: Final = 0xFFFF
ENTRY_64: Final = 0x200
DEFAULT_COMMAND_LINE_SIZE: Final = 2047
DEFAULT_RAMDISK_HIGHEST: Final = 0x7FFF_FFFF


@frozen
class SetupHeader:
    """What a bzImage says of itself; ``header`` is the setup header as it is, for the zero page.

    ``address`` is where the kernel wants to be, ``size`` the memory it needs there until it has looked at the memory
    map, ``system`` the range of the file that goes there.
    """

    header: bytes
    version: int
    system: slice
    address: int
    size: int
    alignment: int
    relocatable: bool
    has_64_bit_entry: bool
    ramdisk_highest: int
    command_line_size: int


def is_bzimage(image: bytes) -> bool:
    """Whether ``image`` claims to be a bootable Linux kernel."""
    return image[SIGNATURE_OFFSET : SIGNATURE_OFFSET + len(SIGNATURE)] == SIGNATURE


def parse_setup_header(image: bytes) -> SetupHeader:
    """Read the setup header of a bzImage; a `BootError` names what is wrong with it."""
    if len(image) < HEADER_READ:
        raise BootError("truncated bzImage: incomplete setup header")

    def word(offset: int, size: int) -> int:
        return int.from_bytes(image[offset : offset + size], "little")

    version = word(VERSION, 2)
    if version < OLDEST_VERSION:
        raise BootError(f"bzImage has boot protocol {version >> 8}.{version & 0xFF:02}, older than 2.06")
    if not word(LOAD_FLAGS, 1) & LOADED_HIGH:
        raise BootError("Linux image is a zImage, to be loaded below 640 KiB, and not a bzImage")
    start = ((word(SETUP_SECTORS, 1) or 4) + 1) * SECTOR
    size = word(SYSTEM_SIZE, 4) * 16
    missing = start + size - len(image)
    if missing >= 16 or start >= len(image):  # the size is rounded up
        raise BootError(f"truncated bzImage: needs {start + size:#x} bytes, file has {len(image):#x}")
    modern = version >= RELOCATION_VERSION
    end = min(SIGNATURE_OFFSET + image[SIGNATURE_OFFSET - 1], HEADER_END)
    return SetupHeader(
        header=image[HEADER:end],
        version=version,
        system=slice(start, min(start + size, len(image))),
        address=word(PREFERRED_ADDRESS, 8) if modern else word(START_32, 4),
        size=max(word(INITIAL_SIZE, 4) if modern else 0, size),
        alignment=max(word(ALIGNMENT, 4), PAGE),
        relocatable=bool(word(RELOCATABLE, 1)),
        has_64_bit_entry=version >= XLOADFLAGS_VERSION and bool(word(EXTENDED_LOAD_FLAGS, 2) & KERNEL_64),
        ramdisk_highest=word(RAMDISK_HIGHEST, 4),
        command_line_size=word(COMMAND_LINE_SIZE, 4),
    )


def load_bzimage(image: bytes, layout: Layout, options: BootOptions, cpu: CpuState) -> LoadedImage:
    """Load a bzImage with its initial RAM disk and set ``cpu`` up for its entry point."""
    setup = parse_setup_header(image)
    if setup.has_64_bit_entry and setup.system.stop - setup.system.start <= ENTRY_64:
        raise BootError("bzImage has no code at its 64-bit entry point")
    address = _kernel_address(setup, layout)
    layout.place(address, memoryview(image)[setup.system], setup.size, "the Linux kernel")
    zero_page = _write_zero_page(
        layout, options, setup.header, setup.ramdisk_highest, setup.command_line_size or DEFAULT_COMMAND_LINE_SIZE
    )
    if setup.has_64_bit_entry:
        entry = address + ENTRY_64
        enter_64_bit_mode(cpu, layout, entry, LINUX_64)
    else:
        entry = address
        enter_protected_mode(cpu, layout, entry, LINUX_32)
    cpu.gpr[Gpr.RSI] = zero_page
    return LoadedImage(ImageFormat.BZIMAGE, entry, cpu, tuple(layout.ranges), zero_page)


def load_vmlinux(elf: ElfImage, image: bytes, layout: Layout, options: BootOptions, cpu: CpuState) -> LoadedImage:
    """Load the ELF file of a 64-bit kernel and set ``cpu`` up for its ``startup_64``."""
    if elf.bits != 64:
        raise BootError("vmlinux is a 32-bit kernel without a PVH entry point; boot its bzImage")
    elf.place(image, layout)
    zero_page = _write_zero_page(layout, options, b"", DEFAULT_RAMDISK_HIGHEST, DEFAULT_COMMAND_LINE_SIZE)
    enter_64_bit_mode(cpu, layout, elf.entry, LINUX_64)
    cpu.gpr[Gpr.RSI] = zero_page
    return LoadedImage(ImageFormat.VMLINUX, elf.entry, cpu, tuple(layout.ranges), zero_page)


def place_ramdisk(layout: Layout, options: BootOptions, highest: int) -> tuple[int, int]:
    """Put the modules, one after the other, high in memory up to address ``highest``; address and size, or zeros.

    The kernel unpacks several archives in a row, each at a multiple of four bytes.
    """
    data = b"".join(module.data + bytes(-len(module.data) % 4) for module in options.modules)
    if not data:
        return 0, 0
    address = layout.allocate_high(MIB, highest + 1, len(data), "the initial RAM disk")
    layout.memory.write(address, data)
    return address, len(data)


def _kernel_address(setup: SetupHeader, layout: Layout) -> int:
    """Where the kernel goes: to the address it prefers, or anywhere if it can be relocated and does not fit there."""
    if not setup.relocatable or layout.is_free(setup.address, setup.size):
        return setup.address
    return layout.find_free(MIB, setup.size, "the Linux kernel", setup.alignment)


def _write_zero_page(
    layout: Layout, options: BootOptions, header: bytes, ramdisk_highest: int, command_line_size: int
) -> int:
    """Write the zero page and what it points to; its address."""
    text = c_string(options.command_line, "command line")
    if len(text) - 1 > command_line_size:
        raise BootError(f"command line has {len(text) - 1} bytes, the kernel takes {command_line_size}")
    ramdisk, ramdisk_size = place_ramdisk(layout, options, ramdisk_highest)
    command_line = layout.allocate_low(len(text), "the kernel command line")
    layout.memory.write(command_line, text)

    page = bytearray(PAGE)
    page[HEADER : HEADER + len(header)] = header
    struct.pack_into("<Q", page, RSDP, acpi.rsdp_address(layout.memory) or 0)
    struct.pack_into("<H", page, VIDEO_MODE, NORMAL_VIDEO)
    page[LOADER_TYPE] = UNKNOWN_LOADER
    struct.pack_into("<II", page, RAMDISK, ramdisk, ramdisk_size)
    struct.pack_into("<I", page, COMMAND_LINE, command_line)
    entries = memory_map(layout.memory)
    page[MAP_COUNT] = len(entries)
    for number, entry in enumerate(entries):
        MAP_ENTRY.pack_into(page, MEMORY_MAP + number * MAP_ENTRY.size, entry.start, entry.size, entry.type)
    address = layout.allocate_low(PAGE, "the zero page", PAGE)
    layout.memory.write(address, page)
    return address
