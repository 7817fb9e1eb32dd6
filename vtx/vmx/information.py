"""The VM-exit instruction-information field, and the exit qualification of instructions with a memory operand.

Spec: SDM Vol. 3, "VM Exits", "Information for VM Exits Due to Instruction Execution".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from iced_x86 import Mnemonic

from vtx.x86.decode import RIP_BASE, Instruction, MemoryOperand
from vtx.x86.state import MASK64

_ADDRESS_SIZES: Final = {2: 0, 4: 1, 8: 2}
_SCALES: Final = {1: 0, 2: 1, 4: 2, 8: 3}
_REGISTER_OPERAND: Final = 1 << 10
_NO_INDEX: Final = 1 << 22
_NO_BASE: Final = 1 << 27


def memory_information(operand: MemoryOperand) -> int:
    """Scaling, address size, segment, index and base: the part most formats share."""
    value = _SCALES[operand.scale] | _ADDRESS_SIZES[operand.address_size] << 7 | operand.segment << 15
    if operand.index is None:
        value |= _NO_INDEX
    else:
        value |= operand.index << 18
    if operand.base is None or operand.base == RIP_BASE:
        value |= _NO_BASE
    else:
        value |= operand.base << 23
    return value


def _register(instruction: Instruction, position: int) -> int:
    operand = instruction.registers[position]
    return operand.number if operand else 0


def _memory_only(instruction: Instruction) -> int:
    """VMCLEAR, VMPTRLD, VMPTRST, VMXON, XRSTORS and XSAVES."""
    assert instruction.memory is not None
    return memory_information(instruction.memory)


def _memory_and_register(instruction: Instruction) -> int:
    """INVEPT, INVPCID and INVVPID: the register holds the type of invalidation."""
    assert instruction.memory is not None
    return memory_information(instruction.memory) | _register(instruction, 0) << 28


def _field_access(instruction: Instruction) -> int:
    """VMREAD and VMWRITE: the second register holds the field encoding."""
    reads = instruction.mnemonic == Mnemonic.VMREAD
    data, encoding = (0, 1) if reads else (1, 0)
    second = _register(instruction, encoding) << 28
    if instruction.memory is None:
        return _register(instruction, data) << 3 | _REGISTER_OPERAND | second
    return memory_information(instruction.memory) | second


_TABLE_IDENTITIES: Final[dict[int, int]] = {
    Mnemonic.SGDT: 0,
    Mnemonic.SIDT: 1,
    Mnemonic.LGDT: 2,
    Mnemonic.LIDT: 3,
    Mnemonic.SLDT: 0,
    Mnemonic.STR: 1,
    Mnemonic.LLDT: 2,
    Mnemonic.LTR: 3,
}


def _descriptor_table(instruction: Instruction) -> int:
    """SGDT, SIDT, LGDT and LIDT."""
    assert instruction.memory is not None
    wide = instruction.operand_size != 2
    return memory_information(instruction.memory) | wide << 11 | _TABLE_IDENTITIES[instruction.mnemonic] << 28


def _local_table(instruction: Instruction) -> int:
    """SLDT, STR, LLDT and LTR."""
    identity = _TABLE_IDENTITIES[instruction.mnemonic] << 28
    if instruction.memory is None:
        return _register(instruction, 0) << 3 | _REGISTER_OPERAND | identity
    return memory_information(instruction.memory) | identity


def _random(instruction: Instruction) -> int:
    """RDRAND, RDSEED, TPAUSE and UMWAIT."""
    operand = instruction.registers[0]
    assert operand is not None
    return operand.number << 3 | _ADDRESS_SIZES[operand.size] << 11  # 66H may be part of the opcode


def string_io_information(instruction: Instruction) -> int:
    """INS and OUTS; the segment is defined for OUTS alone."""
    assert instruction.memory is not None
    return _ADDRESS_SIZES[instruction.address_size] << 7 | instruction.memory.segment << 15


_FORMATS: Final[dict[int, Callable[[Instruction], int]]] = {
    Mnemonic.VMCLEAR: _memory_only,
    Mnemonic.VMPTRLD: _memory_only,
    Mnemonic.VMPTRST: _memory_only,
    Mnemonic.VMXON: _memory_only,
    Mnemonic.XSAVES: _memory_only,
    Mnemonic.XSAVES64: _memory_only,
    Mnemonic.XRSTORS: _memory_only,
    Mnemonic.XRSTORS64: _memory_only,
    Mnemonic.INVEPT: _memory_and_register,
    Mnemonic.INVVPID: _memory_and_register,
    Mnemonic.INVPCID: _memory_and_register,
    Mnemonic.VMREAD: _field_access,
    Mnemonic.VMWRITE: _field_access,
    Mnemonic.SGDT: _descriptor_table,
    Mnemonic.SIDT: _descriptor_table,
    Mnemonic.LGDT: _descriptor_table,
    Mnemonic.LIDT: _descriptor_table,
    Mnemonic.SLDT: _local_table,
    Mnemonic.STR: _local_table,
    Mnemonic.LLDT: _local_table,
    Mnemonic.LTR: _local_table,
    Mnemonic.RDRAND: _random,
    Mnemonic.RDSEED: _random,
    Mnemonic.UMWAIT: _random,
    Mnemonic.TPAUSE: _random,
}


def instruction_information(instruction: Instruction) -> int | None:
    """The field for an exit due to ``instruction``, or None for instructions that define no format."""
    format_of = _FORMATS.get(instruction.mnemonic)
    return format_of(instruction) if format_of else None


def displacement_qualification(instruction: Instruction, rip: int) -> int:
    """Exit qualification of an instruction with a memory operand: its displacement, 0 without one.

    ``rip`` is the instruction's own; a RIP-relative displacement is reported as the address it gives.
    """
    operand = instruction.memory
    if operand is None:
        return 0
    if operand.base == RIP_BASE:
        return (operand.displacement + rip) & MASK64
    return operand.displacement
