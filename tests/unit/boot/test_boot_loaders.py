"""Plain ELF files, flat binaries, detection, and everything that can be wrong with an image."""

import struct

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from images import CODE, MIB, boot, bzimage, elf, multiboot1_elf, multiboot1_header, multiboot2_elf

from vtx.boot.image import BootError, BootOptions, ImageFormat, Module
from vtx.boot.loaders import load
from vtx.x86.memory import PhysicalMemory
from vtx.x86.state import CpuState, Gpr

NOT_AN_IMAGE = "image is not Multiboot, ELF, a Linux bzImage or a boot sector (a flat binary needs its format chosen)"
BOOT_SECTOR = CODE.ljust(510, b"\0") + b"\x55\xaa"


def message_of(image: bytes, options: BootOptions | None = None, size: int = 16 * MIB) -> str:
    with pytest.raises(BootError) as caught:
        boot(image, options, size)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# --- Entry states ---


def test_elf32_enters_protected_mode() -> None:
    loaded, memory = boot(elf())
    assert loaded.format is ImageFormat.ELF32
    assert loaded.information is None
    assert loaded.cpu.code_bits == 32
    assert loaded.cpu.protected
    assert not loaded.cpu.paging
    assert (loaded.cpu.gpr[Gpr.RAX], loaded.cpu.gpr[Gpr.RBX]) == (0, 0)
    assert memory.read(loaded.cpu.rip, len(CODE)) == CODE


def walk(memory: PhysicalMemory, cr3: int, linear: int) -> int | None:
    """Independent 4-level walk to the physical address, None if not mapped writable."""
    table = cr3
    for level in (3, 2, 1, 0):
        entry = memory.read_u64(table + 8 * (linear >> (12 + 9 * level) & 511))
        if entry & 3 != 3:
            return None
        table = entry & 0x000F_FFFF_FFFF_F000
        if level and entry & 0x80:
            return table + linear % (1 << (12 + 9 * level))
    return table + linear % 4096


@pytest.mark.parametrize("size", [16 * MIB, 4096 * MIB, 9 * 1024 * MIB])
def test_elf64_enters_64_bit_mode_with_identity_map(size: int) -> None:
    loaded, memory = boot(elf(64), size=size)
    cpu = loaded.cpu
    assert loaded.format is ImageFormat.ELF64
    assert cpu.in_64_bit_mode
    assert cpu.paging
    assert cpu.cr4 == 1 << 5
    assert cpu.efer == 1 << 10 | 1 << 8
    end = max(1 << 32, memory.ram[-1].start + memory.ram[-1].size)
    for linear in (0, 0x10_0000, 0xB_8123, 0xC000_0000, 0xFEE0_0020, (1 << 32) - 1, end - 1):
        assert walk(memory, cpu.cr3, linear) == linear
    assert walk(memory, cpu.cr3, max(end, -(-end >> 30) << 30)) is None
    assert memory.read(cpu.rip, len(CODE)) == CODE


@pytest.mark.parametrize("bits", [32, 64])
def test_stack_is_usable_and_out_of_the_way(bits: int) -> None:
    loaded, memory = boot(elf(bits))
    stack = loaded.cpu.gpr[Gpr.RSP]
    assert stack % 16 == 0
    used = [item for item in loaded.ranges if item.start < stack <= item.end]
    assert [item.what for item in used] == ["the boot stack"]
    assert memory.is_backed(stack - 4096, 4096)


def test_boot_sector_enters_real_mode() -> None:
    loaded, memory = boot(BOOT_SECTOR)
    cpu = loaded.cpu
    assert loaded.format is ImageFormat.FLAT
    assert not cpu.protected
    assert (cpu.cs.selector, cpu.cs.base, cpu.rip) == (0, 0, 0x7C00)
    assert cpu.code_bits == 16
    assert cpu.gpr[Gpr.RDX] == 0x80
    assert not cpu.rflags & 0x200
    assert memory.read(0x7C00, 512) == BOOT_SECTOR


@pytest.mark.parametrize(
    ("address", "selector", "offset"), [(0x1000, 0, 0x1000), (0x1_0000, 0x1000, 0), (0x9_0008, 0x9000, 8)]
)
def test_flat_binary_at_an_address(address: int, selector: int, offset: int) -> None:
    loaded, _ = boot(CODE, BootOptions(format=ImageFormat.FLAT, flat_address=address))
    assert (loaded.cpu.cs.selector, loaded.cpu.cs.base, loaded.cpu.rip) == (selector, selector << 4, offset)
    assert loaded.cpu.linear_rip == address


