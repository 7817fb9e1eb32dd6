"""Linux kernels: bzImage, vmlinux and the PVH entry point, as loaded and as small kernels that run."""

import struct

import pytest
from images import CODE, MIB, boot, bzimage, elf, note, string_at

from vtx.bench.listing import code
from vtx.boot import acpi
from vtx.boot.image import BootError, BootOptions, ImageFormat, LoadedImage, Module
from vtx.boot.loaders import load
from vtx.machine import Machine
from vtx.x86.memory import PhysicalMemory
from vtx.x86.state import Gpr

LINUX_NOTE = note(b"Linux", 0x100, b"6.1\0")
PVH_NOTE = note(b"Xen", 18, struct.pack("<Q", 0x10_0010))
KERNEL_SEGMENT = ((MIB, 0xFFFF_FFFF_8100_0000, CODE, 0x2000),)
VMLINUX = elf(64, entry=MIB, segments=KERNEL_SEGMENT, notes=LINUX_NOTE)

# The same bytes are the same program in 32-bit and in 64-bit mode.
PRINT_STRING = """\
ba f8 03 00 00          ; mov edx, 0x3f8
ac                      ; next: lodsb
84 c0                   ; test al, al
74 03                   ; jz done
ee                      ; out dx, al
eb f8                   ; jmp next
"""
PRINT_ECX_BYTES = """\
ac                      ; next: lodsb
ee                      ; out dx, al
ff c9                   ; dec ecx
75 fa                   ; jnz next
"""
EXIT_EAX = """\
ba f4 00 00 00          ; mov edx, 0xf4
ef                      ; out dx, eax
f4                      ; hlt
"""
PRINT_FROM_ZERO_PAGE = code(
    """\
89 f3                   ; mov ebx, esi
8b b3 28 02 00 00       ; mov esi, [ebx + cmd_line_ptr]
"""
    + PRINT_STRING
    + """\
8b b3 18 02 00 00       ; mov esi, [ebx + ramdisk_image]
8b 8b 1c 02 00 00       ; mov ecx, [ebx + ramdisk_size]
"""
    + PRINT_ECX_BYTES
    + """\
8b 73 70                ; mov esi, [ebx + acpi_rsdp_addr]
b9 04 00 00 00          ; mov ecx, 4
"""
    + PRINT_ECX_BYTES
    + """\
8c c8                   ; mov eax, cs
8c d9                   ; mov ecx, ds
c1 e1 08                ; shl ecx, 8
09 c8                   ; or eax, ecx
"""
    + EXIT_EAX
)
PRINT_FROM_START_INFO = code(
    "8b 73 18                ; mov esi, [ebx + cmdline_paddr]\n"
    + PRINT_STRING
    + """\
8b 43 10                ; mov eax, [ebx + modlist_paddr]
8b 30                   ; mov esi, [eax + paddr]
8b 48 08                ; mov ecx, [eax + size]
"""
    + PRINT_ECX_BYTES
    + """\
8b 73 20                ; mov esi, [ebx + rsdp_paddr]
b9 04 00 00 00          ; mov ecx, 4
"""
    + PRINT_ECX_BYTES
    + "8b 03                   ; mov eax, [ebx + magic]\n"
    + EXIT_EAX
)


def run(image: bytes) -> tuple[bytes, int | None]:
    """What the kernel prints and the value it exits with."""
    printed = bytearray()
    machine = Machine(memory=32 * MIB, serial=printed.extend)
    machine.load(image, name="kernel", command_line="quiet splash ", modules=[Module(b"disk")])
    result = machine.run(max_instructions=1000)
    return bytes(printed), result.exit_value


