"""Checks and operand access shared by the handlers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtx.x86.decode import Instruction, linear_address, read_register, write_register
from vtx.x86.linear import linear_address_width
from vtx.x86.operations import Operation
from vtx.x86.outcome import gp, ud
from vtx.x86.state import Cr4, Rflags

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

ARITHMETIC: Final = int(Rflags.CF | Rflags.PF | Rflags.AF | Rflags.ZF | Rflags.SF | Rflags.OF)
"""The status flags."""


def intercepts_flow(cpu: LogicalProcessor, operation: Operation, instruction: Instruction) -> bool:
    """As `LogicalProcessor.intercepts`, for what only some extensions can intercept."""
    extension = cpu.virtualization
    return extension is not None and extension.intercepts_flow and cpu.intercepts(operation, instruction)


def require_ring_0(cpu: LogicalProcessor) -> None:
    """#GP(0) unless CPL is 0."""
    if cpu.state.cpl:
        raise gp(0)


def require_feature(cpu: LogicalProcessor, feature: str) -> None:
    """#UD unless the profile has the CPUID feature."""
    if not cpu.profile.has(feature):
        raise ud()


def require_protected_mode(cpu: LogicalProcessor) -> None:
    """#UD in real-address and virtual-8086 mode."""
    if not cpu.state.protected or cpu.state.virtual_8086:
        raise ud()


def require_no_umip(cpu: LogicalProcessor) -> None:
    """#GP(0) for SGDT, SIDT, SLDT, SMSW, STR above CPL 0 with CR4.UMIP set."""
    if cpu.state.cpl and cpu.state.cr4 & Cr4.UMIP:
        raise gp(0)


def operand_address(cpu: LogicalProcessor, instruction: Instruction, size: int, *, write: bool = False) -> int:
    """Linear address of the memory operand, after segment checks."""
    return linear_address(cpu.state, instruction, size, write=write, width=linear_address_width(cpu.state))


def privilege(cpu: LogicalProcessor) -> tuple[bool, bool]:
    """Of an explicit access of the running code: whether it is one of user mode, and RFLAGS.AC."""
    state = cpu.state
    return state.cpl == 3, bool(state.rflags & Rflags.AC)


def read_linear(cpu: LogicalProcessor, linear: int, size: int) -> int:
    """A data read with the privilege of the running code."""
    user, ac = privilege(cpu)
    return cpu.mmu.read(linear, size, user=user, ac=ac)


def write_linear(cpu: LogicalProcessor, linear: int, size: int, value: int) -> None:
    """A data write with the privilege of the running code."""
    user, ac = privilege(cpu)
    cpu.mmu.write(linear, size, value, user=user, ac=ac)


def read_far_pointer(cpu: LogicalProcessor, instruction: Instruction) -> tuple[int, int]:
    """Selector and offset of the far pointer in memory."""
    size = instruction.operand_size
    linear = operand_address(cpu, instruction, size + 2)
    offset = read_linear(cpu, linear, size)
    return read_linear(cpu, linear + size, 2), offset


def read_operand(cpu: LogicalProcessor, instruction: Instruction, operand: int, size: int) -> int:
    """Value of operand number ``operand``: a general register, or else the memory operand."""
    register = instruction.registers[operand]
    if register is not None:
        return read_register(cpu.state, register) & ((1 << 8 * size) - 1)
    return read_linear(cpu, operand_address(cpu, instruction, size), size)


def write_operand(cpu: LogicalProcessor, instruction: Instruction, operand: int, size: int, value: int) -> None:
    """Store to a general register (in its own size) or ``size`` bytes of memory."""
    register = instruction.registers[operand]
    if register is not None:
        write_register(cpu.state, register, value)
    else:
        write_linear(cpu, operand_address(cpu, instruction, size, write=True), size, value)
