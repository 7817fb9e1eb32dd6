"""Near branches to where no code can be: the branch itself faults, and has no effect.

An engine goes on behind a branch before it finds that out, so the branch is taken back. What stays is the return
address that a CALL has stored below the stack pointer.

Spec: SDM Vol. 2, "JMP—Jump", "CALL—Call Procedure", "RET—Return From Procedure", "Jcc—Jump if Condition Is Met",
"LOOP/LOOPcc—Loop According to ECX Counter".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import iced_x86
from iced_x86 import Code, Decoder, FlowControl, Mnemonic

from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import MASK32, MASK64, CpuState, Gpr

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

FAR_TRANSFERS: Final = frozenset(
    (
        *(Code.CALL_PTR1616, Code.CALL_PTR1632, Code.JMP_PTR1616, Code.JMP_PTR1632),
        *(Code.CALL_M1616, Code.CALL_M1632, Code.CALL_M1664, Code.JMP_M1616, Code.JMP_M1632, Code.JMP_M1664),
        *(Code.RETFW, Code.RETFD, Code.RETFQ, Code.RETFW_IMM16, Code.RETFD_IMM16, Code.RETFQ_IMM16),
    )
)
"""Far CALL, JMP and RET, as iced-x86 codes."""

_SHORT_JUMPS: Final = frozenset((Code.JMP_REL8_16, Code.JMP_REL8_32, Code.JMP_REL8_64))
_LOOPS: Final = frozenset((Mnemonic.LOOP, Mnemonic.LOOPE, Mnemonic.LOOPNE))
_PUSHING_OR_POPPING: Final = frozenset((Mnemonic.CALL, Mnemonic.RET))


def fetch_fault(state: CpuState, offset: int) -> Fault | None:
    """The fault of fetching the byte of code at ``offset`` in the code segment, paging and privileges apart.

    Spec: SDM Vol. 3, "Limit Checking".
    """
    if state.in_64_bit_mode or offset <= state.cs.limit:
        return None
    return Fault(Vector.GP, 0)


def is_near_branch(instruction: iced_x86.Instruction) -> bool:
    """Whether ``instruction`` loads RIP alone."""
    if instruction.mnemonic in (Mnemonic.JMP, Mnemonic.CALL):
        return instruction.code not in FAR_TRANSFERS
    return instruction.mnemonic == Mnemonic.RET or instruction.flow_control == FlowControl.CONDITIONAL_BRANCH


def is_watched_branch(instruction: iced_x86.Instruction) -> bool:
    """Whether control-flow enforcement can have a part in it: near CALL and RET, and indirect near JMP."""
    mnemonic = instruction.mnemonic
    if mnemonic == Mnemonic.JMP:
        return bool(instruction.is_jmp_near_indirect)
    return mnemonic == Mnemonic.RET or (mnemonic == Mnemonic.CALL and instruction.code not in FAR_TRANSFERS)


def initializes_bounds(instruction: iced_x86.Instruction) -> bool:
    """Whether it is one of the branches that initialize the bound registers of Intel MPX where they are to.

    Short JMP, JrCXZ and LOOP are none, nor is any branch with the prefix BND, which is F2H.

    Spec: SDM Vol. 1, "CALL, RET, JMP and All Jcc".
    """
    if instruction.has_repne_prefix or not is_near_branch(instruction) or instruction.code in _SHORT_JUMPS:
        return False
    return bool(instruction.flow_control != FlowControl.CONDITIONAL_BRANCH or instruction.is_jcc_short_or_near)


def take_back(processor: LogicalProcessor, origin: int) -> None:
    """The instruction at linear ``origin`` led to RIP: if it is a near branch, undo what it did."""
    state = processor.state
    target = state.rip
    state.rip = origin if state.in_64_bit_mode else origin - state.cs.base & MASK32
    try:
        decoded = processor.fetch()
    except InstructionAborted:
        decoded = None
    instruction = None if decoded is None else Decoder(decoded.bits, decoded.encoding).decode()
    if decoded is None or instruction is None or not is_near_branch(instruction):
        state.rip = target
        return
    if instruction.mnemonic in _PUSHING_OR_POPPING:
        mask = MASK64 if state.in_64_bit_mode else MASK32 if state.ss.big else 0xFFFF
        _add(state, Gpr.RSP, -instruction.stack_pointer_increment, mask)
    elif instruction.mnemonic in _LOOPS:
        _add(state, Gpr.RCX, 1, (1 << 8 * decoded.address_size) - 1)


def _add(state: CpuState, register: Gpr, distance: int, mask: int) -> None:
    value = state.gpr[register]
    state.gpr[register] = value & ~mask | value + distance & mask