def refusal(image: bytes, options: BootOptions | None = None, size: int = 32 * MIB) -> str:
    with pytest.raises(BootError) as caught:
        boot(image, options, size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def zero_page(loaded: LoadedImage, memory: PhysicalMemory) -> bytes:
    assert loaded.information == loaded.cpu.gpr[Gpr.RSI]
    return memory.read(loaded.information, 4096)


# --- Kernels that run ---


@pytest.mark.parametrize("bits", [32, 64])
def test_bzimage_runs(bits: int) -> None:
    assert run(bzimage(PRINT_FROM_ZERO_PAGE, bits=bits)) == (b"quiet splash diskRSD ", 0x1810)


def test_vmlinux_runs() -> None:
    segments = ((MIB, 0xFFFF_FFFF_8100_0000, PRINT_FROM_ZERO_PAGE, 0x2000),)
    image = elf(64, entry=MIB, segments=segments, notes=LINUX_NOTE)
    assert run(image) == (b"quiet splash diskRSD ", 0x1810)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("pointer", ["<I", "<Q"])
def test_pvh_kernel_runs(bits: int, pointer: str) -> None:
    notes = LINUX_NOTE + note(b"Xen", 18, struct.pack(pointer, MIB + 0x10))
    segments = ((MIB, 0xC000_0000, bytes(16) + PRINT_FROM_START_INFO, 0x2000),)
    image = elf(bits, entry=0xC000_0000, segments=segments, notes=notes)
    assert run(image) == (b"quiet splash diskRSD ", 0x336E_C578)


# --- How they are loaded ---


def test_detection() -> None:
    pvh = elf(64, segments=KERNEL_SEGMENT, entry=MIB, notes=LINUX_NOTE + PVH_NOTE)
    for image, expected in (
        (bzimage(CODE), ImageFormat.BZIMAGE),
        (VMLINUX, ImageFormat.VMLINUX),
        (pvh, ImageFormat.PVH),
        (elf(64, notes=note(b"GNU", 3, b"\1\2\3")), ImageFormat.ELF64),
    ):
        assert boot(image, size=32 * MIB)[0].format is expected
    assert boot(pvh, BootOptions(format=ImageFormat.VMLINUX), 32 * MIB)[0].format is ImageFormat.VMLINUX


def test_bzimage_goes_to_its_preferred_address() -> None:
    loaded, memory = boot(bzimage(CODE), size=32 * MIB)
    assert (loaded.entry, loaded.cpu.rip) == (0x100_0200, 0x100_0200)
    assert memory.read(0x100_0200, len(CODE)) == CODE
    assert loaded.cpu.in_64_bit_mode
    assert not loaded.cpu.rflags & 0x200
    kernel = next(used for used in loaded.ranges if used.what == "the Linux kernel")
    assert (kernel.start, kernel.size) == (0x100_0000, 0x30_0000)


def test_bzimage_is_relocated_where_it_does_not_fit() -> None:
    loaded, memory = boot(bzimage(CODE), size=16 * MIB)
    assert loaded.entry == 0x20_0200
    assert memory.read(0x20_0200, len(CODE)) == CODE
    assert refusal(bzimage(CODE, relocatable=0), size=16 * MIB) == (
        "the Linux kernel needs RAM up to 0x12fffff, machine has RAM up to 0xffffff"
    )


def test_bzimage_without_64_bit_entry_is_entered_in_protected_mode() -> None:
    cpu = boot(bzimage(CODE, bits=32), size=32 * MIB)[0].cpu
    assert (cpu.rip, cpu.code_bits, cpu.paging) == (0x100_0000, 32, False)
    assert [cpu.gpr[register] for register in (Gpr.RBP, Gpr.RDI, Gpr.RBX)] == [0, 0, 0]
    assert {segment.selector for number, segment in enumerate(cpu.segments) if number != 1} == {0x18}
    assert cpu.cs.selector == 0x10


def test_old_bzimage_goes_to_its_32_bit_start() -> None:
    loaded, _ = boot(bzimage(CODE, bits=32, version=0x209, relocatable=0), size=16 * MIB)
    assert loaded.entry == MIB


@pytest.mark.parametrize("bits", [32, 64])
def test_the_boot_gdt_holds_what_the_segments_say(bits: int) -> None:
    loaded, memory = boot(bzimage(CODE, bits=bits), size=32 * MIB)
    for segment in (loaded.cpu.cs, loaded.cpu.ss):
        descriptor = memory.read_u64(loaded.cpu.gdtr.base + (segment.selector & ~7))
        assert descriptor & 0xFFFF == 0xFFFF
        assert descriptor >> 40 & 0xFF == segment.access_rights & 0xFF
        assert descriptor >> 52 & 0xF == segment.access_rights >> 12 & 0xF


def test_zero_page() -> None:
    options = BootOptions(command_line="root=/dev/ram0", modules=(Module(b"first"), Module(b"second")))
    image = bzimage(CODE)
    memory = PhysicalMemory(32 * MIB)
    acpi.install(memory, 1)
    loaded, memory = boot_into(memory, image, options)
    page = zero_page(loaded, memory)
    assert page[0x1FE:0x210] == image[0x1FE:0x210]
    assert page[0x210] == 0xFF
    assert page[:0x70] == bytes(0x70)
    assert page[0x1EF] == 0, "the sentinel"
    assert struct.unpack_from("<Q", page, 0x70) == (0xE_0000,)
    command_line, ramdisk, ramdisk_size = (struct.unpack_from("<I", page, at)[0] for at in (0x228, 0x218, 0x21C))
    assert string_at(memory, command_line) == "root=/dev/ram0"
    assert memory.read(ramdisk, ramdisk_size) == b"first\0\0\0second\0\0"
    assert ramdisk % 4096 == 0
    entries = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * number) for number in range(page[0x1E8])]
    assert entries[:3] == [(0, 0x9_FC00, 1), (0x9_FC00, 0x6_0400, 2), (MIB, 31 * MIB, 1)]


