"""Control and debug registers, INVLPG, INVPCID.

Spec: SDM Vol. 2, "MOV—Move to/from Control Registers" and the other instructions' pages; Vol. 3, "Control Registers".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86.cpuid import reserved_cr4_bits
from vtx.x86.decode import Instruction, is_canonical
from vtx.x86.event import GENERAL_DETECT
from vtx.x86.instructions import segment_loads
from vtx.x86.instructions.common import (
    operand_address,
    read_linear,
    read_operand,
    require_feature,
    require_no_umip,
    require_ring_0,
    write_operand,
)
from vtx.x86.linear import linear_address_width
from vtx.x86.linear_masking import CR3_LAM
from vtx.x86.operations import (
    ClearTaskSwitched,
    InvalidatePage,
    InvalidateProcessContext,
    LoadMachineStatusWord,
    MoveDebugRegister,
    MoveFromControlRegister,
    MoveToControlRegister,
    StoreMachineStatusWord,
)
from vtx.x86.outcome import Fault, InstructionAborted, Vector, gp, ud
from vtx.x86.state import MASK32, MASK64, AccessRights, Cr0, Cr4, Efer, Rflags

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

CR0_DEFINED: Final = int(
    Cr0.PE | Cr0.MP | Cr0.EM | Cr0.TS | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.AM | Cr0.NW | Cr0.CD | Cr0.PG
)
_CR0_RELOADS_PDPTRS: Final = int(Cr0.CD | Cr0.NW | Cr0.PG)
_CR4_RELOADS_PDPTRS: Final = int(Cr4.PAE | Cr4.PGE | Cr4.PSE | Cr4.SMEP)
_NO_FLUSH: Final = 1 << 63
_DR7_GENERAL_DETECT: Final = 1 << 13
_DR6_FIXED: Final = 0xFFFF_0FF0
_DR7_FIXED: Final = 0x400
_DR7_RESERVED: Final = 0xD800


def _pae_paging(cr0: int, cr4: int, efer: int) -> bool:
    return bool(cr0 & Cr0.PG and cr4 & Cr4.PAE and not efer & Efer.LMA)


def _trace(cpu: LogicalProcessor, register: str, old: int, new: int) -> None:
    if cpu.tracing is not None:
        cpu.tracing.control_write(register, old, new)


def _check_cr0(cpu: LogicalProcessor, value: int) -> None:
    """#GP(0) for a value that CR0 cannot be given now."""
    state = cpu.state
    if value >> 32:
        raise gp(0)
    value = value & CR0_DEFINED | Cr0.ET
    if (value & Cr0.PG and not value & Cr0.PE) or (value & Cr0.NW and not value & Cr0.CD):
        raise gp(0)
    if state.cr4 & Cr4.CET and not value & Cr0.WP:
        raise gp(0)
    extension = cpu.virtualization
    if extension is not None and not extension.control_register_fixed_ok(0, value):
        raise gp(0)
    if value & Cr0.PG and not state.cr0 & Cr0.PG and state.efer & Efer.LME:
        if not state.cr4 & Cr4.PAE or state.cs.access_rights & AccessRights.LONG:
            raise gp(0)
    elif state.cr0 & Cr0.PG and not value & Cr0.PG and (state.in_64_bit_mode or state.cr4 & (Cr4.PCIDE | Cr4.FRED)):
        raise gp(0)


def write_cr0(cpu: LogicalProcessor, value: int) -> None:
    """Give CR0 a value software asked for, with all checks and consequences. Raises #GP(0)."""
    _check_cr0(cpu, value)
    state = cpu.state
    value = value & CR0_DEFINED | Cr0.ET
    efer, old = state.efer, state.cr0
    if value & Cr0.PG and not old & Cr0.PG and efer & Efer.LME:
        efer |= Efer.LMA
    elif old & Cr0.PG and not value & Cr0.PG:
        efer &= ~int(Efer.LMA)
    if _pae_paging(value, state.cr4, efer) and (value ^ old) & _CR0_RELOADS_PDPTRS:
        state.pdptrs[:] = cpu.mmu.load_pdptrs(state.cr3)
    state.cr0, state.efer = value, efer
    _trace(cpu, "CR0", old, value)
    cpu.control_registers_written()


