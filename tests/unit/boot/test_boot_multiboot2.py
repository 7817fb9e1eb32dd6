"""Multiboot 2; tags and constants typed from the specification."""

import struct

import pytest
from images import CODE, MIB, boot, elf, multiboot2_elf, multiboot2_header

from vtx.boot.image import BootError, BootOptions, ImageFormat, Module
from vtx.x86.memory import PhysicalMemory
from vtx.x86.state import Gpr


def tags_of(memory: PhysicalMemory, address: int) -> list[tuple[int, bytes]]:
    """The information's tags, walked as an image walks them."""
    total, reserved = struct.unpack("<2I", memory.read(address, 8))
    assert address % 8 == 0
    assert reserved == 0
    raw = memory.read(address, total)
    position, tags = 8, []
    while True:
        kind, size = struct.unpack_from("<2I", raw, position)
        tags.append((kind, raw[position + 8 : position + size]))
        position += (size + 7) & ~7
        if kind == 0:
            assert (size, position) == (8, total)
            return tags


def test_machine_state() -> None:
    loaded, memory = boot(multiboot2_elf())
    assert loaded.format is ImageFormat.MULTIBOOT2
    assert loaded.cpu.gpr[Gpr.RAX] == 0x36D76289
    assert loaded.cpu.gpr[Gpr.RBX] == loaded.information
    assert loaded.cpu.code_bits == 32
    assert memory.read(loaded.cpu.rip, len(CODE)) == CODE


def test_information_tags() -> None:
    options = BootOptions(name="kernel", command_line="a=b", modules=(Module(b"DATA", "module one"), Module(b"X")))
    loaded, memory = boot(multiboot2_elf(), options, 32 * MIB)
    assert loaded.information is not None
    tags = tags_of(memory, loaded.information)
    by_kind = dict(tags)
    assert by_kind[1] == b"kernel a=b\0"
    assert by_kind[2] == b"vtx\0"
    assert struct.unpack("<2I", by_kind[4]) == (639, 31 * 1024)
    modules = [contents for kind, contents in tags if kind == 3]
    assert len(modules) == 2
    start, end = struct.unpack_from("<2I", modules[0])
    assert memory.read(start, end - start) == b"DATA"
    assert modules[0][8:] == b"module one\0"
    assert start % 4096 == 0


def test_memory_map_tag() -> None:
    loaded, memory = boot(multiboot2_elf())
    assert loaded.information is not None
    contents = dict(tags_of(memory, loaded.information))[6]
    entry_size, version = struct.unpack_from("<2I", contents)
    assert (entry_size, version) == (24, 0)
    entries = list(struct.iter_unpack("<2Q2I", contents[8:]))
    assert entries[:3] == [(0, 0x9FC00, 1, 0), (0x9FC00, 0x60400, 2, 0), (MIB, 15 * MIB, 1, 0)]


def test_elf64_and_entry_address_tag() -> None:
    loaded, _ = boot(multiboot2_elf((3, 0, struct.pack("<I", 0x10_0003)), bits=64))
    assert loaded.entry == 0x10_0003
    assert loaded.cpu.code_bits == 32


@pytest.mark.parametrize("load", [0x20_0000, 0xFFFF_FFFF])
def test_address_tag_loads_a_flat_binary(load: int) -> None:
    header = multiboot2_header(
        (2, 0, struct.pack("<4I", 0x20_0000, load, 0, 0x20_1000)), (3, 0, struct.pack("<I", 0x20_0040))
    )
    image = header.ljust(64, b"\0") + bytes(32) + CODE
    loaded, memory = boot(image)
    assert loaded.entry == 0x20_0040
    assert memory.read(0x20_0000, len(image)) == image


@pytest.mark.parametrize(
    "tag",
    [
        (1, 0, struct.pack("<3I", 1, 3, 6)),
        (1, 1, struct.pack("<I", 15)),
        (4, 0, struct.pack("<I", 2)),
        (5, 1, bytes(12)),
        (6, 0, b""),
        (7, 1, b""),
        (10, 0, bytes(16)),
    ],
)
def test_header_tags_that_are_met_or_optional(tag: tuple[int, int, bytes]) -> None:
    assert boot(multiboot2_elf(tag))[0].format is ImageFormat.MULTIBOOT2


FLAT_TAGS = (2, 0, struct.pack("<4I", 0x20_0000, 0x20_0000, 0, 0))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (multiboot2_elf((5, 0, bytes(12))), "Multiboot2 header requires an unknown feature: tag 5"),
        (multiboot2_elf((99, 0, b"")), "Multiboot2 header requires an unknown feature: tag 99"),
        (
            multiboot2_elf((1, 0, struct.pack("<2I", 1, 8))),
            "Multiboot2 header requires information of type 8, which there is none of",
        ),
        (
            multiboot2_elf((4, 0, struct.pack("<I", 1))),
            "Multiboot2 header requires a console, the machine has a serial port only",
        ),
        (multiboot2_elf((3, 0, b"\0\0")), "malformed Multiboot2 header: tag 3 is too short"),
        (multiboot2_elf((3, 0, bytes(4))), "Multiboot entry point 0x0 lies outside the image"),
        (multiboot2_header(architecture=4), "Multiboot2 image is not for x86: architecture 4"),
        (multiboot2_header()[:-4], "malformed Multiboot2 header: its tags do not end within it"),
        (multiboot2_header(), "Multiboot2 image is neither an ELF file nor has load addresses in its header"),
        (multiboot2_header(FLAT_TAGS), "Multiboot2 header has load addresses but no entry point"),
    ],
)
def test_bad_images(image: bytes, message: str) -> None:
    with pytest.raises(BootError) as caught:
        boot(image)
    assert str(caught.value) == message


def test_tag_of_size_zero_does_not_hang() -> None:
    image = bytearray(multiboot2_header((6, 0, b"")))
    image[20:24] = bytes(4)
    with pytest.raises(BootError, match="do not end"):
        boot(bytes(image))


def test_header_must_be_8_aligned() -> None:
    image = elf(prefix=multiboot2_header() + bytes(8))
    assert boot(image)[0].format is ImageFormat.ELF32
