"""Programs to measure: boot sectors, so that every emulator can run the same bytes.

A boot sector masks every interrupt in both PICs, enters 32-bit protected mode, writes `START` to COM1, runs one of the
bodies below with a count in ECX, writes `END`, and ends the run in every way an emulator may know: the debug-exit port
0xF4, and the shutdown port that Bochs listens to.
"""

from __future__ import annotations

import struct
from typing import Final

from attrs import frozen

from vtx.bench.listing import code

START: Final = b"S"
END: Final = b"E"

_ORIGIN: Final = 0x7C00
_ENTRY_32: Final = 0x20
_GDTR: Final = 0x100
_SHUTDOWN: Final = 0x110
_GDT: Final = 0x120
_SECTOR: Final = 512
_FLAT_CODE: Final = 0x00CF_9B00_0000_FFFF
_FLAT_DATA: Final = 0x00CF_9300_0000_FFFF

ENTRY_16: Final = """\
fa                              ; cli
b0 ff                           ; mov al,0FFh
e6 21                           ; out 21h,al
e6 a1                           ; out 0A1h,al
31 c0                           ; xor ax,ax
8e d8                           ; mov ds,ax
66 0f 01 16 00 7d               ; o32 lgdt [7D00h]
0f 20 c0                        ; mov eax,cr0
0c 01                           ; or al,1
0f 22 c0                        ; mov cr0,eax
ea 20 7c 08 00                  ; jmp 8:7C20h
"""

ENTRY_32: Final = """\
b8 10 00 00 00                  ; mov eax,10h
8e d8                           ; mov ds,eax
8e c0                           ; mov es,eax
8e d0                           ; mov ss,eax
bc 00 70 00 00                  ; mov esp,7000h
31 f6                           ; xor esi,esi
ba fb 03 00 00                  ; mov edx,3FBh
b0 03                           ; mov al,3
ee                              ; out dx,al
ba f8 03 00 00                  ; mov edx,3F8h
b0 53                           ; mov al,53h
ee                              ; out dx,al
ba fd 03 00 00                  ; mov edx,3FDh
ec                              ; in al,dx
a8 40                           ; test al,40h
74 fb                           ; je short $-3
"""

EXIT: Final = """\
ba f8 03 00 00                  ; mov edx,3F8h
b0 45                           ; mov al,45h
ee                              ; out dx,al
ba fd 03 00 00                  ; mov edx,3FDh
ec                              ; in al,dx
a8 40                           ; test al,40h
74 fb                           ; je short $-3
31 c0                           ; xor eax,eax
ba f4 00 00 00                  ; mov edx,0F4h
ef                              ; out dx,eax
ba 00 89 00 00                  ; mov edx,8900h
be 10 7d 00 00                  ; mov esi,7D10h
b9 08 00 00 00                  ; mov ecx,8
f3 6e                           ; rep outsb
f4                              ; hlt
eb fd                           ; jmp short $-1
"""


@frozen
class Body:
    """What is measured: ``per_pass`` instructions, as often as the count says."""

    listing: str
    per_pass: int


COMPUTE: Final = Body(
    per_pass=18,
    listing="""\
e8 10 00 00 00                  ; call $+15h
83 c6 40                        ; add esi,40h
81 e6 ff ff 00 00               ; and esi,0FFFFh
49                              ; dec ecx
75 ef                           ; jne short $-0Fh
eb 30                           ; jmp short $+32h
90                              ; nop
90                              ; nop
8b 86 00 00 01 00               ; mov eax,[esi+10000h]
03 86 04 00 01 00               ; add eax,[esi+10004h]
89 86 00 00 02 00               ; mov [esi+20000h],eax
01 8e 08 00 02 00               ; add [esi+20008h],ecx
50                              ; push eax
e8 04 00 00 00                  ; call $+9
5a                              ; pop edx
31 d0                           ; xor eax,edx
c3                              ; ret
8b 54 24 04                     ; mov edx,[esp+4]
8d 04 50                        ; lea eax,[eax+edx*2]
89 96 0c 00 02 00               ; mov [esi+2000Ch],edx
c3                              ; ret
""",
)
"""Loads, stores and calls: two levels of calls in a loop that sweeps 64 KiB."""

TRAP: Final = Body(
    per_pass=3,
    listing="""\
0f 09                           ; wbinvd
49                              ; dec ecx
75 fb                           ; jne short $-3
""",
)
"""An instruction that the model executes and that does nothing there: the price of a trap."""

LOOP: Final = Body(
    per_pass=3,
    listing="""\
66 90                           ; xchg ax,ax
49                              ; dec ecx
75 fb                           ; jne short $-3
""",
)
"""`TRAP` without the trap."""

TOUCH: Final = Body(
    per_pass=4,
    listing="""\
c6 86 00 00 10 00 01            ; mov byte [esi+100000h],1
81 c6 00 10 00 00               ; add esi,1000h
49                              ; dec ecx
75 f0                           ; jne short $-0Eh
""",
)
"""Writes to one page after the other from 1 MiB on."""


def boot_sector(body: Body, count: int) -> bytes:
    """The 512 bytes that run ``body`` with ``count`` (1 to 2**32 - 1) in ECX."""
    load_count = b"\xb9" + struct.pack("<I", count)
    parts = {
        0: code(ENTRY_16),
        _ENTRY_32: code(ENTRY_32) + load_count + code(body.listing) + code(EXIT),
        _GDTR: struct.pack("<HI", 23, _ORIGIN + _GDT),
        _SHUTDOWN: b"Shutdown",
        _GDT: struct.pack("<3Q", 0, _FLAT_CODE, _FLAT_DATA),
        _SECTOR - 2: b"\x55\xaa",
    }
    sector = bytearray(_SECTOR)
    free = 0
    for offset, data in parts.items():
        assert offset >= free, "the parts of the boot sector overlap"
        sector[offset : offset + len(data)] = data
        free = offset + len(data)
    return bytes(sector)
