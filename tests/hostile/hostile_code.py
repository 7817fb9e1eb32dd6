"""Hostile code: ordinary instructions, system instructions, real code and noise, mixed at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files

import hostile_places as at
import hostile_state
from hostile_operands import address, immediate, load, operand
from hostile_user_interrupts import user_interrupts

Generator = Callable[[random.Random, int], bytes]


def _ordinary(source: random.Random, bits: int) -> bytes:
    opcode = source.choice(
        (
            *range(0x00, 0x40, 0x08),
            *(0x01, 0x03, 0x13, 0x1B, 0x29, 0x2B, 0x31, 0x33, 0x39, 0x3B),
            *(0x63, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x8B, 0x8D, 0xC4, 0xC5, 0xD0, 0xD1, 0xD3, 0xF6, 0xF7),
            *(0xFE, 0xFF, 0x8F, 0x8C),
        )
    )
    # F6 and F7 want an immediate for TEST: only the other members of the group.
    register = source.randrange(2, 8) if opcode in (0xF6, 0xF7) else None
    return bytes((opcode,)) + operand(source, bits, register)


def _with_immediate(source: random.Random, bits: int) -> bytes:
    kind = source.randrange(4)
    if kind == 0:
        return b"\x83" + operand(source, bits) + source.randbytes(1)
    if kind == 1:
        return bytes((source.choice((0x81, 0xC7, 0x69)),)) + operand(source, bits) + immediate(source, bits)
    if kind == 2:
        return bytes((source.choice((0xC0, 0xC1, 0xC6, 0x80, 0x6B)),)) + operand(source, bits) + source.randbytes(1)
    return bytes((source.choice((0x05, 0x0D, 0x25, 0x3D, 0xA9, 0x68)),)) + immediate(source, bits)


def _one_byte(source: random.Random, bits: int) -> bytes:
    return bytes((source.choice((*range(0x40, 0x62), *range(0x90, 0xA0), 0xC3, 0xC9, 0xF5, 0xF8, 0xF9, 0xFC, 0xFD)),))


def _two_byte(source: random.Random, bits: int) -> bytes:
    prefix = source.choice((b"", b"", b"\x66", b"\xf2", b"\xf3", b"\xf0"))
    opcode = source.choice((*range(0x40, 0x50), *range(0x90, 0xA0), 0xA3, 0xAB, 0xAF, *range(0xB0, 0xC2), 0xC7, 0xA5))
    return prefix + bytes((0x0F, opcode)) + operand(source, bits)


def _vector(source: random.Random, bits: int) -> bytes:
    prefix = source.choice((b"", b"\x66", b"\xf2", b"\xf3"))
    choice = source.random()
    if choice < 0.3:
        return bytes((source.randrange(0xD8, 0xE0),)) + operand(source, bits)
    if choice < 0.45:
        return prefix + b"\x0f\xae" + operand(source, bits)
    if choice < 0.55:
        return prefix + bytes((0x0F, 0x38, source.randrange(256))) + operand(source, bits)
    if choice < 0.6:
        return prefix + bytes((0x0F, 0x3A, source.randrange(256))) + operand(source, bits) + source.randbytes(1)
    opcode = source.choice((*range(0x10, 0x18), *range(0x28, 0x30), *range(0x50, 0x80), 0xC2, *range(0xC4, 0x100)))
    return prefix + bytes((0x0F, opcode)) + operand(source, bits)


def _string(source: random.Random, bits: int) -> bytes:
    opcode = source.choice((*range(0xA4, 0xA8), *range(0xAA, 0xB0), 0x6C, 0x6D, 0x6E, 0x6F))
    prefix = source.choice((b"", b"\xf3", b"\xf3", b"\xf2", b"\x67\xf3", b"\x66\xf3", b"\x64\xf3"))
    count = source.choice((0, 1, 2, 3, 17, 300, 0xFFFF_FFFF))
    setup = b""
    if source.random() < 0.5:
        setup = address(source, 6, bits) + address(source, 7, bits)
    port = load(2, source.choice(at.PORTS), bits) if opcode < 0x70 else b""
    return setup + port + load(1, count, bits) + prefix + bytes((opcode,))


def _port(source: random.Random, bits: int) -> bytes:
    value = source.choice((source.getrandbits(32), source.getrandbits(8), 0, 0xFFFF_FFFF))
    setup = load(0, value, bits) + load(2, source.choice(at.PORTS), bits)
    prefix = source.choice((b"", b"\x66"))
    return setup + prefix + source.choice((b"\xec", b"\xed", b"\xee", b"\xef", b"\xe4\x60", b"\xe6\x43", b"\xe7\x70"))


def _mmio(source: random.Random, bits: int) -> bytes:
    base = source.choice((at.LOCAL_APIC, at.LOCAL_APIC, at.IO_APIC, at.HPET, at.ROM, at.NOWHERE))
    offset = source.choice((source.randrange(0, 0x400, 16), source.randrange(0x400), 0x300, 0x310, 0x380, 0x320, 0))
    register = source.choice((3, 6, 7))
    opcode = source.choice((b"\x89", b"\x8b", b"\x88", b"\x01", b"\x87", b"\x0f\xc1", b"\xf0\x0f\xb1", b"\x0f\xc7"))
    value = source.choice((source.getrandbits(32), source.getrandbits(20), 0x000C_0600 | source.getrandbits(8), 0))
    code = load(register, base + offset, bits) + load(0, value, bits)
    prefix = b"\x67" if bits == 16 else b""
    # In 16-bit code the operand stays one of 16 bits half the time.
    prefix += source.choice((b"", b"\x66"))
    return code + prefix + opcode + bytes((register,))


def _control(source: random.Random, bits: int) -> bytes:
    """MOV to and from control and debug registers, mostly with a few bits changed."""
    register = source.choice((0, 0, 2, 3, 3, 4, 4, 8))
    rex = b"\x44" if register == 8 else b""
    read = rex + bytes((0x0F, 0x20, 0xC0 | (register & 7) << 3))
    write = rex + bytes((0x0F, 0x22, 0xC0 | (register & 7) << 3))
    if rex and bits != 64:
        read = write = b""
    choice = source.random()
    if choice < 0.2:
        return read
    if choice < 0.75:
        bit = source.randrange(32)
        prefix = b"\x66" if bits == 16 else b"\x48" if bits == 64 and source.random() < 0.2 else b""
        return read + prefix + b"\x0f\xba" + bytes((source.choice((0xF8, 0xE8, 0xF0)), bit)) + write
    if choice < 0.85:
        return address(source, 0, bits) + write
    debug = source.randrange(8) << 3
    if source.random() < 0.3:
        return bytes((0x0F, 0x21, 0xC0 | debug))
    value = source.choice((at.CODE + source.randrange(at.CODE_SIZE), source.getrandbits(32), 0x400 | 0xFFFF_0000, 0))
    return load(0, value, bits) + bytes((0x0F, 0x23, 0xC0 | debug))


def _msr(source: random.Random, bits: int) -> bytes:
    code = load(1, source.choice(at.MSRS) + (source.randrange(4) if source.random() < 0.1 else 0), bits)
    if source.random() < 0.3:
        return code + b"\x0f\x32"
    if source.random() < 0.5:  # a few bits changed
        change = (b"\x66" if bits == 16 else b"") + b"\x0f\xba" + bytes((0xF8, source.randrange(32)))
        return code + b"\x0f\x32" + change + b"\x0f\x30"
    low = source.choice((source.getrandbits(32), 0, 1, source.choice(at.ADDRESSES), 0xFEE0_0800, 0x0006_0606))
    return code + load(0, low, bits) + load(2, source.choice((0, 0, 0xFFFF, 0x8000_0000, 1)), bits) + b"\x0f\x30"


def _tables(source: random.Random, bits: int) -> bytes:
    """Descriptor-table instructions with any operand, or with a pseudo-descriptor written before."""
    kind = source.randrange(6)
    if kind == 0:
        return b"\x0f\x01" + operand(source, bits, source.randrange(4), memory=True)
    if kind == 1:
        return b"\x0f\x00" + operand(source, bits, source.randrange(6))
    if kind == 2:
        selector = source.choice((*range(0, 0x80, 8), *range(3, 0x83, 8), 4, 0xFFFF))
        move = source.choice((b"\x8e\xd8", b"\x8e\xc0", b"\x8e\xe0", b"\x8e\xe8", b"\x8e\xd0", b"\x0f\x00\xd8"))
        return load(0, selector, bits) + source.choice((move, move, b"\x0f\x00\xd0", b"\x0f\x02\xd8", b"\x0f\x03\xd8"))
    if kind == 3:
        return source.choice(
            (b"\x06", b"\x07", b"\x16", b"\x17", b"\x1e", b"\x1f", b"\x0f\xa0", b"\x0f\xa1", b"\x0f\xa9")
        )
    if kind == 4:
        return b"\x0f" + bytes((source.choice((0xB2, 0xB4, 0xB5)),)) + operand(source, bits, memory=True)
    return b"\x0f\x01" + operand(source, bits, source.choice((4, 6, 7)))


def _far(source: random.Random, bits: int) -> bytes:
    selector = source.choice((*range(0, 0x88, 8), *range(3, 0x8B, 8), 0x1000))
    target = source.randrange(at.CODE_SIZE) + (0 if selector == 0x1000 else at.CODE)
    size = 2 if bits == 16 else 4
    offset = (target & (1 << 8 * size) - 1).to_bytes(size, "little")
    kind = source.randrange(4)
    if kind == 0 and bits != 64:
        return bytes((source.choice((0x9A, 0xEA)),)) + offset + selector.to_bytes(2, "little")
    if kind == 1:
        push = b"\x68" + (selector.to_bytes(size, "little"))
        flags = b"\x9c" if source.random() < 0.5 else b""
        frame = flags + push + b"\x68" + offset
        prefix = b"\x48" if bits == 64 else b""
        return frame + prefix + (b"\xcf" if flags else source.choice((b"\xcb", b"\xca\x08\x00")))
    return b"\xff" + operand(source, bits, source.choice((2, 3, 4, 5)))


def _system(source: random.Random, bits: int) -> bytes:
    return source.choice(
        (
            *(b"\xf4", b"\xfa", b"\xfb", b"\x9c", b"\x9d", b"\xcf", b"\x0f\xa2", b"\x0f\x31", b"\x0f\x33", b"\xf3\x90"),
            *(b"\x0f\x01\xf9", b"\x0f\x01\xc8", b"\x0f\x01\xc9", b"\x0f\x01\xd0", b"\x0f\x01\xd1", b"\x0f\x01\xf8"),
            *(b"\x0f\x01\xfa", b"\x0f\x01\xfb", b"\xf3\x0f\x01\xfa", b"\x0f\x01\xfd", b"\x0f\x01\xfe", b"\x0f\x01\xff"),
            *(b"\x0f\x05", b"\x0f\x07", b"\x0f\x34", b"\x0f\x35", b"\x0f\x06", b"\x0f\x08", b"\x0f\x09", b"\x0f\x0b"),
            *(b"\xcc", b"\xf1", b"\xce", b"\xfb\xf4", b"\x0f\xaa", b"\x0f\x37", b"\x0f\x01\xca", b"\x0f\x01\xcb"),
            *(b"\xf3\x0f\xc7\xf8", b"\x0f\xc7\xf0", b"\x0f\xc7\xf8", b"\xf3\x0f\xae\xf0", b"\x66\x0f\xae\xf0"),
            *(b"\x0f\x01\xee", b"\x0f\x01\xef", b"\x0f\x77", b"\xdb\xe3", b"\x0f\x0d\x00", b"\x9b", b"\xd7", b"\x62"),
            *(b"\xcd" + source.randbytes(1), b"\xe8" + immediate(source, bits), b"\xc8" + source.randbytes(3)),
            *(
                b"\x66\x0f\x38\x82" + operand(source, bits, memory=True),
                b"\x0f\xc7" + operand(source, bits, memory=True),
            ),
            *(b"\x0f\xa2", b"\x0f\x31", b"\xf3\x90", b"\xfb", b"\xfa", b"\x9d", b"\xf4"),
        )
    )


def _vmx(source: random.Random, bits: int) -> bytes:
    kind = source.randrange(8)
    if kind == 0:
        return source.choice((b"\x0f\x01\xc1", b"\x0f\x01\xc2", b"\x0f\x01\xc3", b"\x0f\x01\xc4", b"\x0f\x01\xd4"))
    if kind == 1:
        prefix = source.choice((b"", b"\x66", b"\xf3"))
        pointer = source.choice((at.VMXON_REGION, at.VMCS_REGION, at.OTHER_VMCS, at.OTHER_VMCS, at.NOWHERE, 1))
        if bits == 64 and source.random() < 0.7:  # through the stack
            return load(0, pointer, bits) + b"\x50" + prefix + b"\x0f\xc7\x34\x24\x58"
        return prefix + b"\x0f\xc7" + operand(source, bits, source.choice((6, 7)), memory=True)
    if kind == 2:
        return b"\x66\x0f\x38" + bytes((source.choice((0x80, 0x81)),)) + operand(source, bits, memory=True)
    if kind == 3:
        return b"\x0f" + bytes((source.choice((0x78, 0x79)),)) + operand(source, bits)
    field = source.choice(
        (0, 0x400, 0x800, 0xC00, 0x2000, 0x2800, 0x4000, 0x4400, 0x4800, 0x4C00, 0x6000, 0x6800, 0x6C00)
    )
    field += 2 * source.randrange(0x18) + (source.random() < 0.1)
    value = source.choice((source.getrandbits(32), 0, 1 << source.randrange(32), source.choice(at.ADDRESSES)))
    if kind < 6:
        return load(2, field, bits) + load(0, value, bits) + b"\x0f\x79\xd0"
    return load(2, field, bits) + b"\x0f\x78\xd0"


def _svm(source: random.Random, bits: int) -> bytes:
    pointer = source.choice((at.VMCS_REGION, at.VMCS_REGION, at.OTHER_VMCS, at.NOWHERE, 0x123))
    if source.random() < 0.4:  # some field of the control block
        offset = source.choice((source.randrange(0, 0x100, 4), source.randrange(0x400, 0x698, 4)))
        value = source.choice((source.getrandbits(32), 0, 1 << source.randrange(32), source.choice(at.ADDRESSES)))
        store = (b"\x67\x66" if bits == 16 else b"") + b"\xc7\x83" + offset.to_bytes(4, "little")
        return load(3, at.VMCS_REGION, bits) + store + value.to_bytes(4, "little")
    return load(0, pointer, bits) + b"\x0f\x01" + bytes((source.choice((0xD8, 0xD8, *range(0xD9, 0xE0))),))


def _short_branch(source: random.Random, bits: int) -> bytes:
    opcode = source.choice((*range(0x70, 0x80), 0xE0, 0xE1, 0xE2, 0xE3, 0xEB))
    return bytes((opcode, source.choice((source.randrange(0, 40), source.randrange(200, 256)))))


def _rewrite(source: random.Random, bits: int) -> bytes:
    """A store into the program, often close to itself."""
    target = at.CODE + source.randrange(at.CODE_SIZE)
    if bits == 64 and source.random() < 0.6:  # mov [rip + little], al
        return b"\x88\x05" + source.randrange(-64, 64).to_bytes(4, "little", signed=True)
    return load(7, target, bits) + source.choice((b"\xaa", b"\xab", b"\x88\x07", b"\x89\x07", b"\xff\x07"))


def _address_into_register(source: random.Random, bits: int) -> bytes:
    return address(source, source.choice((0, 1, 2, 3, 5, 6, 7)), bits)


def _stack_back(source: random.Random, bits: int) -> bytes:
    return load(4, source.choice((at.STACK, at.STACK, at.STACK, at.STACK - 2, at.LOCAL_APIC + 0x88, 2)), bits)


def _noise(source: random.Random, bits: int) -> bytes:
    return source.randbytes(source.randrange(1, 9))


@cache
def _images() -> tuple[bytes, ...]:
    folder = files("vtx") / "images"
    return tuple(each.read_bytes()[0x1000:0x8000] for each in sorted(folder.iterdir(), key=lambda each: each.name))


def _real(source: random.Random, bits: int) -> bytes:
    """Some of a bundled guest, perhaps with bits turned over."""
    images = _images()
    if not images:
        return _noise(source, bits)
    image = source.choice(images)
    start = source.randrange(max(len(image) - 64, 1))
    code = bytearray(image[start : start + source.randrange(8, 64)])
    for _ in range(source.choice((0, 1, 3))):
        code[source.randrange(len(code))] ^= 1 << source.randrange(8)
    return bytes(code)


_WEIGHTS: dict[Generator, int] = {
    _ordinary: 10,
    _with_immediate: 5,
    _one_byte: 4,
    _two_byte: 4,
    _vector: 6,
    _string: 4,
    _port: 4,
    _mmio: 4,
    _control: 5,
    _msr: 5,
    _tables: 5,
    _far: 3,
    _system: 8,
    _short_branch: 4,
    _rewrite: 2,
    _address_into_register: 8,
    _stack_back: 4,
    _noise: 2,
    _real: 2,
    **hostile_state.WEIGHTS,
    user_interrupts: 4,
}
_PREFIXES = (b"\x66", b"\x67", b"\xf0", b"\xf2", b"\xf3", b"\x2e", b"\x36", b"\x64", b"\x65", b"\x48", b"\x4d", b"\x41")


def generators(source: random.Random, extension: str) -> Sequence[Generator]:
    """Which kinds of instructions a program has, each as often as it is likely: not always the same mixture."""
    weights = dict(_WEIGHTS)
    weights[_vmx] = 12 if extension == "vmx" else 1
    weights[_svm] = 12 if extension == "svm" else 1
    if source.random() < 0.25:  # hardly anything else
        weights |= {generator: 10 * weight for generator, weight in hostile_state.WEIGHTS.items()}
    if source.random() < 0.15:  # most modes have no user interrupts: often enough where there are some
        weights[user_interrupts] = 150
    for generator in weights:
        if source.random() < 0.2:
            weights[generator] *= source.choice((0, 4))
    return [generator for generator, weight in weights.items() for _ in range(weight)] or [_noise]


def instruction(source: random.Random, bits: int, mixture: Sequence[Generator]) -> bytes:
    """An instruction, or a few that belong together."""
    code = source.choice(mixture)(source, bits)
    if source.random() < 0.08:
        code = source.choice(_PREFIXES) + code
    if source.random() < 0.04:  # where an indirect branch may lead to
        code = (b"\xf3\x0f\x1e\xfa" if bits == 64 else b"\xf3\x0f\x1e\xfb") + code
    return code


def page(source: random.Random, bits: int, extension: str, size: int) -> tuple[bytes, list[int]]:
    """``size`` bytes of code that ends with a jump back to its begin, and the offsets where something begins."""
    if source.random() < 0.05:
        return source.randbytes(size), [source.randrange(size) for _ in range(64)]
    mixture = generators(source, extension)
    code, starts = bytearray(), []
    while len(code) < size - 80:
        starts.append(len(code))
        code += instruction(source, bits, mixture)
    code = code[: size - 5]
    distance = -(len(code) + (3 if bits == 16 else 5))
    code += b"\xe9" + distance.to_bytes(2 if bits == 16 else 4, "little", signed=True)
    return bytes(code.ljust(size, b"\x90")), starts
