"""Multiboot 1; offsets and constants typed from the specification."""

import struct

import pytest
from images import CODE, MIB, boot, elf, multiboot1_elf, multiboot1_header, string_at

from vtx.boot.image import BootError, BootOptions, ImageFormat, Module
from vtx.boot.loaders import load
from vtx.x86.memory import PhysicalMemory
from vtx.x86.state import Gpr


def test_machine_state_is_what_the_specification_promises() -> None:
    loaded, memory = boot(multiboot1_elf())
    cpu = loaded.cpu
    assert loaded.format is ImageFormat.MULTIBOOT1
    assert cpu.gpr[Gpr.RAX] == 0x2BADB002
    assert cpu.gpr[Gpr.RBX] == loaded.information
    assert cpu.rip == loaded.entry == 0x10_0000
    assert cpu.cr0 & 0x8000_0001 == 1
    assert not cpu.rflags & 0x2_0200
    assert (cpu.cs.base, cpu.cs.limit, cpu.cs.access_rights & 0xF09F) == (0, 0xFFFF_FFFF, 0xC09B)
    for number in (0, 2, 3, 4, 5):
        segment = cpu.segments[number]
        assert (segment.base, segment.limit, segment.access_rights & 0xF09F) == (0, 0xFFFF_FFFF, 0xC093)
    assert cpu.code_bits == 32
    assert cpu.cpl == 0
    assert not cpu.long_mode
    assert memory.read(cpu.rip, len(CODE)) == CODE


def test_gdt_in_memory_matches_the_hidden_registers() -> None:
    loaded, memory = boot(multiboot1_elf())
    cpu = loaded.cpu
    for segment in (cpu.segments[1], cpu.segments[3]):
        descriptor = memory.read_u64(cpu.gdtr.base + segment.selector)
        assert descriptor >> 40 & 0xF0FF == segment.access_rights
        assert descriptor & 0xFFFF | descriptor >> 32 & 0xF_0000 == segment.limit >> 12
        assert segment.selector + 7 <= cpu.gdtr.limit


def information(size: int = 16 * MIB, **options: object) -> tuple[tuple[int, ...], object]:
    loaded, memory = boot(multiboot1_elf(), BootOptions(**options), size)  # type: ignore[arg-type]
    assert loaded.information is not None
    return struct.unpack("<22I", memory.read(loaded.information, 88)), memory


def test_information_flags_and_memory() -> None:
    fields, _ = information(32 * MIB)
    assert fields[0] == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert fields[1] == 639
    assert fields[2] == 31 * 1024


def test_command_line_starts_with_the_name() -> None:
    fields, memory = information(name="vmx.flat", command_line="null vmenter")
    assert string_at(memory, fields[4]) == "vmx.flat null vmenter"  # type: ignore[arg-type]
    fields, memory = information(name="hello")
    assert string_at(memory, fields[4]) == "hello"  # type: ignore[arg-type]


def test_loader_name() -> None:
    fields, memory = information()
    assert string_at(memory, fields[16]) == "vtx"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (16 * MIB, [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (MIB, 15 * MIB, 1)]),
        (3072 * MIB, [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (MIB, 3071 * MIB, 1)]),
        (4096 * MIB, [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (MIB, 3071 * MIB, 1), (1 << 32, 1024 * MIB, 1)]),
    ],
)
def test_memory_map(size: int, expected: list[tuple[int, int, int]]) -> None:
    fields, memory = information(size)
    length, address = fields[11], fields[12]
    raw = memory.read(address, length)  # type: ignore[attr-defined]
    entries = []
    while raw:
        entry_size, start, region_size, kind = struct.unpack_from("<IQQI", raw)
        entries.append((start, region_size, kind))
        raw = raw[entry_size + 4 :]
    assert [entry for entry in entries if not 0xC000_0000 <= entry[0] < 1 << 32] == expected
    assert all(kind == 2 for start, _, kind in entries if 0xC000_0000 <= start < 1 << 32)
    assert entries == sorted(entries)


def test_modules_are_page_aligned_beyond_the_image() -> None:
    modules = (Module(b"first", "one"), Module(b"x" * 5000, "two words"), Module(b""))
    fields, memory = information(modules=modules)
    assert fields[5] == 3
    table = [
        struct.unpack("<4I", memory.read(fields[6] + 16 * index, 16))  # type: ignore[attr-defined]
        for index in range(3)
    ]
    for (start, end, text, reserved), module in zip(table, modules, strict=True):
        assert start % 4096 == 0
        assert start >= 0x10_2000
        assert memory.read(start, end - start) == module.data  # type: ignore[attr-defined]
        assert string_at(memory, text) == module.command_line  # type: ignore[arg-type]
        assert reserved == 0


def test_nothing_overlaps() -> None:
    loaded, _ = boot(multiboot1_elf(), BootOptions(modules=(Module(b"m" * 10_000),)))
    for before, after in zip(loaded.ranges, loaded.ranges[1:], strict=False):
        assert before.end <= after.start


