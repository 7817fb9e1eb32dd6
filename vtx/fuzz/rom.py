"""A ROM in place of a BIOS: it puts into memory what this model's loader would have put there, and starts it.

The guest is entered as a Multiboot loader enters it, so that memory is the same on every emulator.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from vtx.bench.listing import code
from vtx.machine import Machine
from vtx.x86.memory import PhysicalMemory
from vtx.x86.state import Gpr

LARGEST_ROM: Final = 4 << 20
_PAGE: Final = 0x1000
_ROM_UNIT: Final = 0x1_0000
_VGA_HOLE: Final = (0xA_0000, 0x10_0000)

# The last page of the ROM: GDT, its pointer, 16-bit code, 32-bit code, reset vector.
_GDT, _GDTR, _CODE_16, _CODE_32, _RESET = 0x000, 0x018, 0x020, 0x040, 0xFF0
_FLAT: Final = struct.pack("<3Q", 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
_LAST_PAGE: Final = 0xFFFF_F000

_RESET_VECTOR: Final = "e9 2d f0                        ; jmp 0F020h"
_ENTER_PROTECTED_MODE: Final = """\
66 2e 0f 01 16 18 f0            ; o32 lgdt [cs:0F018h]
0f 20 c0                        ; mov eax,cr0
0c 01                           ; or al,1
0f 22 c0                        ; mov cr0,eax
66 ea 40 f0 ff ff 08 00         ; jmp 8:0FFFFF040h
"""
_LOAD_SEGMENTS: Final = """\
fc                              ; cld
b8 10 00 00 00                  ; mov eax,10h
8e d8                           ; mov ds,eax
8e c0                           ; mov es,eax
8e d0                           ; mov ss,eax
8e e0                           ; mov fs,eax
8e e8                           ; mov gs,eax
"""


def rom_of(machine: Machine) -> bytes:
    """A ROM that ends at 4 GiB: it puts the memory of ``machine`` in place and starts what was loaded there."""
    ranges = list(_used(machine.memory))
    size = -(-(sum(len(data) for _, data in ranges) + _PAGE) // _ROM_UNIT) * _ROM_UNIT
    if size > LARGEST_ROM:
        raise ValueError(f"a ROM of {size} bytes; the largest has {LARGEST_ROM}")
    position = (1 << 32) - size
    program, contents = code(_LOAD_SEGMENTS), b""
    for address, data in ranges:
        program += _load(esi=position, edi=address, ecx=len(data) // 4) + code("f3 a5 ; rep movsd")
        contents += data
        position += len(data)
    state = machine.cpu.state
    program += _load(eax=state.gpr[Gpr.RAX], ebx=state.gpr[Gpr.RBX], edx=state.rip) + code("ff e2 ; jmp edx")
    last = bytearray(_PAGE)
    for offset, data in (
        (_GDT, _FLAT),
        (_GDTR, struct.pack("<HI", len(_FLAT) - 1, _LAST_PAGE + _GDT)),
        (_CODE_16, code(_ENTER_PROTECTED_MODE)),
        (_CODE_32, program),
        (_RESET, code(_RESET_VECTOR)),
    ):
        if offset + len(data) > _PAGE:
            raise ValueError(f"{len(ranges)} ranges of memory are too many")
        last[offset : offset + len(data)] = data
    return contents.ljust(size - _PAGE, b"\0") + last


_REGISTERS: Final = {"eax": 0, "ecx": 1, "edx": 2, "ebx": 3, "esi": 6, "edi": 7}


def _load(**values: int) -> bytes:
    """MOV of constants to 32-bit registers."""
    return b"".join(struct.pack("<BI", 0xB8 | _REGISTERS[name], value) for name, value in values.items())


def _used(memory: PhysicalMemory) -> Iterator[tuple[int, bytes]]:
    """Address and contents of each run of pages that are not zero, the hole below 1 MiB left out."""
    start, run = 0, b""
    for address in range(0, memory.size, _PAGE):
        hole = _VGA_HOLE[0] <= address < _VGA_HOLE[1]
        page = b"" if hole else memory.read(address, _PAGE)
        if page.count(0) == len(page):
            if run:
                yield start, run
            run = b""
        elif run:
            run += page
        else:
            start, run = address, page
    if run:
        yield start, run
