"""Operands of hostile code, and what puts values where an instruction wants them."""

from __future__ import annotations

import random

import hostile_places as at


def _displacement(source: random.Random, size: int) -> bytes:
    if size == 1:
        return source.randbytes(1)
    if source.random() < 0.8:
        return (source.choice(at.ADDRESSES) & (1 << 8 * size) - 1).to_bytes(size, "little")
    return source.randbytes(size)


def operand(source: random.Random, bits: int, register: int | None = None, *, memory: bool = False) -> bytes:
    """ModRM with what follows it: any operand, or a memory operand."""
    field = (source.randrange(8) if register is None else register) << 3
    mode = source.choice((0, 0, 0, 1, 2) if memory else (0, 0, 1, 2, 3, 3))
    rm = source.randrange(8)
    if mode == 3:
        return bytes((0xC0 | field | rm,))
    if bits == 16:
        rm = 6 if source.random() < 0.4 else rm
        size = (2 if rm == 6 else 0, 1, 2)[mode]
        return bytes((mode << 6 | field | rm,)) + _displacement(source, size)
    if source.random() < 0.4:  # an absolute address
        if bits == 64:
            return bytes((field | 4, 0x25)) + _displacement(source, 4)
        return bytes((field | 5,)) + _displacement(source, 4)
    result = bytes((mode << 6 | field | rm,))
    size = (4 if rm == 5 else 0, 1, 4)[mode]
    if rm == 4:
        sib = source.randrange(256)
        result += bytes((sib,))
        size = 4 if mode == 0 and sib & 7 == 5 else size
    return result + _displacement(source, size)


def immediate(source: random.Random, bits: int) -> bytes:
    """Four random bytes, two in 16-bit code."""
    return source.randbytes(2 if bits == 16 else 4)


def load(register: int, value: int, bits: int) -> bytes:
    """MOV of a 32-bit value into one of the first eight registers."""
    prefix = b"\x66" if bits == 16 else b""
    return prefix + bytes((0xB8 | register,)) + (value & 0xFFFF_FFFF).to_bytes(4, "little")


def address(source: random.Random, register: int, bits: int) -> bytes:
    """MOV of an address that means something into one of the first eight registers."""
    if bits == 64 and source.random() < 0.3:
        value = source.choice(at.WIDE_ADDRESSES)
        return bytes((0x48, 0xB8 | register)) + value.to_bytes(8, "little")
    return load(register, source.choice(at.ADDRESSES), bits)


def store(register: int, offset: int, value: int, bits: int) -> bytes:
    """MOV of 32 bits to memory at one of the first eight registers, not ESP."""
    prefix = b"\x67\x66" if bits == 16 else b""
    place = bytes((0xC7, 0x80 | register)) + offset.to_bytes(4, "little")
    return prefix + place + (value & 0xFFFF_FFFF).to_bytes(4, "little")


def at_register(opcode: bytes, register: int, field: int, bits: int, offset: int = 0) -> bytes:
    """``opcode`` with ``field`` in ModRM and memory ``offset`` bytes from one of the first eight registers, not ESP."""
    prefix = b"\x67" if bits == 16 else b""
    return prefix + opcode + bytes((0x80 | field << 3 | register,)) + offset.to_bytes(4, "little")
