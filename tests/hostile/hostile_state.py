"""Hostile code around state that most code leaves alone: exceptions of SSE and x87 arithmetic unmasked, images that
restore state, protection keys, waiting, and the ends of segments.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

import hostile_places as at
from hostile_operands import address, at_register, immediate, load, operand, store

_EDI: Final = 7
_IMAGE_PLACES: Final = (0, 0, 0, 0x40, 0x400, 0xDC0, 0x10)


def _place(source: random.Random, bits: int) -> int:
    """Where an image is: in 16-bit code, which has segments of 64 KiB at the program, behind it."""
    return (0xE000 if bits == 16 else at.DATA) + source.choice(_IMAGE_PLACES)


def _change_control(source: random.Random, register: int, bit: int, bits: int) -> bytes:
    """A bit of CR0 or CR4 set, or now and then turned over."""
    change = b"\x0f\xba" + bytes((source.choice((0xE8, 0xE8, 0xF8)), bit))
    number = 0xC0 | register << 3
    prefix = b"\x66" if bits == 16 else b""
    return b"\x0f\x20" + bytes((number,)) + prefix + change + b"\x0f\x22" + bytes((number,))


# Arithmetic.

# 32 bits each: zero, one, the greatest, infinity, NaNs, denormals, the least that is not one.
_NUMBERS: Final = (0, 0x3F80_0000, 0x7F7F_FFFF, 0x7F80_0000, 0x7FC0_0000, 0x7F80_0001, 1, 0x007F_FFFF, 0x0080_0000)
_SSE: Final = (0x51, 0x52, 0x53, *range(0x58, 0x60), 0x2A, 0x2C, 0x2D, 0x2E, 0x2F, 0x7C, 0xD0, 0xE6)


def _simd_arithmetic(source: random.Random, bits: int) -> bytes:
    prefix = source.choice((b"", b"\x66", b"\xf2", b"\xf3"))
    kind = source.random()
    opcode, tail = bytes((0x0F, source.choice(_SSE))), b""
    if kind < 0.1:
        opcode, tail = b"\x0f\xc2", source.randbytes(1)
    elif kind < 0.2:
        prefix, opcode, tail = (
            b"\x66",
            bytes((0x0F, 0x3A, source.choice((8, 9, 10, 11, 0x40, 0x41)))),
            source.randbytes(1),
        )
    if source.random() < 0.5:
        return prefix + at_register(opcode, _EDI, source.randrange(8), bits, 0x100) + tail
    return prefix + opcode + operand(source, bits) + tail


def _numbers(source: random.Random, bits: int) -> bytes:
    result = b""
    for offset in source.sample((0x100, 0x104, 0x108, 0x10C), source.randrange(5)):
        number = source.choice(_NUMBERS) ^ source.randrange(2) << 31
        result += store(_EDI, offset, number, bits)
    return result


def _simd_exceptions(source: random.Random, bits: int) -> bytes:
    """LDMXCSR with exceptions unmasked, and arithmetic that may meet them."""
    mxcsr = source.choice(
        (
            *(0, 0x1F80 ^ 1 << source.randrange(7, 13), 0x1F80, 0x9FC0 ^ 1 << source.randrange(7, 13), 0x8040, 0x7F80),
            *(source.getrandbits(16), source.getrandbits(32)),
        )
    )
    code = load(_EDI, _place(source, bits), bits) + store(_EDI, 24, mxcsr, bits)
    if source.random() < 0.5:
        code += _change_control(source, 4, source.choice((9, 10, 10)), bits)
    code += at_register(b"\x0f\xae", _EDI, 2, bits, 24) + _numbers(source, bits)
    for _ in range(source.randrange(1, 5)):
        code += _simd_arithmetic(source, bits)
    return code + source.choice((b"", at_register(b"\x0f\xae", _EDI, 3, bits, 24)))


_X87_CONSTANTS: Final = tuple(bytes((0xD9, second)) for second in range(0xE8, 0xEF))
_X87_ALONE: Final = (
    *(
        b"\xde\xf9",
        b"\xd8\xf1",
        b"\xd9\xfa",
        b"\xd9\xe0",
        b"\xd9\xf1",
        b"\xd9\xf2",
        b"\xd9\xf8",
        b"\xd9\xfd",
        b"\xd9\xf7",
    ),
    *(b"\xdd\xd8", b"\xdb\xe2", b"\xdb\xe3", b"\xd9\xf0", b"\xd9\xfc", b"\xd9\xfe", b"\xde\xd9", b"\xdf\xf1"),
)
# Opcode and field of ModRM: loads, stores, environments and whole states.
_X87_MEMORY: Final = (
    *((b"\xd9", 0), (b"\xdd", 0), (b"\xdb", 5), (b"\xdf", 4), (b"\xd9", 2), (b"\xdd", 3), (b"\xdb", 7), (b"\xdf", 6)),
    *((b"\xdf", 3), (b"\xd8", 6), (b"\xdc", 6), (b"\xda", 6), (b"\xd9", 4), (b"\xd9", 6), (b"\xdd", 4), (b"\xdd", 6)),
)
_X87_CHECKS: Final = (
    b"\x9b",
    b"\x9b",
    b"\xdf\xe0",
    b"\x9b\xdf\xe0",
    b"\x0f\x77",
    b"\x0f\xfc\xc1",
    b"\xd9\xe8",
    b"\xd9\xd0",
)


def _x87_exceptions(source: random.Random, bits: int) -> bytes:
    """FLDCW with exceptions unmasked, arithmetic that may meet them, and what reports them; CR0.NE either way."""
    control = source.choice((0x0040, 0x037F ^ 1 << source.randrange(6), 0x0340, 0x0F00, source.getrandbits(16)))
    code = load(_EDI, _place(source, bits), bits) + store(_EDI, 0, control, bits)
    if source.random() < 0.3:
        code += _change_control(source, 0, 5, bits)
    code += at_register(b"\xd9", _EDI, 5, bits) + _numbers(source, bits)
    for _ in range(source.randrange(2, 7)):
        opcode, field = source.choice(_X87_MEMORY)
        memory = at_register(opcode, _EDI, field, bits, source.choice((0x100, 0x104, 0x40)))
        code += source.choice((memory, source.choice(_X87_ALONE), source.choice(_X87_CONSTANTS)))
    return code + source.choice(_X87_CHECKS)


# State components, protection keys.

_COMPONENTS: Final = (0x203, 3, 1, 2, 0x200, 0x201, 0x2203, 0x2000, 0, 7, 0x1B, 0x21B, 8, 0x10)


def _components(source: random.Random) -> int:
    return source.choice((*_COMPONENTS, 0xFFFF_FFFF, source.getrandbits(32)))


def _enable_components(source: random.Random, bits: int) -> bytes:
    components = source.choice((3, 3, 0x203, 0x21B, 1, _components(source)))
    value = load(1, source.randrange(10) == 0, bits) + load(2, 0, bits) + load(0, components, bits)
    return _change_control(source, 4, 18, bits) + value + b"\x0f\x01\xd1"


def _header(source: random.Random) -> tuple[int, int, int, int]:
    """XSTATE_BV and XCOMP_BV, in halves: good ones if x87 and SSE state are enabled, or anything."""
    if source.random() < 0.6:
        present, compacted = source.randrange(4), source.random() < 0.4
        return (present, 0, 3, 1 << 31) if compacted else (present, 0, 0, 0)
    components = _components(source), _components(source)
    return components[0], source.choice((0, 0, 1 << 31)), components[1], source.choice((0, 1 << 31, 1 << 31, 1 << 30))


_MOVES: Final = (
    *((b"\x0f\xae", 5), (b"\x0f\xae", 5), (b"\x0f\xae", 4), (b"\x0f\xae", 6), (b"\x0f\xae", 1), (b"\x0f\xae", 0)),
    *((b"\x0f\xc7", 3), (b"\x0f\xc7", 3), (b"\x0f\xc7", 4), (b"\x0f\xc7", 5)),
)


def _extended_state(source: random.Random, bits: int) -> bytes:
    """The XSAVE family, FXSAVE and FXRSTOR, with a header that may be a good one."""
    code = _enable_components(source, bits) if source.random() < 0.6 else b""
    place = _place(source, bits) & (~0x3F if source.random() < 0.8 else ~0)
    if source.random() < 0.8:  # what is reserved of the header
        code += load(_EDI, place + 528, bits) + load(1, 48, bits) + load(0, 0, bits)
        code += b"\xfc" + (b"\x67" if bits == 16 else b"") + b"\xf3\xaa"
    code += load(_EDI, place, bits)
    mxcsr = source.choice((0x1F80, 0x1F80, 0x1F80, 0, 0xFFFF, 0x1_0000, source.getrandbits(32)))
    values = (mxcsr, *_header(source), source.getrandbits(32))
    for offset, value in zip((24, 512, 516, 520, 524, 576), values, strict=True):
        code += store(_EDI, offset, value, bits)
    code += load(0, _components(source), bits) + load(2, source.choice((0, 0, 0xFFFF_FFFF)), bits)
    opcode, field = source.choice(_MOVES)
    wide = b"\x48" if bits == 64 and source.random() < 0.5 else b""
    after = source.choice((b"", b"", load(1, 1, bits) + b"\x0f\x01\xd0", b"\x0f\x58\xc1"))
    return code + at_register(wide + opcode, _EDI, field, bits) + after


def _keys(source: random.Random, bits: int) -> bytes:
    """RDPKRU and WRPKRU, with an access behind them."""
    code = _change_control(source, 4, source.choice((22, 22, 24)), bits) if source.random() < 0.5 else b""
    rights = source.choice((0, 4, 8, 0x5555_5554, 0xAAAA_AAA8, 0x5555_5555, 0xFFFF_FFFF, source.getrandbits(32)))
    code += load(0, rights, bits) + load(1, source.choice((0, 0, 0, 0, 1)), bits)
    code += load(2, source.choice((0, 0, 0, 0, 1)), bits) + source.choice(
        (b"\x0f\x01\xef", b"\x0f\x01\xef", b"\x0f\x01\xee")
    )
    access = at_register(source.choice((b"\x8b", b"\x89", b"\x01")), _EDI, 3, bits)
    return code + address(source, _EDI, bits) + access


# Shadow stacks, trackers of indirect branches.

_CET_ALONE: Final = (
    *(b"\xf3\x0f\x01\xea", b"\xf3\x0f\x01\xe8", b"\xf3\x0f\x1e\xfa", b"\xf3\x0f\x1e\xfb", b"\xc3", b"\xcb", b"\xcc"),
    *(b"\xe8\x00\x00\x00\x00", b"\xe8\x01\x00\x00\x00\xc3\x58", b"\xff\xd0", b"\xff\xe0", b"\x3e\xff\xe0", b"\xcd\x40"),
)
# Prefix, opcode and field of ModRM: restoring, freeing, storing, incrementing, reading.
_CET_OPERANDS: Final = (
    *((b"\xf3\x0f\x01", 5), (b"\xf3\x0f\xae", 6), (b"\x0f\x38\xf6", 0), (b"\x66\x0f\x38\xf5", 0)),
    *((b"\xf3\x0f\xae", 5), (b"\xf3\x0f\x1e", 1)),
)


def _shadow_stack(source: random.Random, bits: int) -> bytes:
    """The instructions for shadow stacks and for indirect branches, mostly with what they want to be enabled."""
    code = b""
    if source.random() < 0.4:
        control = source.choice((1, 3, 1, 3, 5, 0x804, 0x404))
        code += load(1, source.choice((0x6A0, 0x6A2)), bits) + load(0, control, bits) + load(2, 0, bits) + b"\x0f\x30"
        code += _change_control(source, 0, 16, bits) + _change_control(source, 4, source.choice((23, 23, 28)), bits)
    page = source.choice((at.SHADOW_STACK, at.SHADOW_STACK, at.USER_SHADOW_STACK, at.DATA))
    for _ in range(source.randrange(1, 5)):
        where = page + source.choice((0x400, 0xFF8, 0x7C0, 0x800, 0x404, 0xFFC, 0xFFE))
        code += load(_EDI, where, bits) + load(0, source.choice((1, 2, 0xFF, at.CODE + source.randrange(64))), bits)
        opcode, field = source.choice(_CET_OPERANDS)
        wide = b"\x48" if bits == 64 and source.random() < 0.5 else b""
        prefix, rest = (opcode[:1], opcode[1:]) if opcode[0] != 0x0F else (b"", opcode)
        encoded = prefix + wide + rest
        memory = at_register(encoded, _EDI, field, bits)
        register = encoded + bytes((0xC0 | field << 3,))
        code += source.choice((memory, memory, register, source.choice(_CET_ALONE), source.choice(_CET_ALONE)))
    return code


# Events and returns by FRED.

_SELECTORS: Final = (0x38, 0x38, 0x43, 0x23, 0x10, 0x08, 0x1B)
_TO_FRED: Final = (
    *(b"\x0f\x05", b"\x0f\x34", b"\xcd\x40", b"\xcc", b"\xf1", b"\x0f\x0b", b"\x48\x0f\x07", b"\x0f\x01\xf8", b"\xcf"),
    *(b"\x48\xcf", b"\x48\xcb", b"\xf2\x0f\x00\xf0", b"\xf2\x0f\x00\x37", b"\x0f\xa1", b"\x0f\x01\xca"),
)
_RETURNS: Final = (b"\xf2\x0f\x01\xca", b"\xf3\x0f\x01\xca")  # ERETS, ERETU


def _event_frame(source: random.Random, bits: int) -> bytes:
    """A return to the program by a frame written where the stack is, or what makes such a frame."""
    if bits != 64 or source.random() < 0.3:
        code = load(0, source.choice(_SELECTORS), bits) + source.choice(_TO_FRED)
        return code + source.choice((b"", *_RETURNS))
    frame = (
        source.getrandbits(31),
        at.CODE + source.choice((0, source.randrange(at.CODE_SIZE))),
        source.choice(_SELECTORS) | source.choice((0, 0, 0, 1, 2, 3, 4, 8, source.getrandbits(14))) << 16,
        2 | source.choice((0, 0, 0x100, 0x200, 0x202, 0xD5, 0x3000, 0x2_0000, source.getrandbits(22))),
        at.STACK - 8 * source.randrange(32),
        source.choice(_SELECTORS) | source.choice((0, 0, 1, 2, 4, 7, 8)) << 16,
    )
    code = load(4, at.STACK - 0x200, bits)
    for number, word in enumerate(frame):
        code += b"\x48\xc7\x44\x24" + bytes((8 * number,)) + word.to_bytes(4, "little")
    return code + source.choice(_RETURNS)


# Bounds.

# Prefix, opcode: BNDMK, BNDCL, BNDCU, BNDCN, BNDMOV both ways, BNDLDX, BNDSTX; BOUND is the last.
_BOUNDS: Final = (
    *((b"\xf3", b"\x0f\x1b"), (b"\xf3", b"\x0f\x1a"), (b"\xf2", b"\x0f\x1a"), (b"\xf2", b"\x0f\x1b")),
    *((b"\x66", b"\x0f\x1a"), (b"\x66", b"\x0f\x1b"), (b"", b"\x0f\x1a"), (b"", b"\x0f\x1b"), (b"", b"\x62")),
)
_BRANCHES: Final = (b"\x75\x00", b"\x74\x00", b"\x0f\x85", b"\xe8", b"\xe9", b"\xe3\x00", b"\xeb\x00")


def _bounds(source: random.Random, bits: int) -> bytes:
    """The instructions of Intel MPX, now and then enabled before, and branches with the prefix BND or without."""
    code = b""
    if source.random() < 0.3:
        value = load(1, 0, bits) + load(2, 0, bits) + load(0, source.choice((0x1B, 0x1B, 0x21B, 3, 0xB)), bits)
        code += _change_control(source, 4, 18, bits) + value + b"\x0f\x01\xd1"
        configuration = source.choice((1, 3, at.BOUNDS | 1, at.BOUNDS | 3, 0, 4, source.getrandbits(32)))
        code += load(1, 0xD90, bits) + load(0, configuration, bits) + load(2, 0, bits) + b"\x0f\x30"
    for _ in range(source.randrange(1, 5)):
        prefix, opcode = source.choice(_BOUNDS)
        number = source.choice((0, 1, 2, 3, 0, 1, 2, 3, 4, source.randrange(8)))
        wide = source.choice((b"", b"", b"\x48", b"\x44", b"\x41")) if bits == 64 else b""
        encoded = prefix + wide + opcode
        form = source.random()
        if form < 0.2:
            code += encoded + bytes((0xC0 | number << 3 | source.randrange(8),))
        elif form < 0.4:
            code += prefix + wide + opcode + operand(source, bits, number)
        else:
            sib = bits != 16 and source.random() < 0.4
            where = source.choice((at.DATA, at.DATA + 0xFF8, at.DATA - 8, at.STACK, source.choice(at.ADDRESSES)))
            code += load(_EDI, where, bits)
            # [EDI + EAX] for what takes the index by itself
            code += encoded + bytes((0x04 | number << 3, 0x07)) if sib else at_register(encoded, _EDI, number, bits)
        if source.random() < 0.4:
            branch = source.choice(_BRANCHES)
            distance = b"" if len(branch) == 2 and branch[0] != 0x0F else bytes(2 if bits == 16 else 4)
            code += source.choice((b"", b"", b"\xf2")) + branch + distance
    return code


# Waiting.


def _wait(source: random.Random, bits: int) -> bytes:
    """MONITOR, MWAIT and their like: with hints and extensions that there are not, at addresses that are not."""
    odd = source.choice((b"", b"", b"", b"", b"\x66", b"\xf2", b"\xf3", b"\xf0", b"\x67", b"\x64"))
    code = load(2, source.choice((0, 0, 1, 0xFFFF_FFFF)), bits)
    if source.random() < 0.7:
        code += address(source, 0, bits) + load(1, source.choice((0, 0, 0, 1, 0x8000_0000)), bits)
        code += odd + source.choice((b"\x0f\x01\xc8", b"\x0f\x01\xc8", b"\xf3\x0f\xae\xf0", b"\x0f\x01\xfa"))
    if source.random() < 0.3:
        code += address(source, _EDI, bits) + at_register(b"\x89", _EDI, 0, bits)
    if source.random() < 0.3:
        code += source.choice((b"\xfa", b"\xfb"))
    code += load(0, source.choice((0, 0, 0x10, 0xFF, source.getrandbits(32))), bits)
    code += load(1, source.choice((0, 0, 1, 2, 3, source.getrandbits(32))), bits)
    last = source.choice((b"\x0f\x01\xc9", b"\x0f\x01\xc9", b"\xf2\x0f\xae\xf1", b"\x66\x0f\xae\xf1", b"\x0f\x01\xfb"))
    return code + odd + last


# The ends of segments.

_ENDS: Final = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 0xFFFF, 0xFFFE, 0xFFFD, 0xFFF8, 0x1_0000, 0x1_0001, 0x1_0003, 1 << 31),
    *(0xFFFF_FFFF, 0xFFFF_FFFE, 0xFFFF_FFFC, 0xFFFF_FFF9),
)
_USES_STACK: Final = (
    *(b"\x50", b"\x58", b"\x60", b"\x61", b"\x9c", b"\x9d", b"\xc9", b"\xc8\x10\x00\x02", b"\xc3", b"\xca\x04\x00"),
    *(b"\xcf", b"\xcd\x40", b"\xcc", b"\x6a\x00", b"\x66\x50", b"\x66\x58", b"\x06", b"\x07", b"\x0f\xa0", b"\x0f\xa1"),
)


def stack_ends(bits: int) -> tuple[int, ...]:
    """Limits of stack segments that a program may have, for stack pointers to be near."""
    stack = 0x8000 if bits == 16 else at.STACK
    return stack, stack - 0x11, stack + 6


def _stack_end(source: random.Random, bits: int) -> bytes:
    """The stack pointer at an end of its segment, and instructions that use it; mostly it is put back."""
    near = source.choice(stack_ends(bits)) + source.randrange(-9, 10)
    code = load(4, source.choice((near, near, source.choice(_ENDS))), bits)
    for _ in range(source.randrange(1, 4)):
        call = b"\xe8" + immediate(source, bits)
        push = b"\xff" + operand(source, bits, source.choice((6, 2)))
        code += source.choice((source.choice(_USES_STACK), source.choice(_USES_STACK), call, push))
    back = 0x8000 if bits == 16 else at.STACK
    return code + (load(4, back, bits) if source.random() < 0.8 else b"")


def _far_end(source: random.Random, bits: int) -> bytes:
    """An access, or a jump, at an end of a segment."""
    where = load(_EDI, source.choice(_ENDS) - source.randrange(3), bits)
    prefix = source.choice((b"", b"\x26", b"\x2e", b"\x36", b"\x64"))
    opcode = source.choice(
        (b"\x8a", b"\x8b", b"\x89", b"\x0f\x10", b"\x0f\x29", b"\x0f\xc7", b"\x0f\xae", b"\xdb", b"\xff")
    )
    access = at_register(opcode, _EDI, source.randrange(8), bits)
    strings = b"\x67" * (bits == 16) + source.choice((b"\xa4", b"\xab", b"\xf3\xab", b"\xf3\xa5", b"\xae"))
    count = load(1, source.randrange(6), bits)
    return where + source.choice((prefix + access, prefix + access, count + prefix + strings, b"\xff\xe7"))


WEIGHTS: Final[dict[Callable[[random.Random, int], bytes], int]] = {
    _simd_exceptions: 3,
    _x87_exceptions: 3,
    _extended_state: 3,
    _keys: 2,
    _shadow_stack: 8,
    _event_frame: 4,
    _bounds: 10,
    _wait: 2,
    _stack_end: 3,
    _far_end: 2,
}
