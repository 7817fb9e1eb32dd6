"""Load an image of any supported format, told apart by content.

In order: Multiboot 1 header, Multiboot 2 header, ELF file, Linux bzImage, boot sector (the signature 55H AAH at offset
510). Of the ELF files, one with a note that gives a PVH entry point is entered there, and one with notes of Linux is a
vmlinux. Other flat binaries carry no mark, so they need the format chosen; anything else is refused rather than run.

A plain ELF32 file is entered in 32-bit protected mode as by Multiboot but with zero in EAX and EBX, a plain ELF64
file in 64-bit mode with memory mapped one to one, and a flat binary in real-address mode with all of the file, not
only the first sector, at its address. All are entered at a physical address.

Threats: the image is untrusted. Every size and address is checked against the file and RAM before anything is written;
memory written is bounded by the machine's RAM; all that can go wrong is a `BootError`.
"""

from __future__ import annotations

from vtx.boot import linux, multiboot1, multiboot2, pvh
from vtx.boot.elf import ElfImage, is_elf, parse_elf
from vtx.boot.entry import enter_64_bit_mode, enter_protected_mode, enter_real_mode
from vtx.boot.image import BootError, BootOptions, ImageFormat, LoadedImage
from vtx.boot.layout import MIB, Layout
from vtx.x86.memory import PhysicalMemory
from vtx.x86.state import CpuState

SIGNATURE_OFFSET = 510
SIGNATURE = b"\x55\xaa"


def load(
    image: bytes, memory: PhysicalMemory, options: BootOptions | None = None, cpu: CpuState | None = None
) -> LoadedImage:
    """Put ``image`` into ``memory`` and fill ``cpu`` (a new one by default, in reset state) for its first instruction.

    Raises `BootError`, a ValueError with one line of text, if the image is not one this machine can boot; memory and
    ``cpu`` may have changed by then.
    """
    options = options or BootOptions()
    cpu = cpu or CpuState()
    layout = Layout(memory)
    chosen = options.format or detect(image)
    match chosen:
        case ImageFormat.MULTIBOOT1:
            first = multiboot1.find_header(image)
            if first is None:
                raise BootError("image has no Multiboot header in its first 8 KiB")
            return multiboot1.load_multiboot1(image, first, layout, options, cpu)
        case ImageFormat.MULTIBOOT2:
            second = multiboot2.find_header(image)
            if second is None:
                raise BootError("image has no Multiboot2 header in its first 32 KiB")
            return multiboot2.load_multiboot2(image, second, layout, options, cpu)
        case ImageFormat.BZIMAGE:
            if not linux.is_bzimage(image):
                raise BootError("image is not a Linux bzImage")
            return linux.load_bzimage(image, layout, options, cpu)
        case ImageFormat.PVH:
            return pvh.load_pvh(_parse(image), image, layout, options, cpu)
        case ImageFormat.VMLINUX:
            return linux.load_vmlinux(_parse(image), image, layout, options, cpu)
        case ImageFormat.ELF32 | ImageFormat.ELF64:
            return _load_elf(chosen, _parse_as(chosen, image), image, layout, cpu)
        case ImageFormat.FLAT:
            return _load_flat(image, layout, options, cpu)


def detect(image: bytes) -> ImageFormat:
    """The format of ``image`` by its content."""
    if not image:
        raise BootError("image is empty")
    if multiboot1.find_header(image) is not None:
        return ImageFormat.MULTIBOOT1
    if multiboot2.find_header(image) is not None:
        return ImageFormat.MULTIBOOT2
    if is_elf(image):
        return _detect_elf(parse_elf(image))
    if linux.is_bzimage(image):
        return ImageFormat.BZIMAGE
    if image[SIGNATURE_OFFSET : SIGNATURE_OFFSET + 2] == SIGNATURE:
        return ImageFormat.FLAT
    raise BootError(
        "image is not Multiboot, ELF, a Linux bzImage or a boot sector (a flat binary needs its format chosen)"
    )


def _detect_elf(elf: ElfImage) -> ImageFormat:
    if pvh.entry_of(elf) is not None:
        return ImageFormat.PVH
    if any(note.owner == linux.NOTE_OWNER for note in elf.notes):
        return ImageFormat.VMLINUX
    return ImageFormat.ELF32 if elf.bits == 32 else ImageFormat.ELF64


def _parse(image: bytes) -> ElfImage:
    if not is_elf(image):
        raise BootError("image is not an ELF file")
    return parse_elf(image)


def _parse_as(chosen: ImageFormat, image: bytes) -> ElfImage:
    elf = _parse(image)
    if (elf.bits == 32) != (chosen is ImageFormat.ELF32):
        raise BootError(f"image is a {elf.bits}-bit ELF file, not {chosen.value}")
    return elf


def _load_elf(chosen: ImageFormat, elf: ElfImage, image: bytes, layout: Layout, cpu: CpuState) -> LoadedImage:
    elf.place(image, layout)
    if elf.bits == 32:
        enter_protected_mode(cpu, layout, elf.entry)
    else:
        enter_64_bit_mode(cpu, layout, elf.entry)
    return LoadedImage(chosen, elf.entry, cpu, tuple(layout.ranges))


def _load_flat(image: bytes, layout: Layout, options: BootOptions, cpu: CpuState) -> LoadedImage:
    if not image:
        raise BootError("image is empty")
    address = options.flat_address
    if not 0 <= address < MIB:
        raise BootError(f"a flat binary starts below 1 MiB, not at {address:#x}")
    layout.place(address, image, len(image), "flat binary")
    enter_real_mode(cpu, address)
    return LoadedImage(ImageFormat.FLAT, address, cpu, tuple(layout.ranges))
