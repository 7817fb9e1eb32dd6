"""The x87 and SSE registers inside a saved context, from and to the layout that FXSAVE64 gives them in memory.

Spec: SDM Vol. 1, "Managing State Using the XSAVE Feature Set", "XSAVE Area" (the legacy region).
"""

from __future__ import annotations

import struct
from typing import Final

from vtx.engine import layout

LEGACY_AREA: Final = 416
"""Bytes of the area with a meaning: up to XMM15."""

_TOP: Final = layout.FPU + 4  # 32 bits; then the status word without TOP, and the control word
_STATUS: Final = layout.FPU + 8
_CONTROL: Final = layout.FPU + 10
_TAGS: Final = layout.FPU + 12  # a byte for each physical register, 1 for an empty one
_REGISTERS: Final = layout.FPU + 24  # 16 bytes for each physical register, of which 10 are used
_OPCODE: Final = layout.FPU + 152
_POINTERS: Final = layout.FPU + 160  # of the last instruction, and of its operand
_X87_STATUS: Final = layout.FPU + 176  # of the library's arithmetic: exceptions, rounding, and so on
_SSE_STATUS: Final = layout.FPU + 208
_FLAGS, _FLUSH_TO_ZERO = 2, 4  # bytes of either
_COMMON_FLAGS: Final = 0b111101  # which are where MXCSR has them
_FLUSHED: Final = 1 << 7
_UNDERFLOW_AND_PRECISION: Final = 1 << 4 | 1 << 5
_ALL_MASKED: Final = 0x1F80
_FLUSH_WITH_UNDERFLOW_MASKED: Final = 1 << 15 | 1 << 11
_MXCSR: Final = layout.FPU + 216
_X87_REGISTERS: Final = struct.Struct("10s6x" * 8)
_XMM_REGISTERS: Final = struct.Struct("16s48x" * 16)  # the high parts have no instruction that would change them
_XMM_IN_AREA: Final = struct.Struct("16s" * 16)
_EMPTY: Final = [bytes(not tags >> number & 1 for number in range(8)) for tags in range(256)]
_TAGS_OF: Final = {empty: tags for tags, empty in enumerate(_EMPTY)}

_HEAD: Final = struct.Struct("<HHBxHQQII")  # FCW FSW FTW FOP FIP FDP MXCSR MXCSR_MASK
_TOP_SHIFT: Final = 11
_TOP_MASK: Final = 7 << _TOP_SHIFT
_MXCSR_MASK: Final = 0xFFFF

# What a processor holds when it is switched on: masked exceptions, all x87 registers +0.
POWER_UP: Final = _HEAD.pack(0x0040, 0, 0xFF, 0, 0, 0, 0x1F80, _MXCSR_MASK).ljust(LEGACY_AREA, b"\0")


def _unpack(image: memoryview, form: str, offset: int) -> int:
    (value,) = struct.unpack_from(form, image, offset)
    return int(value)


def simd_exceptions(image: memoryview) -> int:
    """The SIMD floating-point exceptions met since the last `settle`; the library has no flag for denormal operands."""
    flags = image[_SSE_STATUS + _FLAGS]
    return flags & _COMMON_FLAGS | (_UNDERFLOW_AND_PRECISION if flags & _FLUSHED else 0)


def settle(image: memoryview) -> None:
    """Put the exceptions met into MXCSR, where the library never does."""
    met = simd_exceptions(image)
    image[_SSE_STATUS + _FLAGS] = 0
    if met:
        struct.pack_into("<I", image, _MXCSR, _unpack(image, "<I", _MXCSR) | met)


def follow_mxcsr(image: memoryview) -> bool:
    """MXCSR may have changed: whether it unmasks an exception.

    Of flush-to-zero, the library takes the x87 arithmetic for what it is about.
    """
    mxcsr = _unpack(image, "<I", _MXCSR)
    image[_X87_STATUS + _FLUSH_TO_ZERO] = 0
    image[_SSE_STATUS + _FLUSH_TO_ZERO] = mxcsr & _FLUSH_WITH_UNDERFLOW_MASKED == _FLUSH_WITH_UNDERFLOW_MASKED
    return mxcsr & _ALL_MASKED != _ALL_MASKED


def controls(image: memoryview) -> tuple[int, int]:
    """Control word and MXCSR, without the exceptions met since the last `settle`."""
    return _unpack(image, "<H", _CONTROL), _unpack(image, "<I", _MXCSR)


def legacy_area(image: memoryview) -> bytes:
    """The registers in a context's ``image`` as FXSAVE64 stores them, `LEGACY_AREA` bytes."""
    settle(image)
    top = _unpack(image, "<I", _TOP) & 7
    status = _unpack(image, "<H", _STATUS) & ~_TOP_MASK | top << _TOP_SHIFT
    tags = _TAGS_OF[bytes(image[_TAGS : _TAGS + 8])]
    area = bytearray(LEGACY_AREA)
    _HEAD.pack_into(
        area,
        0,
        _unpack(image, "<H", _CONTROL),
        status,
        tags,
        _unpack(image, "<H", _OPCODE),
        _unpack(image, "<Q", _POINTERS),
        _unpack(image, "<Q", _POINTERS + 8),
        _unpack(image, "<I", _MXCSR),
        _MXCSR_MASK,
    )
    x87 = _X87_REGISTERS.unpack_from(image, _REGISTERS)
    _X87_REGISTERS.pack_into(area, 32, *x87[top:], *x87[:top])
    area[160:] = b"".join(_XMM_REGISTERS.unpack_from(image, layout.XMM0))
    return bytes(area)


def set_legacy_area(image: memoryview, area: bytes) -> tuple[int, int]:
    """Put the registers of ``area`` into ``image``; control word and MXCSR, which are for the library to set.

    The image has their former values (`controls`).
    """
    control, status, tags, opcode, instruction, operand, mxcsr, _ = _HEAD.unpack_from(area)
    top = status >> _TOP_SHIFT & 7
    image[_SSE_STATUS + _FLAGS] = 0
    struct.pack_into("<IH", image, _TOP, top, status & ~_TOP_MASK)
    image[_TAGS : _TAGS + 8] = _EMPTY[tags]
    struct.pack_into("<H", image, _OPCODE, opcode)
    struct.pack_into("<QQ", image, _POINTERS, instruction, operand)
    x87 = _X87_REGISTERS.unpack_from(area, 32)
    _X87_REGISTERS.pack_into(image, _REGISTERS, *x87[8 - top :], *x87[: 8 - top])
    _XMM_REGISTERS.pack_into(image, layout.XMM0, *_XMM_IN_AREA.unpack_from(area, 160))
    return control, mxcsr
