"""Unprivileged instructions that profiles may have and the engine's processor has not.

Spec: SDM Vol. 2, the instructions' pages; APM Vol. 3, "General-Purpose Instruction Reference" (MCOMMIT).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86.decode import Instruction, read_register, write_register
from vtx.x86.instructions.common import ARITHMETIC, operand_address, read_linear, require_feature, write_linear
from vtx.x86.operations import SIMPLE, Plain
from vtx.x86.outcome import ud
from vtx.x86.state import Efer, Rflags

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor


def clean_line(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """CLFLUSHOPT and CLWB: there are no caches, so only the faults of a one-byte read remain."""
    require_feature(cpu, instruction.name)
    read_linear(cpu, operand_address(cpu, instruction, 1), 1)
    cpu.retire(instruction)


def _swapped(value: int, size: int) -> int:
    return int.from_bytes(value.to_bytes(size, "little"), "big")


def movbe(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """MOVBE."""
    require_feature(cpu, "MOVBE")
    size = instruction.operand_size
    destination, source = instruction.registers[0], instruction.registers[1]
    if destination is not None:
        value = read_linear(cpu, operand_address(cpu, instruction, size), size)
        write_register(cpu.state, destination, _swapped(value, size))
    else:
        assert source is not None
        linear = operand_address(cpu, instruction, size, write=True)
        write_linear(cpu, linear, size, _swapped(read_register(cpu.state, source), size))
    cpu.retire(instruction)


def mcommit(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """MCOMMIT: all stores are complete, and none has met an error that memory reports late."""
    require_feature(cpu, "MCOMMIT")
    state = cpu.state
    if not state.efer & Efer.MCOMMIT:
        raise ud()
    if cpu.intercepts(SIMPLE[Plain.MCOMMIT], instruction):
        return
    state.rflags = state.rflags & ~ARITHMETIC | Rflags.CF
    cpu.retire(instruction)


HANDLERS: Final = {
    Mnemonic.CLFLUSHOPT: clean_line,
    Mnemonic.CLWB: clean_line,
    Mnemonic.MOVBE: movbe,
    Mnemonic.MCOMMIT: mcommit,
}
