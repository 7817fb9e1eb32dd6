"""Code and stack segments of 4 GiB with fixed rights, for transfers that look into no descriptor table.

Software keeps descriptors that say the same where the selectors point.

Spec: SDM Vol. 2, "SYSCALL—Fast System Call", "ERETU—Event Return to User".
"""

from __future__ import annotations

from typing import Final

from vtx.x86.state import MASK32, CpuState, Segment, SegmentRegister

_CODE_32: Final = 0xC09B  # G, D, present, code, readable, accessed
_CODE_64: Final = 0xA09B  # G, L
_STACK: Final = 0xC093  # G, B, present, writable, accessed


def flat_code(selector: int, dpl: int, *, long: bool) -> Segment:
    """A code segment, of 64-bit code if ``long``."""
    return Segment(selector & 0xFFFF, 0, MASK32, (_CODE_64 if long else _CODE_32) | dpl << 5)


def load_flat(state: CpuState, cs: int, ss: int, dpl: int, *, long: bool) -> None:
    """Load CS and SS."""
    state.segments[SegmentRegister.CS] = flat_code(cs, dpl, long=long)
    state.segments[SegmentRegister.SS] = Segment(ss & 0xFFFF, 0, MASK32, _STACK | dpl << 5)