def _check_cr3(cpu: LogicalProcessor, value: int) -> None:
    """#GP(0) for a value that CR3 cannot be given now."""
    if cpu.state.cr4 & Cr4.PCIDE:
        value &= ~_NO_FLUSH
    if cpu.profile.has("LAM") and cpu.state.long_mode:
        value &= ~CR3_LAM
    if value >> cpu.profile.physical_address_width:
        raise gp(0)


def write_cr3(cpu: LogicalProcessor, value: int) -> None:
    """Give CR3 a value software asked for. Raises #GP(0)."""
    state = cpu.state
    _check_cr3(cpu, value)
    preserve = bool(state.cr4 & Cr4.PCIDE and value & _NO_FLUSH)
    if preserve:
        value &= ~_NO_FLUSH
    if _pae_paging(state.cr0, state.cr4, state.efer):
        state.pdptrs[:] = cpu.mmu.load_pdptrs(value)
    _trace(cpu, "CR3", state.cr3, value)
    state.cr3 = value
    cpu.mmu.cr3_written(state, preserve=preserve)


def _check_cr4(cpu: LogicalProcessor, value: int) -> None:
    """#GP(0) for a value that CR4 cannot be given now."""
    state = cpu.state
    changed = value ^ state.cr4
    if value & reserved_cr4_bits(cpu.profile) or (value & Cr4.VMXE and state.smm is not None):
        raise gp(0)
    if state.long_mode and (not value & Cr4.PAE or changed & Cr4.LA57):
        raise gp(0)
    if value & Cr4.CET and not state.cr0 & Cr0.WP:
        raise gp(0)
    if value & Cr4.FRED and not state.long_mode:
        raise gp(0)
    if changed & value & Cr4.PCIDE and (not state.long_mode or state.cr3 & 0xFFF):
        raise gp(0)
    extension = cpu.virtualization
    if extension is not None and not extension.control_register_fixed_ok(4, value):
        raise gp(0)


def write_cr4(cpu: LogicalProcessor, value: int) -> None:
    """Give CR4 a value software asked for. Raises #GP(0)."""
    _check_cr4(cpu, value)
    state = cpu.state
    changed = value ^ state.cr4
    if _pae_paging(state.cr0, value, state.efer) and changed & _CR4_RELOADS_PDPTRS:
        state.pdptrs[:] = cpu.mmu.load_pdptrs(state.cr3)
    _trace(cpu, "CR4", state.cr4, value)
    state.cr4 = value
    cpu.control_registers_written()


def _check_cr8(cpu: LogicalProcessor, value: int) -> None:
    """#GP(0) for a value that CR8 cannot be given."""
    if value >> 4:
        raise gp(0)


def write_cr8(cpu: LogicalProcessor, value: int) -> None:
    """Write the task priority. Raises #GP(0)."""
    _check_cr8(cpu, value)
    _trace(cpu, "CR8", cpu.task_priority(), value)
    cpu.set_task_priority(value)


_WRITERS: Final = {0: write_cr0, 3: write_cr3, 4: write_cr4, 8: write_cr8}
_CHECKS: Final = {0: _check_cr0, 3: _check_cr3, 4: _check_cr4, 8: _check_cr8}


def _merged(cpu: LogicalProcessor, number: int, value: int) -> int:
    """The value a write that does not exit gives CR0 or CR4 (guest/host masks apply in non-root operation)."""
    extension = cpu.virtualization
    if extension is not None and extension.non_root and number in (0, 4):
        return extension.merge_control_register(number, value)
    return value


def _seen(cpu: LogicalProcessor, number: int) -> int:
    """What a read of CR0 or CR4 sees (read shadows apply in non-root operation)."""
    extension = cpu.virtualization
    if extension is not None and extension.non_root:
        return extension.read_control_register(number)
    return cpu.state.cr0 if number == 0 else cpu.state.cr4


def _written(cpu: LogicalProcessor, number: int) -> None:
    """An instruction that wrote a control register is complete; in non-root operation that may be trapped."""
    extension = cpu.virtualization
    if extension is not None and extension.non_root:
        extension.control_register_written(number)