def boot_into(memory: PhysicalMemory, image: bytes, options: BootOptions) -> tuple[LoadedImage, PhysicalMemory]:
    return load(image, memory, options), memory


def test_ramdisk_stays_below_the_limit_of_the_kernel() -> None:
    options = BootOptions(modules=(Module(bytes(5000)),))
    loaded, memory = boot(bzimage(CODE, initrd_addr_max=0x7F_FFFF), options, 32 * MIB)
    address = struct.unpack_from("<I", zero_page(loaded, memory), 0x218)[0]
    assert address == 0x7F_E000


def test_start_info() -> None:
    image = elf(64, segments=KERNEL_SEGMENT, entry=MIB, notes=PVH_NOTE)
    loaded, memory = boot(image, BootOptions(command_line="a b"), 32 * MIB)
    cpu = loaded.cpu
    assert (cpu.rip, cpu.code_bits, cpu.paging, cpu.cr4) == (MIB + 0x10, 32, False, 0)
    assert (cpu.tr.base, cpu.tr.limit, cpu.tr.access_rights) == (0, 0x67, 0x8B)
    assert loaded.information == cpu.gpr[Gpr.RBX]
    fields = struct.unpack("<4I4Q2I", memory.read(cpu.gpr[Gpr.RBX], 56))
    magic, version, flags, modules, module_list, command_line, rsdp, memory_map, count, reserved = fields
    assert (magic, version, flags, modules, module_list, rsdp, reserved) == (0x336E_C578, 1, 0, 0, 0, 0, 0)
    assert string_at(memory, command_line) == "a b"
    entries = [struct.unpack("<QQII", memory.read(memory_map + 24 * number, 24)) for number in range(count)]
    assert entries[2] == (MIB, 31 * MIB, 1, 0)


# --- Bad kernels ---


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (bzimage(CODE)[:0x267], "truncated bzImage: incomplete setup header"),
        (bzimage(CODE)[:900], "truncated bzImage: needs 0x610 bytes, file has 0x384"),
        (bzimage(bytes(4000))[:-17], "truncated bzImage: needs 0x15a0 bytes, file has 0x158f"),
        (bzimage(CODE, version=0x205), "bzImage has boot protocol 2.05, older than 2.06"),
        (bzimage(CODE, loadflags=0), "Linux image is a zImage, to be loaded below 640 KiB, and not a bzImage"),
        (bzimage(b""), "bzImage has no code at its 64-bit entry point"),
        (
            bzimage(CODE, init_size=0xFFFF_FFFF),
            "no room in memory for the Linux kernel (0xffffffff bytes)",
        ),
        (
            bzimage(CODE, pref_address=(1 << 64) - 1, relocatable=0),
            "the Linux kernel needs RAM up to 0x100000000002ffffe, machine has RAM up to 0x1ffffff",
        ),
        (elf(32, notes=LINUX_NOTE), "vmlinux is a 32-bit kernel without a PVH entry point; boot its bzImage"),
        (elf(64, entry=5, segments=KERNEL_SEGMENT, notes=LINUX_NOTE), "ELF entry point 0x5 lies in no segment"),
        (elf(64, notes=note(b"Xen", 18, b"\0\0\0\0")), "PVH entry point 0x0 lies in no segment"),
    ],
)
def test_bad_kernels(image: bytes, message: str) -> None:
    assert refusal(image) == message


@pytest.mark.parametrize("image", [bzimage(CODE), VMLINUX, elf(64, notes=PVH_NOTE)])
def test_ramdisk_larger_than_ram(image: bytes) -> None:
    options = BootOptions(modules=(Module(bytes(32 * MIB)),))
    assert refusal(image, options) == "no room in memory for the initial RAM disk (0x2000000 bytes)"


def test_bad_command_lines() -> None:
    assert refusal(bzimage(CODE), BootOptions(command_line="x" * 101)) == (
        "command line has 101 bytes, the kernel takes 100"
    )
    assert refusal(VMLINUX, BootOptions(command_line="a\0")) == "command line contains a NUL character"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (ImageFormat.BZIMAGE, "image is not a Linux bzImage"),
        (ImageFormat.PVH, "ELF file has no PVH entry point"),
    ],
)
def test_chosen_format_that_does_not_fit(chosen: ImageFormat, message: str) -> None:
    assert refusal(elf(64), BootOptions(format=chosen)) == message


@pytest.mark.parametrize(
    "notes", [b"\1", struct.pack("<3I", 0xFFFF_FFFF, 0xFFFF_FFFF, 18), struct.pack("<3I", 4, 4, 18) + b"Xen\0\0"]
)
def test_broken_notes_are_no_notes(notes: bytes) -> None:
    assert boot(elf(64, notes=notes))[0].format is ImageFormat.ELF64
