"""IN, OUT, INS, OUTS (SDM Vol. 2, the instructions' pages; SDM Vol. 1, "Protected-Mode I/O").

I/O permission is checked before an instruction is intercepted, its memory operand after.

A repeated string instruction is one iteration per call: interrupts and VM exits find it between iterations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86.decode import Instruction, unchecked_linear_address
from vtx.x86.instructions.common import operand_address, privilege, read_linear, write_linear
from vtx.x86.io_permission import check_io_permission
from vtx.x86.operations import PortIo
from vtx.x86.second_level import AccessKind
from vtx.x86.state import MASK32, MASK64, Gpr, Rflags

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_SIZES: Final[Mapping[int, int]] = {
    Mnemonic.INSB: 1,
    Mnemonic.INSW: 2,
    Mnemonic.INSD: 4,
    Mnemonic.OUTSB: 1,
    Mnemonic.OUTSW: 2,
    Mnemonic.OUTSD: 4,
}


def port_in(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """IN."""
    accumulator = instruction.registers[0]
    assert accumulator is not None
    immediate = instruction.registers[1] is None
    gpr = cpu.state.gpr
    port = instruction.immediate & 0xFF if immediate else gpr[Gpr.RDX] & 0xFFFF
    size = accumulator.size
    check_io_permission(cpu.state, cpu.mmu, port, size)
    if cpu.intercepts(PortIo(port, size, True, False, False, immediate), instruction):
        return
    value = cpu.port_read(port, size)
    mask = (1 << 8 * size) - 1
    gpr[Gpr.RAX] = value & MASK32 if size == 4 else gpr[Gpr.RAX] & ~mask | value & mask
    cpu.retire(instruction)


def port_out(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """OUT."""
    accumulator = instruction.registers[1]
    assert accumulator is not None
    immediate = instruction.registers[0] is None
    gpr = cpu.state.gpr
    port = instruction.immediate & 0xFF if immediate else gpr[Gpr.RDX] & 0xFFFF
    size = accumulator.size
    check_io_permission(cpu.state, cpu.mmu, port, size)
    if cpu.intercepts(PortIo(port, size, False, False, False, immediate), instruction):
        return
    cpu.port_write(port, size, gpr[Gpr.RAX] & ((1 << 8 * size) - 1))
    cpu.retire(instruction)


def port_string(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """INS and OUTS: one element."""
    state = cpu.state
    gpr = state.gpr
    is_in = instruction.mnemonic in (Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD)
    size = _SIZES[instruction.mnemonic]
    port = gpr[Gpr.RDX] & 0xFFFF
    mask = {2: 0xFFFF, 4: MASK32, 8: MASK64}[instruction.address_size]
    if instruction.rep and not gpr[Gpr.RCX] & mask:
        cpu.retire(instruction)
        return
    check_io_permission(state, cpu.mmu, port, size)
    linear = unchecked_linear_address(state, instruction)
    if cpu.intercepts(PortIo(port, size, is_in, True, instruction.rep, False, linear), instruction):
        return
    operand_address(cpu, instruction, size, write=is_in)
    if is_in:
        user, ac = privilege(cpu)
        cpu.mmu.check(linear, size, AccessKind.WRITE, user=user, ac=ac)
        write_linear(cpu, linear, size, cpu.port_read(port, size))
    else:
        cpu.port_write(port, size, read_linear(cpu, linear, size))
    _advance(cpu, instruction, Gpr.RDI if is_in else Gpr.RSI, size, mask)


def _advance(cpu: LogicalProcessor, instruction: Instruction, pointer: Gpr, size: int, mask: int) -> None:
    state = cpu.state
    step = -size if state.rflags & Rflags.DF else size
    _step_register(state.gpr, pointer, step, mask)
    if instruction.rep:
        _step_register(state.gpr, Gpr.RCX, -1, mask)
        if state.gpr[Gpr.RCX] & mask:
            cpu.completed(single_step=bool(state.rflags & Rflags.TF))
            return
    cpu.retire(instruction)


def _step_register(gpr: list[int], number: Gpr, step: int, mask: int) -> None:
    value = (gpr[number] + step) & mask
    # A 32-bit address size clears the upper half, as any 32-bit register write does; a 16-bit one keeps it.
    gpr[number] = gpr[number] & ~mask | value if mask == 0xFFFF else value


HANDLERS: Final = {Mnemonic.IN: port_in, Mnemonic.OUT: port_out, **dict.fromkeys(_SIZES, port_string)}
