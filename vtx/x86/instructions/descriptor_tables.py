"""SGDT, SIDT, LGDT, LIDT, SLDT, STR, LLDT, LTR (SDM Vol. 2, the instructions' pages)."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86 import descriptors
from vtx.x86.decode import Instruction, is_canonical
from vtx.x86.descriptors import (
    AVAILABLE_TSS_TYPES,
    TSS_BUSY,
    Descriptor,
    SystemType,
    is_null,
    null_segment,
    selector_fault,
)
from vtx.x86.instructions.common import (
    operand_address,
    read_linear,
    read_operand,
    require_no_umip,
    require_protected_mode,
    require_ring_0,
    write_linear,
    write_operand,
)
from vtx.x86.linear import linear_address_width
from vtx.x86.operations import DescriptorTableAccess
from vtx.x86.outcome import Vector, gp
from vtx.x86.state import MASK64, DescriptorTable

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor


def _store_table(cpu: LogicalProcessor, instruction: Instruction, table: DescriptorTable) -> None:
    require_no_umip(cpu)
    if cpu.intercepts(DescriptorTableAccess(local=False), instruction):
        return
    size = 10 if cpu.state.in_64_bit_mode else 6
    linear = operand_address(cpu, instruction, size, write=True)
    value = table.limit & 0xFFFF | table.base << 16
    write_linear(cpu, linear, size, value)
    cpu.retire(instruction)


def sgdt(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """SGDT."""
    _store_table(cpu, instruction, cpu.state.gdtr)


def sidt(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """SIDT."""
    _store_table(cpu, instruction, cpu.state.idtr)


def _load_table(cpu: LogicalProcessor, instruction: Instruction, table: DescriptorTable) -> None:
    require_ring_0(cpu)
    if cpu.intercepts(DescriptorTableAccess(local=False), instruction):
        return
    wide = cpu.state.in_64_bit_mode
    size = 10 if wide else 6
    value = read_linear(cpu, operand_address(cpu, instruction, size), size)
    base = value >> 16
    if not wide and instruction.operand_size == 2:
        base &= 0xFF_FFFF
    if wide and not is_canonical(base, linear_address_width(cpu.state)):
        raise gp(0)
    table.base, table.limit = base, value & 0xFFFF
    cpu.changed_system_state()
    cpu.retire(instruction)


def lgdt(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """LGDT."""
    _load_table(cpu, instruction, cpu.state.gdtr)


def lidt(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """LIDT."""
    _load_table(cpu, instruction, cpu.state.idtr)


def _store_selector(cpu: LogicalProcessor, instruction: Instruction, selector: int) -> None:
    require_protected_mode(cpu)
    require_no_umip(cpu)
    if not cpu.intercepts(DescriptorTableAccess(local=True), instruction):
        write_operand(cpu, instruction, 0, 2, selector)
        cpu.retire(instruction)


def sldt(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """SLDT."""
    _store_selector(cpu, instruction, cpu.state.ldtr.selector)


def store_task_register(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """STR."""
    _store_selector(cpu, instruction, cpu.state.tr.selector)


def _system_descriptor(cpu: LogicalProcessor, selector: int, types: Collection[int]) -> Descriptor:
    """The GDT descriptor of ``selector``, checked as LLDT and LTR do; 16 bytes in IA-32e mode."""
    size = 16 if cpu.state.long_mode else 8
    address = None if selector & 4 else descriptors.descriptor_address(cpu.state, selector, size)
    if address is None:
        raise selector_fault(Vector.GP, selector)
    value = cpu.mmu.read(address, size)
    descriptor = descriptors.parse_descriptor(value & MASK64, value >> 64)
    if descriptor.system_type not in types or value >> 104 & 0x1F:
        raise selector_fault(Vector.GP, selector)
    if not descriptor.present:
        raise selector_fault(Vector.NP, selector)
    if cpu.state.long_mode and not is_canonical(descriptor.base, linear_address_width(cpu.state)):
        raise selector_fault(Vector.GP, selector)
    return descriptor


def lldt(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """LLDT."""
    require_protected_mode(cpu)
    require_ring_0(cpu)
    if cpu.intercepts(DescriptorTableAccess(local=True), instruction):
        return
    selector = read_operand(cpu, instruction, 0, 2)
    if is_null(selector):
        cpu.state.ldtr = null_segment(selector)
    else:
        descriptor = _system_descriptor(cpu, selector, (SystemType.LDT,))
        cpu.state.ldtr = descriptor.segment(selector)
    cpu.changed_system_state()
    cpu.retire(instruction)


def ltr(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """LTR."""
    require_protected_mode(cpu)
    require_ring_0(cpu)
    if cpu.intercepts(DescriptorTableAccess(local=True), instruction):
        return
    selector = read_operand(cpu, instruction, 0, 2)
    if is_null(selector):
        raise gp(0)
    types = (SystemType.TSS_32_AVAILABLE,) if cpu.state.long_mode else AVAILABLE_TSS_TYPES
    descriptor = _system_descriptor(cpu, selector, types)
    descriptors.set_tss_busy(cpu.state, cpu.mmu, selector, busy=True)
    segment = descriptor.segment(selector)
    segment.access_rights |= TSS_BUSY
    cpu.state.tr = segment
    cpu.changed_system_state()
    cpu.retire(instruction)


HANDLERS: Final = {
    Mnemonic.SGDT: sgdt,
    Mnemonic.SIDT: sidt,
    Mnemonic.LGDT: lgdt,
    Mnemonic.LIDT: lidt,
    Mnemonic.SLDT: sldt,
    Mnemonic.STR: store_task_register,
    Mnemonic.LLDT: lldt,
    Mnemonic.LTR: ltr,
}
