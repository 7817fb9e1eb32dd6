"""Guests of a few bytes, and the command line run inside this process."""

from __future__ import annotations

import struct
from collections.abc import Callable

from attrs import frozen

from vtx.bench.listing import code

LOAD_ADDRESS = 0x10_0000
ENTRY = LOAD_ADDRESS + 0x20
"""Where the code of `multiboot` starts."""

RAM = 128 << 20
UNBACKED = 0xF000_0000
PRIVATE = 1 << 45
"""Beyond any RAM, and where the engine keeps things of its own."""

EXIT_EAX = code("""\
ba f4 00 00 00          ; mov edx, 0xf4
ef                      ; out dx, eax
f4                      ; hlt
""")


def exit_with(value: int) -> bytes:
    return b"\xb8" + struct.pack("<I", value) + EXIT_EAX


def multiboot(program: bytes) -> bytes:
    """A Multiboot 1 image of raw bytes: flat 32-bit protected mode, paging off, no IDT."""
    magic, flags = 0x1BADB002, 1 << 16
    checksum = -(magic + flags) & 0xFFFF_FFFF
    return struct.pack("<8I", magic, flags, checksum, LOAD_ADDRESS, LOAD_ADDRESS, 0, 0, ENTRY) + program


@frozen
class Finished:
    status: int
    stdout: bytes
    stderr: str

    @property
    def last_line(self) -> str:
        return self.stderr.rstrip("\n").rpartition("\n")[2]


RunVtx = Callable[..., Finished]
