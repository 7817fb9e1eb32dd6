"""What goes into booting an image and what comes out, whatever its format."""

from __future__ import annotations

import enum

from attrs import field, frozen

from vtx.x86.state import CpuState

LOADER_NAME = b"vtx\0"


class BootError(ValueError):
    """The image cannot be booted; the message is one line for the person who chose it."""


class ImageFormat(enum.Enum):
    """The formats, by the name of an option that chooses one."""

    MULTIBOOT1 = "multiboot1"
    MULTIBOOT2 = "multiboot2"
    BZIMAGE = "bzimage"
    PVH = "pvh"
    VMLINUX = "vmlinux"
    ELF32 = "elf32"
    ELF64 = "elf64"
    FLAT = "flat"


@frozen
class Module:
    """A file handed to the image: its contents and the string that goes with it."""

    data: bytes
    command_line: str = ""


@frozen
class BootOptions:
    """What the user asks for.

    ``name`` is the first word of the command line, as a boot loader has it. ``format`` overrides detection.
    ``flat_address`` is where a flat binary is loaded and entered, a physical address below 1 MiB.
    """

    name: str = "image"
    command_line: str = ""
    modules: tuple[Module, ...] = ()
    format: ImageFormat | None = None
    flat_address: int = 0x7C00

    @property
    def full_command_line(self) -> str:
        """Name and arguments."""
        return f"{self.name} {self.command_line}".rstrip(" ")


@frozen
class Range:
    """``size`` bytes of physical memory at ``start``, and what they hold."""

    start: int
    size: int
    what: str

    @property
    def end(self) -> int:
        """The first address beyond."""
        return self.start + self.size


@frozen
class LoadedImage:
    """The result: ``cpu`` is ready to run.

    ``entry`` is the physical address of the first instruction, ``ranges`` the memory in use in ascending order
    (image, modules, boot information), ``information`` the physical address of the boot information, None if the
    format has none.
    """

    format: ImageFormat
    entry: int
    cpu: CpuState
    ranges: tuple[Range, ...] = field(factory=tuple)
    information: int | None = None


def c_string(text: str, what: str) -> bytes:
    """``text`` as a NUL-terminated string; bytes that were not UTF-8 when the text was read come back unchanged."""
    if "\0" in text:
        raise BootError(f"{what} contains a NUL character")
    try:
        return text.encode("utf-8", "surrogateescape") + b"\0"
    except UnicodeEncodeError:
        raise BootError(f"{what} contains a character that has no encoding") from None
