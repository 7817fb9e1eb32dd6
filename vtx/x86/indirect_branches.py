"""What must follow an indirect branch that is tracked: ENDBR32 or ENDBR64, whichever is of the code's width.

Spec: SDM Vol. 1, "Indirect Branch Tracking"; SDM Vol. 2, "ENDBR32—Terminate an Indirect Branch in 32-bit and
Compatibility Mode", "ENDBR64—Terminate an Indirect Branch in 64-bit Mode".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86.control_flow import EB_LEG_BITMAP_BASE, LEG_IW_EN, TRACKER, ControlProtection, settle, tracked
from vtx.x86.decode import Instruction
from vtx.x86.outcome import Fault, Vector
from vtx.x86.state import MASK64, CpuState

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_LINEAR_48: Final = (1 << 48) - 1


def before(processor: LogicalProcessor, instruction: Instruction | None) -> Fault | None:
    """``instruction``, None if its bytes are none, is about to execute at RIP: the fault if the tracker forbids that.

    Raises `InstructionAborted` if the bitmap of legacy code cannot be read.
    """
    state = processor.state
    mnemonic = None if instruction is None else instruction.mnemonic
    if mnemonic == (Mnemonic.ENDBR64 if state.in_64_bit_mode else Mnemonic.ENDBR32):
        settle(state)
    elif tracked(state) & TRACKER and mnemonic != Mnemonic.INT3:  # a debugger puts that where a function begins
        if not _is_legacy_code(processor, state):
            return Fault(Vector.CP, ControlProtection.ENDBRANCH)
        settle(state, suppress=True)
    return None


def _is_legacy_code(processor: LogicalProcessor, state: CpuState) -> bool:
    """Whether the page of code is marked in the bitmap of those that were built without ENDBR32 and ENDBR64."""
    control = tracked(state)
    if not control & LEG_IW_EN:
        return False
    page = (state.linear_rip & _LINEAR_48) >> 12
    address = (control & EB_LEG_BITMAP_BASE) + (page >> 3) & MASK64
    return bool(processor.mmu.read(address, 1) >> (page & 7) & 1)