def move_cr(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """MOV to or from a control register."""
    state = cpu.state
    writes = instruction.registers[0] is None
    number = instruction.system_registers[0 if writes else 1]
    register = instruction.registers[1 if writes else 0]
    if number not in (0, 2, 3, 4, 8) or register is None:
        raise ud()
    require_ring_0(cpu)
    if writes:
        value = state.gpr[register.number] & (MASK64 if state.in_64_bit_mode else MASK32)
        if cpu.profile.is_amd and number in _CHECKS:
            _CHECKS[number](cpu, value)  # before the intercept, which comes first on Intel processors
        if cpu.intercepts(MoveToControlRegister(number, register.number, value), instruction):
            return
        if number == 2:
            state.cr2 = value
            cpu.changed_system_state()
        else:
            _WRITERS[number](cpu, _merged(cpu, number, value))
        cpu.retire(instruction)
        _written(cpu, number)
    else:
        if cpu.intercepts(MoveFromControlRegister(number, register.number), instruction):
            return
        state.gpr[register.number] = _read_cr(cpu, number) & (MASK64 if state.in_64_bit_mode else MASK32)
        cpu.retire(instruction)


def _read_cr(cpu: LogicalProcessor, number: int) -> int:
    if number in (0, 4):
        return _seen(cpu, number)
    if number == 8:
        return cpu.task_priority()
    return cpu.state.cr2 if number == 2 else cpu.state.cr3


def clts(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """CLTS."""
    require_ring_0(cpu)
    if cpu.intercepts(ClearTaskSwitched(), instruction):
        return
    # Where the mask covers TS and the shadow is clear, the instruction neither exits nor changes CR0.TS.
    merged = _merged(cpu, 0, cpu.state.cr0 & ~int(Cr0.TS))
    cpu.state.cr0 = merged & MASK32
    cpu.control_registers_written()
    cpu.retire(instruction)
    _written(cpu, 0)


def lmsw(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """LMSW: the low four bits of CR0; PE can be set but not cleared."""
    require_ring_0(cpu)
    register = instruction.registers[0]
    linear = None if register is not None else operand_address(cpu, instruction, 2)
    source = read_operand(cpu, instruction, 0, 2)
    if cpu.intercepts(LoadMachineStatusWord(source, linear), instruction):
        return
    old = cpu.state.cr0
    write_cr0(cpu, _merged(cpu, 0, old & ~0xE | source & 0xF | old & 1))
    cpu.retire(instruction)
    _written(cpu, 0)


def smsw(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """SMSW: a register destination gets as much of CR0 as it holds, memory 16 bits."""
    require_no_umip(cpu)
    if cpu.intercepts(StoreMachineStatusWord(), instruction):
        return
    write_operand(cpu, instruction, 0, 2, _seen(cpu, 0))
    cpu.retire(instruction)


def move_dr(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """MOV to or from a debug register.

    Spec: SDM Vol. 3, "Instructions That Cause VM Exits Conditionally" (MOV DR).
    """
    state = cpu.state
    writes = instruction.registers[0] is None
    number = instruction.system_registers[0 if writes else 1]
    register = instruction.registers[1 if writes else 0]
    if number is None or number > 7 or register is None:
        raise ud()
    encoded = number
    # In VMX, of all the instructions that exit, this one alone exits before the two faults below.
    if not cpu.profile.is_amd and cpu.intercepts(
        MoveDebugRegister(number, register.number, writes, encoded), instruction
    ):
        return
    if number in (4, 5):
        if state.cr4 & Cr4.DE:
            raise ud()
        number += 2
    require_ring_0(cpu)
    if cpu.profile.is_amd and cpu.intercepts(MoveDebugRegister(number, register.number, writes, encoded), instruction):
        return
    if state.dr7 & _DR7_GENERAL_DETECT:
        raise InstructionAborted(Fault(Vector.DB, debug=GENERAL_DETECT))
    mask = MASK64 if state.in_64_bit_mode else MASK32
    if writes:
        _write_dr(cpu, number, state.gpr[register.number] & mask)
    else:
        value = state.dr[number] if number < 4 else state.dr6 if number == 6 else state.dr7
        state.gpr[register.number] = value & mask
    cpu.retire(instruction)


def _write_dr(cpu: LogicalProcessor, number: int, value: int) -> None:
    state = cpu.state
    if number < 4:
        state.dr[number] = value
        return
    if value >> 32:
        raise gp(0)
    if number == 6:
        state.dr6 = value & 0x1_E00F | _DR6_FIXED
    else:
        state.dr7 = value & ~_DR7_RESERVED | _DR7_FIXED


def invlpg(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """INVLPG: no fault for any address, canonical or not."""
    require_ring_0(cpu)
    linear = _unchecked_address(cpu, instruction)
    if not cpu.intercepts(InvalidatePage(linear), instruction):
        cpu.mmu.invlpg(linear)
        cpu.retire(instruction)


def _unchecked_address(cpu: LogicalProcessor, instruction: Instruction) -> int:
    from vtx.x86.decode import effective_address  # noqa: PLC0415 - the one handler that skips the segment checks

    state, memory = cpu.state, instruction.memory
    assert memory is not None
    offset = effective_address(state, instruction, memory)
    if state.in_64_bit_mode:
        return (offset + state.segments[memory.segment].base if memory.segment > 3 else offset) & MASK64
    return (offset + state.segments[memory.segment].base) & MASK32


def invpcid(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """INVPCID."""
    state = cpu.state
    require_feature(cpu, "INVPCID")
    if state.virtual_8086:
        raise ud()
    require_ring_0(cpu)
    if cpu.intercepts(InvalidateProcessContext(), instruction):
        return
    register = instruction.registers[0]
    assert register is not None
    kind = state.gpr[register.number] & (MASK64 if state.in_64_bit_mode else MASK32)
    descriptor = read_linear(cpu, operand_address(cpu, instruction, 16), 16)
    pcid, linear = descriptor & MASK64, descriptor >> 64
    if kind > 3:
        raise gp(0)
    if kind < 2:
        if pcid >> 12 or (pcid and not state.cr4 & Cr4.PCIDE):
            raise gp(0)
        if kind == 0 and not is_canonical(linear, linear_address_width(state)):
            raise gp(0)
    cpu.mmu.invpcid(kind, pcid & 0xFFF, linear)
    cpu.retire(instruction)


def set_ac(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """STAC and CLAC."""
    require_feature(cpu, "SMAP")
    state = cpu.state
    if state.cpl or not state.protected:
        raise ud()
    if instruction.mnemonic == Mnemonic.STAC:
        state.rflags |= int(Rflags.AC)
    else:
        state.rflags &= ~int(Rflags.AC)
    cpu.retire(instruction)


_BASES: Final[Mapping[int, int]] = {
    Mnemonic.RDFSBASE: 4,
    Mnemonic.WRFSBASE: 4,
    Mnemonic.RDGSBASE: 5,
    Mnemonic.WRGSBASE: 5,
}


def segment_base(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE."""
    state = cpu.state
    require_feature(cpu, "FSGSBASE")
    if not state.in_64_bit_mode or not state.cr4 & Cr4.FSGSBASE:
        raise ud()
    segment = state.segments[_BASES[instruction.mnemonic]]
    register = instruction.registers[0]
    assert register is not None
    mask = (1 << 8 * register.size) - 1
    if instruction.mnemonic in (Mnemonic.RDFSBASE, Mnemonic.RDGSBASE):
        state.gpr[register.number] = segment.base & mask
    else:
        value = state.gpr[register.number] & mask
        if not is_canonical(value, linear_address_width(state)):
            raise gp(0)
        segment.base = value
        cpu.changed_system_state()
    cpu.retire(instruction)


def is_control_or_debug_move(instruction: Instruction) -> bool:
    """Whether a MOV is one to or from a control or debug register."""
    operands = instruction.system_registers
    return 0x20 <= instruction.encoding[-2] <= 0x23 and any(operand is not None for operand in operands)


def move(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """MOV: only moves to segment registers, and to and from control and debug registers, come to the model."""
    if is_control_or_debug_move(instruction):
        (move_cr if instruction.encoding[-2] in (0x20, 0x22) else move_dr)(cpu, instruction)
    elif segment_loads.is_segment_load(instruction):
        segment_loads.move(cpu, instruction)
    else:
        raise ud()


HANDLERS: Final = {
    Mnemonic.MOV: move,
    Mnemonic.CLTS: clts,
    Mnemonic.LMSW: lmsw,
    Mnemonic.SMSW: smsw,
    Mnemonic.INVLPG: invlpg,
    Mnemonic.INVPCID: invpcid,
    Mnemonic.STAC: set_ac,
    Mnemonic.CLAC: set_ac,
    **dict.fromkeys(_BASES, segment_base),
}
