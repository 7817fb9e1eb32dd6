"""What PC firmware leaves behind in low memory and in devices when it starts an image.

Memory: the real-mode vectors all lead to a stub that returns, those of the 8259s to stubs that also end the interrupt;
the timer's counts ticks in the BIOS data area as firmware does. There are no BIOS services: software interrupts return
with all registers as they were.

Code: the last page of the BIOS segment, in ROM below 4 GiB and copied to RAM below 1 MiB. A processor that comes to the
reset vector, after a reset or INIT or by a jump, goes where the shutdown code in CMOS byte 0FH says, and clears it: on
through the far pointer at 40:67 (codes 05H and 0AH), or to the image, which is booted again.

System-management mode: SMRAM is where it is after reset, ordinary memory from 30000H, the same for all processors. The
handler has nothing to do and resumes; software may put its own there, and relocate SMBASE.

Devices: the 8259s at vectors 08H and 70H, edge-triggered, with only the timer (IRQ 0) and the cascade open: no other
device is active before its driver, and a driver opens its own line. Counter 0 of the 8254 runs at 18.2 Hz, so a
processor that halts with interrupts on is woken. The real-time clock runs without interrupts.

Spec: IBM Personal Computer AT Technical Reference, "System BIOS Usage"; 8259A data sheet, "Initialization
Command Words".
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from vtx.boot.layout import CONVENTIONAL_END, KIB, PAGE
from vtx.pc_map import BOOT_PORT, BOOT_WORD
from vtx.x86.memory import PhysicalMemory

PortWrite = Callable[[int, int, int], None]
"""Writes a value to an I/O port: port, size in bytes, value."""

SEGMENT: Final = 0xF000
ROM_OFFSET: Final = 0xF000
RETURN_OFFSET: Final = 0xFF53
TIMER_OFFSET: Final = 0xFEA5
MASTER_OFFSET: Final = 0xFF23
SLAVE_OFFSET: Final = 0xFF30
POST_OFFSET: Final = 0xF000
RESET_OFFSET: Final = 0xFFF0
DATE_OFFSET: Final = 0xFFF5
MODEL_OFFSET: Final = 0xFFFE
MODEL_AT: Final = 0xFC
EBDA_SEGMENT: Final = CONVENTIONAL_END >> 4
SMM_HANDLER: Final = 0x3_8000

RETURN = bytes.fromhex("cf")  # iret
TIMER = bytes.fromhex(
    "1e 50"  # push ds; push ax
    "b8 40 00 8e d8"  # mov ax, 0x40; mov ds, ax
    "66 ff 06 6c 00"  # inc dword [0x6c]
    "b0 20 e6 20"  # mov al, 0x20; out 0x20, al
    "58 1f cf"  # pop ax; pop ds; iret
)
END_MASTER = bytes.fromhex("50 b0 20 e6 20 58 cf")  # push ax; mov al, 0x20; out 0x20, al; pop ax; iret
END_SLAVE = bytes.fromhex("50 b0 20 e6 a0 e6 20 58 cf")  # the same for both controllers
RESUME = bytes.fromhex("0f aa")  # rsm
RESET = b"\xea" + struct.pack("<HH", POST_OFFSET, SEGMENT)  # jmp far SEGMENT:POST
POST = (
    bytes.fromhex(
        "fa fc"  # cli; cld
        "31 c0 8e d8"  # xor ax, ax; mov ds, ax
        "b0 8f e6 70 e4 71"  # mov al, 0x8f; out 0x70, al; in al, 0x71: the shutdown code, with NMI masked
        "88 c4"  # mov ah, al
        "b0 0f e6 70 30 c0 e6 71"  # mov al, 0xf; out 0x70, al; xor al, al; out 0x71, al: it holds once
        "80 fc 0a 74 09"  # cmp ah, 0xa; je resume
        "80 fc 05 75 08"  # cmp ah, 5; jne boot
        "b0 20 e6 20"  # mov al, 0x20; out 0x20, al: code 5 ends an interrupt first
        "ff 2e 67 04"  # resume: jmp far [0x467]
    )
    + struct.pack("<BH", 0xBA, BOOT_PORT)  # boot: mov dx, BOOT_PORT
    + struct.pack("<HI", 0xB866, BOOT_WORD)  # mov eax, BOOT_WORD
    + bytes.fromhex("66 ef f4 eb fd")  # out dx, eax; hlt; jmp back to it: not the bootstrap processor, or no image
)

CODE: Final = (
    (POST_OFFSET, POST),
    (TIMER_OFFSET, TIMER),
    (MASTER_OFFSET, END_MASTER),
    (SLAVE_OFFSET, END_SLAVE),
    (RETURN_OFFSET, RETURN),
    (RESET_OFFSET, RESET),
    (DATE_OFFSET, b"01/01/26"),
    (MODEL_OFFSET, bytes((MODEL_AT,))),
)

MASTER_VECTORS: Final = range(0x08, 0x10)
SLAVE_VECTORS: Final = range(0x70, 0x78)
UNMASKED: Final = 1 << 0 | 1 << 2

DEVICE_SET_UP: Final = (
    # Counter 0: both bytes, square wave, 65536. Before the 8259s: their initialization forgets the edge this makes.
    *((0x43, 0x36), (0x40, 0), (0x40, 0)),
    *((0x20, value) for value in (0x11,)),
    *((0x21, value) for value in (MASTER_VECTORS.start, 0x04, 0x01, 0xFF & ~UNMASKED)),
    *((0xA0, value) for value in (0x11,)),
    *((0xA1, value) for value in (SLAVE_VECTORS.start, 0x02, 0x01, 0xFF)),
    *((port, 0) for port in (0x4D0, 0x4D1)),
    *((0x70, 0x0A), (0x71, 0x26), (0x70, 0x0B), (0x71, 0x02)),
)
"""Byte writes: port and value."""


def install(memory: PhysicalMemory, port_write: PortWrite) -> None:
    """Leave ``memory`` and the devices behind ``port_write`` as firmware does.

    Memory is left alone if RAM does not reach the BIOS area.
    """
    if memory.is_backed(SEGMENT << 4, 64 * KIB):
        memory.write(0, vectors())
        memory.write(0x400, data_area(memory.size))
        memory.write(CONVENTIONAL_END, bytes((1,)))  # size of the extended BIOS data area in KiB
        memory.write((SEGMENT << 4) + ROM_OFFSET, rom())
        memory.write(SMM_HANDLER, RESUME)
    for port, value in DEVICE_SET_UP:
        port_write(port, 1, value)


def rom() -> bytes:
    """The last page of the BIOS segment; an undefined byte is that of an empty ROM."""
    page = bytearray(b"\xff" * PAGE)
    for offset, code in CODE:
        page[offset - ROM_OFFSET : offset - ROM_OFFSET + len(code)] = code
    return bytes(page)


def vectors() -> bytes:
    """The real-mode interrupt vector table."""
    offsets = [RETURN_OFFSET] * 256
    for numbers, offset in ((MASTER_VECTORS, MASTER_OFFSET), (SLAVE_VECTORS, SLAVE_OFFSET)):
        offsets[numbers.start : numbers.stop] = [offset] * len(numbers)
    offsets[MASTER_VECTORS.start] = TIMER_OFFSET
    return b"".join(struct.pack("<HH", offset, SEGMENT) for offset in offsets)


def data_area(memory_size: int) -> bytes:
    """The BIOS data area at 400H, 256 bytes."""
    area = bytearray(0x100)
    struct.pack_into("<H", area, 0x00, 0x3F8)  # COM1
    struct.pack_into("<H", area, 0x0E, EBDA_SEGMENT)
    struct.pack_into("<H", area, 0x10, 1 << 1 | 1 << 9)  # equipment: x87, one serial port
    struct.pack_into("<H", area, 0x13, min(memory_size, CONVENTIONAL_END) // KIB)
    struct.pack_into("<HHHH", area, 0x1A, 0x1E, 0x1E, 0, 0)  # an empty keyboard buffer
    struct.pack_into("<HH", area, 0x80, 0x1E, 0x3E)
    return bytes(area)
