"""Which alignment an access needs: always, or where alignment checking is on.

Spec: SDM Vol. 1, "Alignment of Words, Doublewords, Quadwords, and Double Quadwords"; Vol. 3, "Interrupt
17—Alignment Check Exception (#AC)".
"""

from __future__ import annotations

from typing import Final

from iced_x86 import EncodingKind, Instruction, MemorySizeExt, Mnemonic

from vtx.x86.state import CpuState, Cr0, Rflags

_AM: Final = int(Cr0.AM)
_AC: Final = int(Rflags.AC)
_XMM_SIZE: Final = 16
_FXSAVE_AREA: Final = frozenset((Mnemonic.FXSAVE, Mnemonic.FXSAVE64, Mnemonic.FXRSTOR, Mnemonic.FXRSTOR64))
_MAY_BE_UNALIGNED: Final = frozenset(
    (
        *(Mnemonic.MOVUPS, Mnemonic.MOVUPD, Mnemonic.MOVDQU, Mnemonic.LDDQU, Mnemonic.MASKMOVDQU),
        *(Mnemonic.PCMPESTRI, Mnemonic.PCMPESTRI64, Mnemonic.PCMPESTRM, Mnemonic.PCMPESTRM64),
        *(Mnemonic.PCMPISTRI, Mnemonic.PCMPISTRM),
        *(Mnemonic.INVPCID, Mnemonic.INVEPT, Mnemonic.INVVPID, Mnemonic.BNDMOV),
    )
)

# Far pointers and pseudo-descriptors; the areas of FSTENV and FSAVE, whose alignment is that of their fields.
_ALIGNMENTS: Final = {1: 1, 2: 2, 4: 4, 6: 4, 8: 8, 10: 8, 14: 2, 28: 4, 94: 2, 108: 4}
_ALIGNMENT_OF_LARGER: Final = 8


def required_alignment(instruction: Instruction) -> int:
    """Alignment in bytes without which the explicit memory operand raises #GP(0); 1 if there is none."""
    if instruction.mnemonic in _FXSAVE_AREA:
        return _XMM_SIZE
    if MemorySizeExt.size(instruction.memory_size) != _XMM_SIZE or instruction.mnemonic in _MAY_BE_UNALIGNED:
        return 1
    return _XMM_SIZE if instruction.encoding == EncodingKind.LEGACY else 1


def checked_alignment(size: int) -> int:
    """Alignment in bytes without which an operand of ``size`` bytes raises #AC where alignment is checked."""
    return _ALIGNMENTS.get(size, _ALIGNMENT_OF_LARGER)


def checks_alignment(state: CpuState) -> bool:
    """Whether a misaligned data access raises #AC now."""
    return bool(state.cr0 & _AM and state.rflags & _AC) and state.cpl == 3