def test_fills_the_processor_it_is_given() -> None:
    cpu = CpuState()
    loaded = load(elf(), PhysicalMemory(16 * MIB), cpu=cpu)
    assert loaded.cpu is cpu
    assert cpu.rip == 0x10_0000


def test_loading_twice_gives_the_same() -> None:
    options = BootOptions(command_line="x", modules=(Module(b"m"),))
    first, first_memory = boot(multiboot1_elf(), options, 2 * MIB)
    second, second_memory = boot(multiboot1_elf(), options, 2 * MIB)
    assert first == second
    assert first_memory.read(0, 2 * MIB) == second_memory.read(0, 2 * MIB)


def test_sections_do_not_matter() -> None:
    image = bytearray(elf())
    image[32:36] = b"\xff" * 4  # e_shoff
    image[48:52] = b"\xff" * 4  # e_shnum, e_shstrndx
    assert boot(bytes(image))[0].entry == 0x10_0000


# --- Detection and choice ---


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (multiboot1_elf(), ImageFormat.MULTIBOOT1),
        (multiboot2_elf(), ImageFormat.MULTIBOOT2),
        (elf(32), ImageFormat.ELF32),
        (elf(64), ImageFormat.ELF64),
        (BOOT_SECTOR, ImageFormat.FLAT),
    ],
)
def test_detection(image: bytes, expected: ImageFormat) -> None:
    assert boot(image)[0].format is expected
    assert boot(image, BootOptions(format=expected))[0].format is expected


def test_chosen_format_overrides_detection() -> None:
    assert boot(multiboot1_elf(), BootOptions(format=ImageFormat.ELF32))[0].format is ImageFormat.ELF32


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (ImageFormat.MULTIBOOT1, "image has no Multiboot header in its first 8 KiB"),
        (ImageFormat.MULTIBOOT2, "image has no Multiboot2 header in its first 32 KiB"),
        (ImageFormat.ELF64, "image is a 32-bit ELF file, not elf64"),
    ],
)
def test_chosen_format_that_does_not_fit(chosen: ImageFormat, message: str) -> None:
    assert message_of(elf(), BootOptions(format=chosen)) == message


# --- Bad images ---


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "image is empty"),
        (b"hello\n" * 300, NOT_AN_IMAGE),
        (b"\x7fELF", "truncated ELF file: no header"),
        (elf()[:40], "truncated ELF file: incomplete header"),
        (elf()[:60], "truncated ELF file: incomplete program headers"),
        (elf()[:-3], "truncated ELF file: segment 0 ends at 0x5b, file at 0x58"),
        (b"\x7fELF\1\2" + elf()[6:], "ELF file is not for x86: neither 32-bit nor 64-bit little-endian"),
        (elf(machine=40), "ELF file is not for x86: machine EM_ARM"),
        (elf(kind=3), "ELF file is not a fixed-address executable: type ET_DYN"),
        (elf(kind=1), "ELF file is not a fixed-address executable: type ET_REL"),
        (elf(segments=()), "ELF file has no loadable segments"),
        (elf(program_type=3), "ELF file is a dynamically linked program, not a bare-metal image"),
        (elf(entry=0x10_2000), "ELF entry point 0x102000 lies in no segment"),
        (elf(entry=0xF_FFFF), "ELF entry point 0xfffff lies in no segment"),
        (
            elf(segments=((MIB, MIB, CODE, 3),)),
            "malformed ELF file: segment 0 is larger in the file than in memory",
        ),
        (
            elf(segments=((MIB, MIB, CODE, 0x2000), (MIB + 0x1000, 0, CODE, 0x2000))),
            "ELF segment 1 overlaps ELF segment 0 at 0x101000",
        ),
        (
            elf(segments=((MIB, MIB, CODE, 0x100_0000),)),
            "ELF segment 0 needs RAM up to 0x10fffff, machine has RAM up to 0xffffff",
        ),
        (
            elf(segments=((0xFFFF_F000, MIB, CODE, 0x1000),)),
            "ELF segment 0 needs RAM up to 0xffffffff, machine has RAM up to 0xffffff",
        ),
        (
            elf(64, segments=((MIB, MIB, CODE, (1 << 64) - 1),)),
            "ELF segment 0 needs RAM up to 0x100000000000ffffe, machine has RAM up to 0xffffff",
        ),
        (
            elf(entry=0x9_F000, segments=((0x9_F000, 0x9_F000, CODE, 0x1000),)),
            "ELF segment 0 overlaps the reserved memory 0x9fc00-0xfffff",
        ),
        (BOOT_SECTOR[:0x202].ljust(0x202, b"\0") + b"HdrS", "truncated bzImage: incomplete setup header"),
    ],
)
def test_bad_images(image: bytes, message: str) -> None:
    assert message_of(image) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BootOptions(command_line="a\0b"), "command line contains a NUL character"),
        (BootOptions(command_line="\ud800"), "command line contains a character that has no encoding"),
        (BootOptions(modules=(Module(b"", "\0"),)), "command line of module 0 contains a NUL character"),
        (
            BootOptions(modules=(Module(b"1"), Module(bytes(16 * MIB)))),
            "no room in memory for module 1 (0x1000000 bytes)",
        ),
        (
            BootOptions(command_line="x" * (16 * MIB)),
            "no room in memory for the Multiboot information (0x10000f7 bytes)",
        ),
    ],
)
def test_bad_options(options: BootOptions, message: str) -> None:
    assert message_of(multiboot1_elf(), options) == message


