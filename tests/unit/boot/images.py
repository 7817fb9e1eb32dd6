"""Small boot images put together byte by byte, for the tests of this folder."""

import struct

from vtx.boot.image import BootOptions, LoadedImage
from vtx.boot.loaders import load
from vtx.x86.memory import PhysicalMemory

MIB = 1 << 20
CODE = b"\xf4\xeb\xfd" + b"code"  # hlt; jmp


def elf(
    bits: int = 32,
    *,
    entry: int = 0x10_0000,
    segments: tuple[tuple[int, int, bytes, int], ...] = ((0x10_0000, 0x10_0000, CODE, 0x2000),),
    machine: int | None = None,
    kind: int = 2,
    prefix: bytes = b"",
    program_type: int = 1,
    notes: bytes = b"",
) -> bytes:
    """An ELF file; each segment is (physical, virtual, contents, size in memory). ``prefix`` precedes the contents.

    ``notes`` go into a segment of their own, behind everything else.
    """
    machine = machine or {32: 3, 64: 62}[bits]
    header_size, program_size = {32: (52, 32), 64: (64, 56)}[bits]
    ident = b"\x7fELF" + bytes((bits // 32, 1, 1)) + bytes(9)
    layout = {32: "<HHIIIIIHHHHHH", 64: "<HHIQQQIHHHHHH"}[bits]
    header = ident + struct.pack(
        layout,
        kind,
        machine,
        1,
        entry,
        header_size,
        0,
        0,
        header_size,
        program_size,
        len(segments) + bool(notes),
        0,
        0,
        0,
    )
    offset = header_size + program_size * (len(segments) + bool(notes)) + len(prefix)
    programs = contents = b""
    for physical, virtual, data, size in segments:
        if bits == 32:
            programs += struct.pack("<8I", program_type, offset, virtual, physical, len(data), size, 7, 0)
        else:
            programs += struct.pack("<2I6Q", program_type, 7, offset, virtual, physical, len(data), size, 0)
        offset += len(data)
        contents += data
    if notes:
        values = (
            (4, 4, offset, 0, 0, len(notes), len(notes), 4) if bits == 64 else (4, offset, 0, 0, len(notes), 0, 4, 4)
        )
        programs += struct.pack("<2I6Q" if bits == 64 else "<8I", *values)
        contents += notes
    return header + programs + prefix + contents


def note(owner: bytes, kind: int, contents: bytes) -> bytes:
    """An ELF note."""
    name = owner + b"\0"
    padded = name + bytes(-len(name) % 4) + contents + bytes(-len(contents) % 4)
    return struct.pack("<3I", len(name), len(contents), kind) + padded


def bzimage(code: bytes, *, bits: int = 64, **fields: int) -> bytes:
    """A relocatable bzImage of boot protocol 2.15 with one set-up sector, ``code`` at its entry point.

    ``fields`` replace those of the header.
    """
    system = (bytes(0x200) if bits == 64 else b"") + code
    values = {
        "setup_sects": 1,
        "syssize": -(-len(system) // 16),
        "version": 0x20F,
        "loadflags": 1,
        "code32_start": 0x10_0000,
        "initrd_addr_max": 0x7FFF_FFFF,
        "kernel_alignment": 0x20_0000,
        "relocatable": 1,
        "xloadflags": 1 if bits == 64 else 0,
        "cmdline_size": 100,
        "pref_address": 0x100_0000,
        "init_size": 0x30_0000,
    } | fields
    layout = {
        "setup_sects": (0x1F1, "B"),
        "syssize": (0x1F4, "<I"),
        "version": (0x206, "<H"),
        "loadflags": (0x211, "B"),
        "code32_start": (0x214, "<I"),
        "initrd_addr_max": (0x22C, "<I"),
        "kernel_alignment": (0x230, "<I"),
        "relocatable": (0x234, "B"),
        "xloadflags": (0x236, "<H"),
        "cmdline_size": (0x238, "<I"),
        "pref_address": (0x258, "<Q"),
        "init_size": (0x260, "<I"),
    }
    setup = bytearray(1024)
    setup[0x1FE:0x206] = b"\x55\xaa\xeb\x66HdrS"
    for name, value in values.items():
        struct.pack_into(layout[name][1], setup, layout[name][0], value)
    return bytes(setup) + system


def multiboot1_header(flags: int = 0, addresses: tuple[int, ...] = ()) -> bytes:
    """A Multiboot 1 header; ``addresses`` are header, load, load end, bss end, entry."""
    magic = 0x1BADB002
    return struct.pack("<3I", magic, flags, -(magic + flags) & 0xFFFF_FFFF) + struct.pack(
        f"<{len(addresses)}I", *addresses
    )


def multiboot2_header(*tags: tuple[int, int, bytes], architecture: int = 0) -> bytes:
    """A Multiboot 2 header with ``tags`` of (type, flags, contents) and the end tag."""
    body = b""
    for kind, flags, contents in (*tags, (0, 0, b"")):
        body += struct.pack("<2HI", kind, flags, 8 + len(contents)) + contents
        body += bytes(-len(body) % 8)
    magic, length = 0xE85250D6, 16 + len(body)
    return struct.pack("<4I", magic, architecture, length, -(magic + architecture + length) & 0xFFFF_FFFF) + body


def multiboot1_elf(**options: object) -> bytes:
    """An ELF32 file with a Multiboot 1 header at offset 84."""
    return elf(prefix=multiboot1_header(3), **options)  # type: ignore[arg-type]


def multiboot2_elf(*tags: tuple[int, int, bytes], bits: int = 32) -> bytes:
    """An ELF file with an 8-aligned Multiboot 2 header."""
    padding = bytes(4) if bits == 32 else b""
    return elf(bits, prefix=padding + multiboot2_header(*tags) + bytes(64))


def boot(image: bytes, options: BootOptions | None = None, size: int = 16 * MIB) -> tuple[LoadedImage, PhysicalMemory]:
    """Load into fresh memory of ``size`` bytes."""
    memory = PhysicalMemory(size)
    return load(image, memory, options), memory


def string_at(memory: PhysicalMemory, address: int) -> str:
    """The NUL-terminated string at ``address``."""
    return memory.read(address, 4096).split(b"\0")[0].decode()
