"""Whether the condition of a conditional branch holds.

A conditional branch changes neither its flags nor what LOOP leaves in its counter, so the answer is the same before a
Jcc or JrCXZ and after it; LOOP is asked about once it has counted.

Spec: SDM Vol. 2, "Jcc—Jump if Condition Is Met", "LOOP/LOOPcc—Loop According to ECX Counter".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from iced_x86 import ConditionCode, Decoder, Mnemonic

from vtx.x86.decode import Instruction
from vtx.x86.state import MASK32, MASK64, CpuState, Gpr, Rflags

_CF, _PF, _ZF, _SF, _OF = (int(flag) for flag in (Rflags.CF, Rflags.PF, Rflags.ZF, Rflags.SF, Rflags.OF))


def _less(flags: int) -> bool:
    return bool(flags & _SF) != bool(flags & _OF)


_CONDITIONS: Final[Mapping[int, Callable[[int], bool]]] = {
    ConditionCode.O: lambda flags: bool(flags & _OF),
    ConditionCode.NO: lambda flags: not flags & _OF,
    ConditionCode.B: lambda flags: bool(flags & _CF),
    ConditionCode.AE: lambda flags: not flags & _CF,
    ConditionCode.E: lambda flags: bool(flags & _ZF),
    ConditionCode.NE: lambda flags: not flags & _ZF,
    ConditionCode.BE: lambda flags: bool(flags & (_CF | _ZF)),
    ConditionCode.A: lambda flags: not flags & (_CF | _ZF),
    ConditionCode.S: lambda flags: bool(flags & _SF),
    ConditionCode.NS: lambda flags: not flags & _SF,
    ConditionCode.P: lambda flags: bool(flags & _PF),
    ConditionCode.NP: lambda flags: not flags & _PF,
    ConditionCode.L: _less,
    ConditionCode.GE: lambda flags: not _less(flags),
    ConditionCode.LE: lambda flags: bool(flags & _ZF) or _less(flags),
    ConditionCode.G: lambda flags: not flags & _ZF and not _less(flags),
}
_COUNTER_IS_ZERO: Final[Mapping[int, int]] = {Mnemonic.JCXZ: 0xFFFF, Mnemonic.JECXZ: MASK32, Mnemonic.JRCXZ: MASK64}
_LOOPS: Final = (Mnemonic.LOOP, Mnemonic.LOOPE, Mnemonic.LOOPNE)
_WIDTHS: Final = {16: 0xFFFF, 32: MASK32, 64: MASK64}


def holds(instruction: Instruction, state: CpuState) -> bool:
    """Whether the conditional branch ``instruction``, which has been executed, was taken."""
    counter = state.gpr[Gpr.RCX]
    width = _COUNTER_IS_ZERO.get(instruction.mnemonic)
    if width is not None:
        return not counter & width
    raw = Decoder(instruction.bits, instruction.encoding).decode()
    condition = _CONDITIONS.get(raw.condition_code)
    met = condition is None or condition(state.rflags)
    if instruction.mnemonic in _LOOPS:
        return met and bool(counter & _loop_width(instruction))
    return met


def _loop_width(instruction: Instruction) -> int:
    """The counter of LOOP is as wide as the address size."""
    bits = instruction.bits
    if 0x67 in instruction.encoding[:-2]:
        bits = {16: 32, 32: 16, 64: 32}[bits]
    return _WIDTHS[bits]