def test_information_avoids_an_image_in_low_memory() -> None:
    image = elf(entry=0x1000, segments=((0x1000, 0x1000, CODE, 0x9_EC00),), prefix=multiboot1_header())
    loaded, memory = boot(image, BootOptions(name="low"))
    assert loaded.information is not None
    assert loaded.information >= MIB
    assert memory.read(0x1000, len(CODE)) == CODE


def test_bss_is_zeroed_even_in_used_memory() -> None:
    memory = PhysicalMemory(16 * MIB)
    memory.write(0x10_0000, b"\xaa" * 0x3000)
    load(multiboot1_elf(), memory)
    assert memory.read(0x10_0000, 0x2000) == CODE.ljust(0x2000, b"\0")
    assert memory.read(0x10_2000, 0x1000) == b"\xaa" * 0x1000


def test_elf64_container() -> None:
    loaded, _ = boot(elf(64, prefix=multiboot1_header()))
    assert loaded.format is ImageFormat.MULTIBOOT1
    assert loaded.cpu.code_bits == 32
    assert not loaded.cpu.long_mode


def test_entry_is_translated_to_its_physical_address() -> None:
    image = elf(
        entry=0xC010_0003,
        segments=((0x20_0000, 0xC010_0000, CODE, 0x1000),),
        prefix=multiboot1_header(),
    )
    assert boot(image)[0].entry == 0x20_0003


# --- Address fields ---


def flat_image(
    *,
    offset: int = 16,
    header: int = 0x20_0010,
    load: int = 0x20_0000,
    load_end: int = 0,
    bss_end: int = 0,
    entry: int = 0x20_0040,
) -> bytes:
    body = multiboot1_header(1 << 16, (header, load, load_end, bss_end, entry))
    return (bytes(offset) + body).ljust(64, b"\x90") + CODE


def test_address_fields_load_a_flat_binary() -> None:
    image = flat_image(bss_end=0x20_1000)
    loaded, memory = boot(image)
    assert loaded.entry == 0x20_0040
    assert memory.read(0x20_0000, len(image)) == image
    assert loaded.ranges[-1].end == 0x20_1000


def test_address_fields_may_skip_the_start_of_the_file() -> None:
    image = flat_image(load=0x20_0010)
    _, memory = boot(image)
    assert memory.read(0x20_0010, len(image) - 16) == image[16:]


def test_address_fields_may_stop_before_the_end_of_the_file() -> None:
    image = flat_image(load_end=0x20_0044)
    _, memory = boot(image)
    assert memory.read(0x20_0040, 8) == CODE[:4] + bytes(4)


def test_address_fields_win_over_elf_headers() -> None:
    header = multiboot1_header(1 << 16, (0x20_0054, 0x20_0000, 0, 0, 0x20_0000 + 84 + 32))
    loaded, _ = boot(elf(prefix=header))
    assert loaded.entry == 0x20_0000 + 84 + 32


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (flat_image(load=0x20_0011), "Multiboot load address 0x200011 is above the header's address 0x200010"),
        (flat_image(load_end=0x1F_0000), "Multiboot load end 0x1f0000 is not above the load address 0x200000"),
        (flat_image(load_end=0x20_0000), "Multiboot load end 0x200000 is not above the load address 0x200000"),
        (flat_image(load_end=0x20_1000), "truncated Multiboot image: needs 0x1000 bytes, file has 0x47"),
        (flat_image(bss_end=0x20_0001), "Multiboot bss end 0x200001 is below the load end 0x200047"),
        (flat_image(entry=0x20_0047), "Multiboot entry point 0x200047 lies outside the image"),
        (
            flat_image(header=0x30_0010, load=0),
            "Multiboot load address 0x0 lies before the start of the file",
        ),
        (flat_image()[:47], "truncated Multiboot header: no room for its address fields"),
        (flat_image()[:48], "Multiboot entry point 0x200040 lies outside the image"),
        (multiboot1_header(1 << 5), "Multiboot header requires unknown features: flags 0x20"),
        (multiboot1_header(), "Multiboot image is neither an ELF file nor has load addresses in its header"),
    ],
)
def test_bad_images(image: bytes, message: str) -> None:
    with pytest.raises(BootError) as caught:
        boot(image)
    assert str(caught.value) == message


@pytest.mark.parametrize(("offset", "found"), [(8180, True), (8184, False), (82, False)])
def test_header_must_be_aligned_and_whole_within_8_kib(offset: int, found: bool) -> None:
    image = bytearray(elf(prefix=bytes(8300)))
    image[offset : offset + 12] = multiboot1_header()
    expected = ImageFormat.MULTIBOOT1 if found else ImageFormat.ELF32
    assert boot(bytes(image))[0].format is expected


def test_header_with_a_wrong_checksum_is_not_one() -> None:
    header = multiboot1_header()[:-1] + b"\0"
    assert boot(elf(prefix=header))[0].format is ImageFormat.ELF32


def test_optional_flags_and_video_are_no_obstacle() -> None:
    assert boot(elf(prefix=multiboot1_header(0x7)))[0].format is ImageFormat.MULTIBOOT1
