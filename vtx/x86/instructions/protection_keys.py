"""RDPKRU and WRPKRU: the rights that protection keys leave to accesses of user pages, at any privilege level.

Spec: SDM Vol. 2, "RDPKRU—Read Protection Key Rights for User Pages", "WRPKRU—Write Data to User Page Key Register";
SDM Vol. 3, "Protection Keys".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86.decode import Instruction
from vtx.x86.outcome import gp, ud
from vtx.x86.state import MASK32, Cr4, Gpr

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_PKE: Final = int(Cr4.PKE)


def _admit(cpu: LogicalProcessor, instruction: Instruction, *zeros: Gpr) -> None:
    """#UD unless protection keys of user pages are enabled, #GP(0) unless the low halves of these registers are 0."""
    state = cpu.state
    if instruction.lock or not state.cr4 & _PKE:
        raise ud()
    if any(state.gpr[register] & MASK32 for register in zeros):
        raise gp(0)


def rdpkru(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """RDPKRU."""
    _admit(cpu, instruction, Gpr.RCX)
    cpu.state.gpr[Gpr.RAX], cpu.state.gpr[Gpr.RDX] = cpu.state.pkru, 0
    cpu.retire(instruction)


def wrpkru(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """WRPKRU."""
    _admit(cpu, instruction, Gpr.RCX, Gpr.RDX)
    cpu.state.pkru = cpu.state.gpr[Gpr.RAX] & MASK32
    cpu.mmu.update(cpu.state)
    cpu.retire(instruction)


HANDLERS: Final = {Mnemonic.RDPKRU: rdpkru, Mnemonic.WRPKRU: wrpkru}
