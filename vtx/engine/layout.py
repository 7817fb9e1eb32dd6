"""Where Unicorn keeps processor state inside a saved context, and how its flags word is made.

A context is a 40-byte header followed by the leading part of the library's CPU state. The offsets below were measured
on the versions in `native.SUPPORTED_VERSIONS`; `selfcheck` verifies them at start-up through the public register API.
"""

from __future__ import annotations

import functools
import struct
from typing import Final

from vtx.x86.outcome import Vector
from vtx.x86.state import AccessRights, CpuState, Cr0, Cr4, Efer, Rflags

CONTEXT_SIZE: Final = 5608
STATE: Final = 40

GPR: Final = STATE
RIP: Final = STATE + 128
EFLAGS: Final = STATE + 136
CC_SRC: Final = STATE + 152
CC_OP: Final = STATE + 168
HFLAGS: Final = STATE + 176
SEGMENTS: Final = STATE + 184  # ES CS SS DS FS GS LDTR TR GDTR IDTR, 24 bytes each
SEGMENTS_END: Final = SEGMENTS + 240
CR0: Final = STATE + 424
EFER: Final = STATE + 592
FPU: Final = STATE + 600
FPU_END: Final = STATE + 1848
XMM0: Final = STATE + 824
KERNEL_GS_BASE: Final = STATE + 4864
CONTROLS: Final = (CR0, CR0 + 16, CR0 + 32, EFER, KERNEL_GS_BASE)  # CR0, CR2, CR4 and those
ERROR_CODE: Final = STATE + 5384
DR0: Final = STATE + 5400
DR6: Final = DR0 + 48
OLD_EXCEPTION: Final = STATE + 5496
VMCB: Final = STATE + 5504
INTERCEPTS: Final = STATE + 5520

SEGMENT: Final = struct.Struct("<I4xQII")
ALL_SEGMENTS: Final = struct.Struct("<" + 10 * "I4xQII")
REGISTERS: Final = struct.Struct("<17Q")  # GPRs and RIP
FLAGS: Final = struct.Struct("<QQQQIiII")  # EFLAGS, cc_dst, cc_src, cc_src2, cc_op, direction, hflags, hflags2
HEAD: Final = struct.Struct("<17QQQQQIiII32xQ")  # those and these, hflags and hflags2, and the base of CS
PRIVILEGE: Final = struct.Struct("<Q32xI")  # from EFLAGS: it, hflags
PLACE: Final = struct.Struct("<Q40xI36xQ")  # from RIP: it, hflags, base of CS

CC_OP_EFLAGS: Final = 1
LAZY_FLAGS: Final = struct.Struct("<QQQQIi")  # all but the hidden flags of `FLAGS`
ARITHMETIC_FLAGS: Final = int(Rflags.CF | Rflags.PF | Rflags.AF | Rflags.ZF | Rflags.SF | Rflags.OF)

# hflags: what the translator specializes code on.
INHIBIT_INTERRUPTS: Final = 1 << 3
CS32: Final = 1 << 4
SS32: Final = 1 << 5
ADD_SEGMENT: Final = 1 << 6
PROTECTED: Final = 1 << 7
TASK_SWITCHED_SHIFT: Final = 9 - 1  # CR0.MP, EM, TS sit at bits 1 to 3
LONG_MODE_ACTIVE: Final = 1 << 14
CODE64: Final = 1 << 15
SVM_ENABLED: Final = 1 << 20
GUEST_MODE: Final = 1 << 21
OSFXSR: Final = 1 << 22
SMAP_ENABLED: Final = 1 << 23

GLOBAL_INTERRUPT_FLAG: Final = 1 << 0  # hflags2

