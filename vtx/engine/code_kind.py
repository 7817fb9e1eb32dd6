"""What matters about the processor's mode for how a block of code is looked at: its *kind*, one small integer.

The low bits are the width of the code. Whatever changes the kind ends a run of the engine, so a kind is good for a run.
"""

from __future__ import annotations

from typing import Final

from vtx.x86 import bounds
from vtx.x86.alignment import checks_alignment
from vtx.x86.control_flow import watches_branches
from vtx.x86.fred import is_enabled
from vtx.x86.state import MASK32, AccessRights, CpuState, Segment, SegmentRegister

SHORT_CODE: Final = 1 << 0
"""The limit of CS is less than 4 GiB - 1."""

SMALL_STACK: Final = 1 << 1
"""The stack pointer is SP."""

LIKE_8086: Final = 1 << 2
"""Real-address or virtual-8086 mode: segments are loaded without a look at any table, limits stay as they are."""

CHECKS_ALIGNMENT: Final = 1 << 3
"""Misaligned accesses raise #AC."""

SHORT_SEGMENTS: Final = 1 << 7
"""There are segments of less than 64 KiB."""

UNMASKED_SIMD: Final = 1 << 14
"""MXCSR unmasks an exception."""

CONTROL_FLOW: Final = 1 << 15
"""Near branches have a part in control-flow enforcement."""

FRED: Final = 1 << 16
"""SWAPGS is an invalid opcode."""

BOUNDS: Final = 1 << 17
"""The instructions of Intel MPX are none that do nothing."""

INITIALIZES_BOUNDS: Final = 1 << 18
"""Near branches without the prefix BND change bound registers."""

BITS: Final = 19
"""How many bits a kind has."""

_WIDTH: Final = 16 | 32 | 64
_LIMITED_SHIFT: Final = 8
_64_KIB: Final = 1 << 16
_FLAT_RIGHTS: Final = int(
    AccessRights.PRESENT | AccessRights.CODE_OR_DATA | AccessRights.WRITABLE_OR_READABLE,
)
_LOOKED_AT: Final = _FLAT_RIGHTS | AccessRights.CODE | AccessRights.EXPAND_DOWN_OR_CONFORMING | AccessRights.UNUSABLE


def width(kind: int) -> int:
    """Width of the code: 16, 32 or 64."""
    return kind & _WIDTH


def is_limited(kind: int, segment: int) -> bool:
    """Whether there are accesses through segment register number ``segment`` that it forbids."""
    return bool(kind >> _LIMITED_SHIFT >> segment & 1)


def kind_of(state: CpuState) -> int:
    """The kind of the code at CS:RIP, but for `UNMASKED_SIMD`."""
    checks = CHECKS_ALIGNMENT if checks_alignment(state) else 0
    if watches_branches(state):
        checks |= CONTROL_FLOW
    if is_enabled(state):
        checks |= FRED
    if bounds.enabled(state):
        checks |= BOUNDS | INITIALIZES_BOUNDS if bounds.watches_branches(state) else BOUNDS
    if state.in_64_bit_mode:
        return 64 | checks
    kind = (32 if state.cs.big else 16) | checks
    if not state.ss.big:
        kind |= SMALL_STACK
    if not state.protected or state.virtual_8086:
        kind |= LIKE_8086
    if state.cs.limit != MASK32:
        kind |= SHORT_CODE
    for register in SegmentRegister:
        if not _is_flat(state.segments[register]):
            kind |= 1 << _LIMITED_SHIFT + register
        if state.segments[register].limit < _64_KIB - 1:
            kind |= SHORT_SEGMENTS
    return kind


def _is_flat(segment: Segment) -> bool:
    return segment.limit == MASK32 and segment.access_rights & _LOOKED_AT == _FLAT_RIGHTS