@pytest.mark.parametrize(
    ("image", "address", "message"),
    [
        (b"", 0x7C00, "image is empty"),
        (CODE, MIB, "a flat binary starts below 1 MiB, not at 0x100000"),
        (CODE, -1, "a flat binary starts below 1 MiB, not at -0x1"),
        (bytes(0xA_0000), 0x7C00, "flat binary overlaps the reserved memory 0x9fc00-0xfffff"),
    ],
)
def test_bad_flat_binaries(image: bytes, address: int, message: str) -> None:
    assert message_of(image, BootOptions(format=ImageFormat.FLAT, flat_address=address)) == message


@pytest.mark.parametrize("size", [4096, 0x1_0000, 0x9_F000, 0xA_0000, MIB, MIB + 4096])
def test_tiny_machines(size: int) -> None:
    image = elf(entry=0, segments=((0, 0, CODE, 8),), prefix=multiboot1_header())
    try:
        loaded, memory = boot(image, size=size)
    except BootError as error:
        assert size < 0x1_0000, str(error)
    else:
        assert all(memory.is_backed(used.start, used.size) for used in loaded.ranges)


def test_sparse_bss_touches_no_memory() -> None:
    image = elf(segments=((MIB, MIB, CODE, 1000 * MIB),))
    before = resident()
    boot(image, size=1024 * MIB)
    assert resident() - before < 100 * MIB


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * 4096


# --- Fuzzing: any bytes load or are refused with one line ---

SEEDS = (
    multiboot1_elf(),
    multiboot2_elf((3, 0, struct.pack("<I", 0x10_0003))),
    elf(32),
    elf(64),
    BOOT_SECTOR,
    bzimage(CODE, bits=32),
)
EDGES = st.sampled_from((0, 1, 7, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF, (1 << 64) - 1, 1 << 63))
FORMATS = st.sampled_from((None, *ImageFormat))


def check(image: bytes, chosen: ImageFormat | None) -> None:
    memory = PhysicalMemory(2 * MIB)
    try:
        loaded = load(image, memory, BootOptions(format=chosen, modules=(Module(b"m"),)))
    except BootError as error:
        assert "\n" not in str(error)
        assert str(error)
        return
    assert memory.is_backed(loaded.entry)
    for before, after in zip(loaded.ranges, loaded.ranges[1:], strict=False):
        assert before.end <= after.start
    assert all(memory.is_backed(used.start, used.size) for used in loaded.ranges)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(image=st.binary(max_size=600), chosen=FORMATS)
@example(image=b"\x7fELF\1\1", chosen=None)
def test_any_bytes(image: bytes, chosen: ImageFormat | None) -> None:
    check(image, chosen)


@settings(max_examples=400, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    patches=st.lists(st.tuples(st.integers(0, 200), st.sampled_from((1, 2, 4, 8)), EDGES), max_size=4),
    cut=st.none() | st.integers(0, 300),
    chosen=FORMATS,
)
def test_damaged_images(
    seed: bytes, patches: list[tuple[int, int, int]], cut: int | None, chosen: ImageFormat | None
) -> None:
    image = bytearray(seed)
    for offset, size, value in patches:
        image[offset : offset + size] = (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
    check(bytes(image[:cut]), chosen)


WORDS = st.integers(0, 0xFFFF_FFFF) | st.integers(MIB, 2 * MIB)


@settings(deadline=None)
@given(addresses=st.tuples(WORDS, WORDS, WORDS, WORDS, WORDS), flags=st.sampled_from((0x1_0000, 0x1_0003)))
def test_any_multiboot_addresses(addresses: tuple[int, ...], flags: int) -> None:
    check(multiboot1_header(flags, addresses) + bytes(100), None)