# CR4 as the engine sees it: never OSXSAVE, so that the XSAVE family traps; FSGSBASE and the like are not native.
CR4_SEEN: Final = int(
    Cr4.VME
    | Cr4.PVI
    | Cr4.TSD
    | Cr4.DE
    | Cr4.PSE
    | Cr4.PAE
    | Cr4.PGE
    | Cr4.PCE
    | Cr4.OSFXSR
    | Cr4.OSXMMEXCPT
    | Cr4.SMAP
)
CR0_TASK_BITS: Final = int(Cr0.MP | Cr0.EM | Cr0.TS)

# EFER as the engine sees it: SVME makes the guest-mode flag legal.
EFER_SEEN: Final = int(Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE | Efer.FFXSR)
EFER_FORCED: Final = int(Efer.SVME)

# Intercept vector: bits 0 to 31 are exit codes 60h to 7Fh, bits 32 up are 80h and on.
_NEVER: Final = (
    0x60,  # INTR, NMI, SMI, INIT, virtual INTR: the engine's own interrupts do not exist
    0x61,
    0x62,
    0x63,
    0x64,
    0x65,  # selective CR0 write: all CR0 writes trap
    0x71,  # POPF only while stepping
    0x7B,  # I/O never traps this way in Unicorn
)
INTERCEPT_ALWAYS: Final = ((1 << 64) - 1) & ~sum(1 << code - 0x60 for code in _NEVER)
INTERCEPT_POPF: Final = 1 << 0x11

TRAP_BASE: Final = 0x100
TRAP_EXCEPTION: Final = 0x140
TRAP_EXCEPTION_END: Final = 0x160
TRAP_UNDEFINED: Final = TRAP_EXCEPTION + Vector.UD
TRAP_HLT: Final = TRAP_BASE + 0x78
TRAPS_OF_INSTRUCTIONS: Final = frozenset((TRAP_UNDEFINED, *range(TRAP_BASE, TRAP_EXCEPTION), *range(0x160, 0x1A0)))


@functools.lru_cache(maxsize=1 << 10)
def _mode_flags(cr0: int, cr4: int, efer: int, cs: int, ss: int) -> int:
    """What control registers and access rights say in the hflags word."""
    flags = SVM_ENABLED | GUEST_MODE | (cr0 & CR0_TASK_BITS) << TASK_SWITCHED_SHIFT
    if cr0 & 1:
        flags |= PROTECTED
    if cr4 & Cr4.OSFXSR:
        flags |= OSFXSR
    if cr4 & Cr4.SMAP:
        flags |= SMAP_ENABLED
    if efer & Efer.LMA:
        flags |= LONG_MODE_ACTIVE
        if cs & AccessRights.LONG:
            return flags | CS32 | SS32 | CODE64
    if cs & AccessRights.DEFAULT_BIG:
        flags |= CS32
    if ss & AccessRights.DEFAULT_BIG:
        flags |= SS32
    return flags


def hidden_flags(state: CpuState) -> int:
    """The hflags word for ``state``."""
    segments = state.segments
    flags = _mode_flags(state.cr0, state.cr4, state.efer, segments[1].access_rights, segments[2].access_rights)
    flags |= state.cpl
    if state.shadow:
        flags |= INHIBIT_INTERRUPTS
    if flags & CODE64:
        return flags
    based = segments[0].base | segments[2].base | segments[3].base
    if based or not state.cr0 & 1 or state.rflags & Rflags.VM or not flags & CS32:
        flags |= ADD_SEGMENT
    return flags


@functools.lru_cache(maxsize=1 << 12)
def segment_flags(access_rights: int) -> int:
    """Access rights as the engine stores them: the high doubleword of a descriptor; 0 for an unusable segment."""
    if access_rights & AccessRights.UNUSABLE:
        return 0
    return (access_rights & 0xF0FF) << 8


def access_rights(flags: int) -> int:
    """The inverse of `segment_flags`."""
    rights = flags >> 8 & 0xF0FF
    return rights if rights & AccessRights.PRESENT else rights & 0x60 | AccessRights.UNUSABLE
