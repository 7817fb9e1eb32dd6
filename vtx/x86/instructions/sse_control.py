"""LDMXCSR, STMXCSR, FXRSTOR and FXSAVE: the engine would take any value for MXCSR, and keeps its exceptions elsewhere.

Spec: SDM Vol. 2, "LDMXCSR—Load MXCSR Register", "FXRSTOR—Restore x87 FPU, MMX, XMM, and MXCSR State"; Vol. 1, "MXCSR
Control and Status Register".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86.decode import Instruction
from vtx.x86.instructions.common import operand_address, read_linear
from vtx.x86.outcome import Fault, InstructionAborted, Vector, gp, ud
from vtx.x86.state import Cr0, Cr4

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

MXCSR_MASK: Final = 0xFFFF
"""The bits of MXCSR that exist."""

MXCSR_OFFSET: Final = 24
_AREA_SIZE: Final = 512
_AREA_ALIGNMENT: Final = 16
_TS, _EM = int(Cr0.TS), int(Cr0.EM)
_OSFXSR: Final = int(Cr4.OSFXSR)


def require_not_task_switched(cpu: LogicalProcessor, mask: int = _TS) -> None:
    """#NM if CR0.TS is set, or another bit of ``mask``."""
    if cpu.state.cr0 & mask:
        raise InstructionAborted(Fault(Vector.NM))


def check_mxcsr(cpu: LogicalProcessor, linear: int) -> None:
    """#GP(0) if the doubleword at ``linear`` has bits that MXCSR has not."""
    if read_linear(cpu, linear, 4) & ~MXCSR_MASK:
        raise gp(0)


def require_sse(cpu: LogicalProcessor) -> None:
    """#UD or #NM unless SSE instructions may be executed."""
    if cpu.state.cr0 & _EM or not cpu.state.cr4 & _OSFXSR:
        raise ud()
    require_not_task_switched(cpu)


def stmxcsr(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """STMXCSR."""
    require_sse(cpu)
    operand_address(cpu, instruction, 4, write=True)
    cpu.native(instruction)


def ldmxcsr(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """LDMXCSR."""
    require_sse(cpu)
    check_mxcsr(cpu, operand_address(cpu, instruction, 4))
    cpu.native(instruction)


def _area(cpu: LogicalProcessor, instruction: Instruction, *, write: bool) -> int:
    require_not_task_switched(cpu, _TS | _EM)
    linear = operand_address(cpu, instruction, _AREA_SIZE, write=write)
    if linear % _AREA_ALIGNMENT:
        raise gp(0)
    return linear


def fxsave(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """FXSAVE."""
    _area(cpu, instruction, write=True)
    cpu.native(instruction)


def fxrstor(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """FXRSTOR, which takes MXCSR only if CR4.OSFXSR is set."""
    linear = _area(cpu, instruction, write=False)
    if cpu.state.cr4 & _OSFXSR:
        check_mxcsr(cpu, linear + MXCSR_OFFSET)
    cpu.native(instruction)


HANDLERS: Final = {
    Mnemonic.LDMXCSR: ldmxcsr,
    Mnemonic.STMXCSR: stmxcsr,
    Mnemonic.FXSAVE: fxsave,
    Mnemonic.FXSAVE64: fxsave,
    Mnemonic.FXRSTOR: fxrstor,
    Mnemonic.FXRSTOR64: fxrstor,
}
