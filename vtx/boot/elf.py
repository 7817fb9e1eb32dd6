"""ELF executables: what to load where, checked.

Only the file header and the program headers matter; a file without section headers, or with broken ones, is as good.

Spec: Tool Interface Standard, "Executable and Linking Format (ELF) Specification".
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any

from attrs import frozen
from elftools.common.exceptions import ELFError
from elftools.common.utils import struct_parse
from elftools.elf.structs import ELFStructs

from vtx.boot.image import BootError
from vtx.boot.layout import Layout

MAGIC = b"\x7fELF"
CLASS_OFFSET, DATA_OFFSET = 4, 5
CLASS_BITS = {1: 32, 2: 64}
LITTLE_ENDIAN = 1
NOTE_HEADER = struct.Struct("<3I")
MACHINES = ("EM_386", "EM_X86_64")


@frozen
class ElfSegment:
    """A loadable segment: ``file_size`` bytes at ``offset`` in the file, zero-filled to ``memory_size``."""

    number: int
    offset: int
    file_size: int
    physical: int
    virtual: int
    memory_size: int


@frozen
class ElfNote:
    """A note: who defined its ``type``, and its contents."""

    owner: str
    type: int
    contents: bytes


@frozen
class ElfImage:
    """A checked executable: ``bits`` is 32 or 64, ``entry`` the physical address of the entry point."""

    bits: int
    entry: int
    segments: tuple[ElfSegment, ...]
    notes: tuple[ElfNote, ...] = ()

    def place(self, image: bytes, layout: Layout) -> None:
        """Load the segments of the file ``image``."""
        view = memoryview(image)
        for segment in self.segments:
            data = view[segment.offset : segment.offset + segment.file_size]
            layout.place(segment.physical, data, segment.memory_size, f"ELF segment {segment.number}")


def is_elf(image: bytes) -> bool:
    """Whether ``image`` claims to be an ELF file."""
    return image.startswith(MAGIC)


def parse_elf(image: bytes) -> ElfImage:
    """Read the headers of an ELF executable for x86; a `BootError` names what is wrong with it."""
    if len(image) <= DATA_OFFSET:
        raise BootError("truncated ELF file: no header")
    bits = CLASS_BITS.get(image[CLASS_OFFSET])
    if bits is None or image[DATA_OFFSET] != LITTLE_ENDIAN:
        raise BootError("ELF file is not for x86: neither 32-bit nor 64-bit little-endian")
    structs = ELFStructs(little_endian=True, elfclass=bits)
    structs.create_basic_structs()
    stream = io.BytesIO(image)
    try:
        header = struct_parse(structs.Elf_Ehdr, stream, 0)
    except ELFError:
        raise BootError("truncated ELF file: incomplete header") from None
    if header["e_machine"] not in MACHINES:
        raise BootError(f"ELF file is not for x86: machine {header['e_machine']}")
    if header["e_type"] != "ET_EXEC":
        raise BootError(f"ELF file is not a fixed-address executable: type {header['e_type']}")
    structs.create_advanced_structs(header["e_type"], header["e_machine"], header["e_ident"]["EI_OSABI"])
    programs = _program_headers(image, stream, structs, header)
    segments = tuple(_segments(image, programs))
    if not segments:
        raise BootError("ELF file has no loadable segments")
    notes = tuple(note for program in programs if program["p_type"] == "PT_NOTE" for note in _notes(image, program))
    return ElfImage(bits, _physical_entry(header["e_entry"], segments), segments, notes)


def _program_headers(image: bytes, stream: io.BytesIO, structs: Any, header: Any) -> list[Any]:
    size = structs.Elf_Phdr.sizeof()
    count = header["e_phnum"]
    if count and header["e_phentsize"] != size:
        raise BootError(f"malformed ELF file: program header size {header['e_phentsize']}, not {size}")
    if header["e_phoff"] + count * size > len(image):
        raise BootError("truncated ELF file: incomplete program headers")
    return [struct_parse(structs.Elf_Phdr, stream, header["e_phoff"] + number * size) for number in range(count)]


def _segments(image: bytes, programs: list[Any]) -> list[ElfSegment]:
    """The PT_LOAD segments that occupy memory, each checked to lie in the file."""
    segments = []
    for number, program in enumerate(programs):
        if program["p_type"] == "PT_INTERP":
            raise BootError("ELF file is a dynamically linked program, not a bare-metal image")
        if program["p_type"] != "PT_LOAD" or not program["p_memsz"]:
            continue
        if program["p_filesz"] > program["p_memsz"]:
            raise BootError(f"malformed ELF file: segment {number} is larger in the file than in memory")
        if program["p_offset"] + program["p_filesz"] > len(image):
            end = program["p_offset"] + program["p_filesz"]
            raise BootError(f"truncated ELF file: segment {number} ends at {end:#x}, file at {len(image):#x}")
        segments.append(
            ElfSegment(
                number=number,
                offset=program["p_offset"],
                file_size=program["p_filesz"],
                physical=program["p_paddr"],
                virtual=program["p_vaddr"],
                memory_size=program["p_memsz"],
            )
        )
    return segments


def _notes(image: bytes, program: Any) -> Iterator[ElfNote]:
    """The notes of a PT_NOTE segment, as many as are whole."""
    start, size = program["p_offset"], program["p_filesz"]
    data = image[start : start + size]
    position = 0
    while position + NOTE_HEADER.size <= len(data):
        name_size, contents_size, kind = NOTE_HEADER.unpack_from(data, position)
        name = position + NOTE_HEADER.size
        contents = name + _to_word(name_size)
        position = contents + _to_word(contents_size)
        if contents + contents_size > len(data):
            return
        owner = data[name : name + name_size].rstrip(b"\0").decode("ascii", "replace")
        yield ElfNote(owner, kind, data[contents : contents + contents_size])


def _to_word(size: int) -> int:
    return (size + 3) & ~3


def _physical_entry(entry: int, segments: tuple[ElfSegment, ...]) -> int:
    """The entry point's physical address: paging is off, or maps one to one, when the image is entered.

    Some kernels linked to run elsewhere give it as a physical address themselves.
    """
    for segment in segments:
        if segment.virtual <= entry < segment.virtual + segment.memory_size:
            return entry - segment.virtual + segment.physical
    if any(segment.physical <= entry < segment.physical + segment.memory_size for segment in segments):
        return entry
    raise BootError(f"ELF entry point {entry:#x} lies in no segment")
