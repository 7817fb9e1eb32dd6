"""Hostile users of user interrupts: registers, descriptors and tables that are good ones or not, and code for them."""

from __future__ import annotations

import random
from typing import Final

import hostile_places as at
from hostile_operands import at_register, load, store

from vtx.machine import Machine
from vtx.x86.state import CpuState

_EDI: Final = 7
_UINTR: Final = 25  # of CR4
RR, HANDLER, STACKADJUST, MISC, PD, TT = range(0x985, 0x98B)
_UPID, _UITT = at.DATA + 0x800, at.DATA + 0xC00
_VECTORS: Final = (0xEC, 0xEC, 0xEC, 0xEC, 0x20, 0x40, 0xFF, 0x0E)  # of notifications, and others
_ALONE: Final = (b"\xf3\x0f\x01\xec", b"\xf3\x0f\x01\xed", b"\xf3\x0f\x01\xee", b"\xf3\x0f\x01\xef")


def _value(source: random.Random, index: int) -> int:
    """What one of the MSRs may be: mostly something that it takes."""
    values = {
        RR: (0, 1, 1 << 63, source.getrandbits(64)),
        HANDLER: (at.CODE, at.CODE + source.randrange(at.CODE_SIZE), 1 << 47, at.NOWHERE),
        STACKADJUST: (0, 128, at.STACK | 1, (1 << 64) - 8, at.DATA + 8 | 1, at.LOCAL_APIC + 0x310 | 1),
        MISC: tuple(vector << 32 | source.choice((0, 3, 0xFFFF_FFFF)) for vector in _VECTORS),
        PD: (_UPID, _UPID, _UPID, at.NOWHERE, at.LOCAL_APIC, at.TABLES, source.choice(at.ADDRESSES) & ~63),
        TT: (_UITT | 1, _UITT | 1, _UITT | 1, _UITT, at.CODE | 1, at.DATA + 0xFF0 | 1),
    }
    return source.choice((*values[index] * 3, source.getrandbits(64)))


def _descriptor(source: random.Random) -> int:
    flags = source.choice((0, 0, 0, 1, 2, 3, source.getrandbits(16)))
    return flags | source.choice(_VECTORS) << 16 | source.choice((0, 0, 0, 1, 0xFF, source.getrandbits(16))) << 40


def _entry(source: random.Random) -> int:
    return source.choice((1, 1, 1, 0, 3)) | source.choice((0, 5, 63, 64, source.randrange(64))) << 8


def install(machine: Machine, source: random.Random, state: CpuState) -> None:
    """Enable user interrupts in ``state``, that of the program; fill the processor's MSRs and what they point to."""
    cpu, memory = machine.cpu, machine.memory
    state.cr4 |= 1 << _UINTR
    state.user_interrupt_flag = cpu.state.user_interrupt_flag = source.random() < 0.8
    for index in range(RR, TT + 1):
        cpu.msrs.write(index, _value(source, index))
    if source.random() < 0.4:
        cpu.send_interrupt(source.choice(_VECTORS), 0)
    for number in range(4):
        memory.write_u64(_UPID + 64 * number, _descriptor(source))
        memory.write_u64(_UPID + 64 * number + 8, source.choice((0, 1 << source.randrange(64), source.getrandbits(64))))
        memory.write_u64(_UITT + 16 * number, _entry(source))
        address = _UPID + 64 * number if source.random() < 0.9 else source.choice(at.WIDE_ADDRESSES)
        memory.write_u64(_UITT + 16 * number + 8, address)


def _write_msr(source: random.Random, bits: int) -> bytes:
    index = source.randrange(RR, TT + 1)
    value = _value(source, index)
    halves = load(0, value & 0xFFFF_FFFF, bits) + load(2, value >> 32, bits)
    return load(1, index, bits) + halves + source.choice((b"\x0f\x30", b"\x0f\x30", b"\x0f\x32"))


def _enable(source: random.Random, bits: int) -> bytes:
    prefix = b"\x66" if bits == 16 else b""
    change = b"\x0f\xba" + bytes((source.choice((0xE8, 0xE8, 0xF8)), _UINTR))
    return b"\x0f\x20\xe0" + prefix + change + b"\x0f\x22\xe0"


def _send(source: random.Random, bits: int) -> bytes:
    """SENDUIPI, perhaps with an entry or a descriptor written before."""
    code = b""
    if source.random() < 0.3:
        code += load(_EDI, _UITT, bits) + store(_EDI, 0, _entry(source), bits)
    if source.random() < 0.3:
        code += load(_EDI, _UPID, bits) + store(_EDI, 0, _descriptor(source) & 0xFFFF_FFFF, bits)
    index = source.choice((0, 0, 0, 1, 2, 3, source.getrandbits(32)))
    return code + load(0, index, bits) + source.choice((b"\xf3\x0f\xc7\xf0", b"\xf3\x48\x0f\xc7\xf0"))


def _return(source: random.Random, bits: int) -> bytes:
    """UIRET to what follows it, or to wherever the stack says."""
    if bits != 64 or source.random() < 0.3:
        return _ALONE[0]
    # mov rax,rsp; push rax; pushfq; lea rcx,[what follows]; push rcx
    return bytes.fromhex("4889e0 50 9c 488d0d05000000 51") + _ALONE[0]


def _interrupt_itself(source: random.Random, bits: int) -> bytes:
    """A notification, or another interrupt, by the local APIC."""
    command = 0x4_0000 | source.choice(_VECTORS)
    return load(_EDI, at.LOCAL_APIC, bits) + store(_EDI, 0x300, command, bits) + b"\xfb"


def _components(source: random.Random, bits: int) -> bytes:
    """XSAVES or XRSTORS of UINTR state, mostly with IA32_XSS written before."""
    code = b""
    if source.random() < 0.7:
        code += load(1, 0xDA0, bits) + load(0, source.choice((0x4000, 0x7800)), bits) + load(2, 0, bits) + b"\x0f\x30"
    place = at.DATA if bits != 16 else 0xE000
    code += load(_EDI, place, bits)
    if source.random() < 0.5:
        for offset, value in ((512, 0x4000), (516, 0), (520, 0x4000), (524, 1 << 31), (596, source.getrandbits(8))):
            code += store(_EDI, offset, value, bits)
    code += load(0, 0x4000 | source.randrange(4), bits) + load(2, 0, bits)
    wide = b"\x48" if bits == 64 and source.random() < 0.5 else b""
    return code + at_register(wide + b"\x0f\xc7", _EDI, source.choice((3, 5)), bits)


def user_interrupts(source: random.Random, bits: int) -> bytes:
    """The instructions and what is around them."""
    code = b""
    for _ in range(source.randrange(1, 4)):
        make = source.choice((_write_msr, _enable, _send, _send, _return, _return, _interrupt_itself, _components))
        code += make(source, bits) if source.random() < 0.6 else source.choice(_ALONE)
    return code
