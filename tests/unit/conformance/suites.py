"""Builds of a suite as the tests of this folder need them: a configuration and images put together byte by byte.

Nothing here comes from the suite itself; the images do what its images do to report: lines on COM1, a value to the
debug-exit port.
"""

import struct
from pathlib import Path

HEADER_MAGIC = 0x1BADB002
LOAD_ADDRESS = 0x10_0000
LINE_STATUS, DATA, DEBUG_EXIT = 0x3FD, 0x3F8, 0xF4

HANG = b"\xeb\xfe"  # jmp to itself
SHUT_DOWN = b"\x0f\x01\x1d\x00\x00\x00\x00" + b"\x0f\x0b"  # lidt of nothing; ud2


def write_port(port: int, value: int) -> bytes:
    """OUT of 32 bits."""
    return b"\xb8" + struct.pack("<I", value) + b"\x66\xba" + struct.pack("<H", port) + b"\xef"


def write_byte(port: int, value: int) -> bytes:
    """OUT of one byte."""
    return bytes((0xB0, value)) + b"\x66\xba" + struct.pack("<H", port) + b"\xee"


def say(text: str) -> bytes:
    """Code that sends ``text`` through COM1."""
    return b"".join(write_byte(DATA, byte) for byte in text.encode())


def say_command_line() -> bytes:
    """Code that sends the command line of the Multiboot information that EBX points to, and a newline."""
    fetch = b"\x8b\x73\x10" + b"\x66\xba" + struct.pack("<H", DATA)  # mov esi, [ebx+16]; mov dx, DATA
    loop = b"\xac\x84\xc0\x74\x03\xee\xeb\xf8"  # lodsb; test al, al; jz out; out dx, al; jmp lodsb
    return fetch + loop + say("\n")


def say_module() -> bytes:
    """Code that sends the first Multiboot module, as text that ends with a zero byte beyond it, and a newline."""
    fetch = b"\x8b\x73\x18\x8b\x36" + b"\x66\xba" + struct.pack("<H", DATA)  # mov esi, [ebx+24]; mov esi, [esi]
    loop = b"\xac\x84\xc0\x74\x03\xee\xeb\xf8"
    return fetch + loop


def ends_with(value: int) -> bytes:
    """Code that writes ``value`` to the debug-exit port."""
    return write_port(DEBUG_EXIT, value) + HANG


def image(code: bytes, *, machine: int = 3) -> bytes:
    """A Multiboot image (ELF32 with a header, no flags) that runs ``code``."""
    multiboot = struct.pack("<3I", HEADER_MAGIC, 0, -HEADER_MAGIC & 0xFFFF_FFFF)
    offset = 52 + 32
    data = multiboot + code
    header = b"\x7fELF\x01\x01\x01" + bytes(9)
    header += struct.pack("<HHIIIIIHHHHHH", 2, machine, 1, LOAD_ADDRESS + 12, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    program = struct.pack("<8I", 1, offset, LOAD_ADDRESS, LOAD_ADDRESS, len(data), len(data), 7, 0)
    return header + program + data


def build(
    directory: Path, configuration: str, images: dict[str, bytes], *, settings: str = "ARCH=x86_64\n", head: str = ""
) -> Path:
    """A build in ``directory``: ``images`` are code by file name without ``.flat``."""
    (directory / "x86").mkdir(parents=True)
    (directory / "x86/unittests.cfg").write_text(configuration)
    (directory / "config.mak").write_text(settings)
    for name, code in images.items():
        (directory / f"x86/{name}.flat").write_bytes(image(code))
    if head:
        (directory / "build-head").write_text(head)
    return directory
