"""The instructions of Intel MPX, and what they are where it is not enabled: NOPs.

Outside 64-bit mode addresses and bounds have 32 bits, in code segments of 16 bits as well, which need the prefix 67H
for that; in 64-bit mode that prefix and REX.W mean nothing.

Interpretations. Unless Intel MPX is enabled, no form is an invalid opcode but one with LOCK. LOCK may come before a
BNDMOV to memory. Outside 64-bit mode the bound directory is at a linear address and a bound-table entry at an offset
into DS, which must be usable, as Vol. 1 has it; the pages of the instructions call the latter linear as well. The entry
is read or written as a whole or not at all. BNDMOV between registers clears the upper halves of bounds outside 64-bit
mode. MAWA is 0 for the user as for the supervisor: CPUID enumerates no other.

Spec: SDM Vol. 1, "Intel MPX Instruction Summary", "BNDLDX and BNDSTX in 64-Bit Mode", "BNDLDX and BNDSTX Outside 64-Bit
Mode", "Intel MPX and Operating Modes"; SDM Vol. 2, "BNDMK—Make Bounds", "BNDCL—Check Lower Bound", "BNDCU/BNDCN—Check
Upper Bound", "BNDMOV—Move Bounds", "BNDLDX—Load Extended Bounds Using Address Translation", "BNDSTX—Store Extended
Bounds Using Address Translation".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from attrs import frozen
from iced_x86 import Code, Decoder, DecoderOptions, Mnemonic, OpKind, RegisterExt
from iced_x86 import Instruction as IcedInstruction

from vtx.x86 import bounds
from vtx.x86.alignment import checked_alignment, checks_alignment
from vtx.x86.decode import BOUNDS_CODES, Instruction, describe, effective_address, read_register, segment_allows
from vtx.x86.instructions.common import operand_address, read_linear, write_linear
from vtx.x86.linear import is_canonical, linear_address_width
from vtx.x86.outcome import Fault, InstructionAborted, Vector, gp, ud
from vtx.x86.state import MASK32, MASK64, CpuState, SegmentRegister

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_LOCK: Final = 0xF0
_ADDRESS_SIZE: Final = 0x67
_LEGACY_PREFIXES: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, _ADDRESS_SIZE, _LOCK, 0xF2, 0xF3))
_OUT_OF_BOUNDS: Final = 1  # error codes of BNDSTATUS
_INVALID_ENTRY: Final = 2
_VALID: Final = 1 << 0  # of a bound-directory entry


# Decoding


@frozen
class _Form:
    """An instruction of Intel MPX: ``first`` and ``second`` are the bound registers among its operands."""

    instruction: Instruction
    first: int | None
    second: int | None


def _essence(encoding: bytes, bits: int) -> bytes:
    """``encoding`` without LOCK and, in 64-bit mode, without 67H; what looks like REX before them is none."""
    kept = bytearray()
    for position, byte in enumerate(encoding):
        if byte in _LEGACY_PREFIXES:
            while kept and kept[-1] & 0xF0 == 0x40:
                kept.pop()
            if byte != _LOCK and (byte != _ADDRESS_SIZE or bits != 64):
                kept.append(byte)
        elif bits == 64 and byte & 0xF0 == 0x40:
            kept.append(byte)
        else:
            return bytes(kept) + encoding[position:]
    return bytes(kept)


def _bound_register(raw: IcedInstruction, operand: int) -> int | None:
    if operand >= raw.op_count or raw.op_kind(operand) != OpKind.REGISTER:
        return None
    register = raw.op_register(operand)
    return None if RegisterExt.is_gpr(register) else RegisterExt.number(register)


@lru_cache(maxsize=4096)
def _form(encoding: bytes, bits: int, lock: bool) -> _Form | None:
    """What ``encoding`` is where Intel MPX is enabled, None for a NOP.

    Raises `InstructionAborted` for an invalid opcode.
    """
    essence = _essence(encoding, bits)
    # Addresses relative to RIP count from the end, wherever what was left out had been.
    raw = Decoder(bits, essence, DecoderOptions.MPX, len(encoding) - len(essence)).decode()
    stores = raw.mnemonic == Mnemonic.BNDMOV and raw.op0_kind == OpKind.MEMORY
    if raw.code == Code.INVALID or (lock and not stores):
        raise ud()
    if raw.code in BOUNDS_CODES:
        return None
    return _Form(describe(raw, encoding, bits), _bound_register(raw, 0), _bound_register(raw, 1))


# Bounds


def _mask(state: CpuState) -> int:
    return MASK64 if state.in_64_bit_mode else MASK32


def _set(state: CpuState, register: int | None, lower: int, upper: int) -> None:
    assert register is not None
    state.lower_bounds[register], state.upper_bounds[register] = lower & _mask(state), upper & _mask(state)


def _get(state: CpuState, register: int | None) -> tuple[int, int]:
    assert register is not None
    return state.lower_bounds[register] & _mask(state), state.upper_bounds[register] & _mask(state)


def _exceeded(state: CpuState, status: int) -> InstructionAborted:
    state.bndstatus = status
    return InstructionAborted(Fault(Vector.BR))


def make(cpu: LogicalProcessor, form: _Form) -> None:
    """BNDMK: from the base to the effective address of an operand that is not accessed."""
    state, operand = cpu.state, form.instruction.memory
    assert operand is not None
    lower = 0 if operand.base is None else state.gpr[operand.base]
    _set(state, form.first, lower, ~effective_address(state, form.instruction, operand))


def _checked(state: CpuState, instruction: Instruction) -> int:
    """The address that BNDCL, BNDCU or BNDCN compares: a register, or the effective address of what is in memory."""
    register = instruction.registers[1]
    if register is not None:
        return read_register(state, register)
    assert instruction.memory is not None
    return effective_address(state, instruction, instruction.memory)


def check_lower(cpu: LogicalProcessor, form: _Form) -> None:
    """BNDCL."""
    lower, _ = _get(cpu.state, form.first)
    if _checked(cpu.state, form.instruction) < lower:
        raise _exceeded(cpu.state, _OUT_OF_BOUNDS)


def check_upper(cpu: LogicalProcessor, form: _Form) -> None:
    """BNDCU, of a bound in 1's complement, and BNDCN, of one that is not."""
    _, upper = _get(cpu.state, form.first)
    if form.instruction.mnemonic == Mnemonic.BNDCU:
        upper ^= _mask(cpu.state)
    if _checked(cpu.state, form.instruction) > upper:
        raise _exceeded(cpu.state, _OUT_OF_BOUNDS)


def _joined(parts: tuple[int, ...], size: int) -> int:
    return sum(part << 8 * size * place for place, part in enumerate(parts))


def _parts(value: int, size: int, count: int) -> tuple[int, ...]:
    return tuple(value >> 8 * size * place & (1 << 8 * size) - 1 for place in range(count))


def move(cpu: LogicalProcessor, form: _Form) -> None:
    """BNDMOV between bound registers, or from or to the two bounds in memory."""
    state = cpu.state
    if form.first is not None and form.second is not None:
        _set(state, form.first, *_get(state, form.second))
        return
    size = 8 if state.in_64_bit_mode else 4
    linear = operand_address(cpu, form.instruction, 2 * size, write=form.first is None)
    if checks_alignment(state) and linear & checked_alignment(2 * size) - 1:
        raise InstructionAborted(Fault(Vector.AC, 0))
    if form.first is None:
        write_linear(cpu, linear, 2 * size, _joined(_get(state, form.second), size))
    else:
        _set(state, form.first, *_parts(read_linear(cpu, linear, 2 * size), size, 2))


# Bound tables


def _require_canonical(state: CpuState, linear: int, size: int) -> None:
    width = linear_address_width(state)
    if not (is_canonical(linear, width) and is_canonical(linear + size - 1 & MASK64, width)):
        raise gp(0)


def _pointer_address(state: CpuState, instruction: Instruction) -> int:
    """Linear address of the pointer that the bounds are of: where it is tells where they are."""
    operand = instruction.memory
    assert operand is not None
    address = 0 if operand.base is None else state.gpr[operand.base] + operand.displacement
    if not state.in_64_bit_mode or operand.segment >= SegmentRegister.FS:
        address += state.segments[operand.segment].base
    return address & _mask(state)


def _table_entry_64(cpu: LogicalProcessor, pointer: int) -> int:
    state = cpu.state
    entry = ((pointer >> 20 & (1 << 28) - 1) << 3) + (bounds.configuration(state) & bounds.BASE) & MASK64
    _require_canonical(state, entry, 8)
    table = read_linear(cpu, entry, 8)
    if not table & _VALID:
        raise _exceeded(state, entry | _INVALID_ENTRY)
    linear = ((pointer >> 3 & (1 << 17) - 1) << 5) + (table & ~7) & MASK64
    _require_canonical(state, linear, 24)
    return linear


def _table_entry_32(cpu: LogicalProcessor, pointer: int, *, write: bool) -> int:
    state = cpu.state
    segment = state.segments[SegmentRegister.DS]
    if state.protected and not state.virtual_8086 and not segment.usable:
        raise gp(0)
    entry = ((pointer >> 12) << 2) + (bounds.configuration(state) & bounds.BASE) & MASK32
    table = read_linear(cpu, entry, 4)
    if not table & _VALID:
        raise _exceeded(state, entry | _INVALID_ENTRY)
    offset = ((pointer >> 2 & (1 << 10) - 1) << 4) + (table & ~3) & MASK32
    if not segment_allows(state, segment, offset, 12, write=write):
        raise gp(0)
    return segment.base + offset & MASK32


def _table_entry(cpu: LogicalProcessor, form: _Form, *, write: bool) -> tuple[int, int, int]:
    """Linear address of the bound-table entry, size of its fields in bytes, and the pointer that has to be in it."""
    state, operand = cpu.state, form.instruction.memory
    assert operand is not None
    address = _pointer_address(state, form.instruction)
    value = 0 if operand.index is None else state.gpr[operand.index] & _mask(state)
    if state.in_64_bit_mode:
        return _table_entry_64(cpu, address), 8, value
    return _table_entry_32(cpu, address, write=write), 4, value


def load(cpu: LogicalProcessor, form: _Form) -> None:
    """BNDLDX: the bounds of a pointer, or those of all memory if it is not the one that they were stored for."""
    linear, size, pointer = _table_entry(cpu, form, write=False)
    lower, upper, stored = _parts(read_linear(cpu, linear, 3 * size), size, 3)
    if stored != pointer:
        lower = upper = 0
    _set(cpu.state, form.first, lower, upper)


def store(cpu: LogicalProcessor, form: _Form) -> None:
    """BNDSTX."""
    linear, size, pointer = _table_entry(cpu, form, write=True)
    write_linear(cpu, linear, 3 * size, _joined((*_get(cpu.state, form.second), pointer), size))


_OPERATIONS: Final[Mapping[int, Callable[[LogicalProcessor, _Form], None]]] = {
    Mnemonic.BNDMK: make,
    Mnemonic.BNDCL: check_lower,
    Mnemonic.BNDCU: check_upper,
    Mnemonic.BNDCN: check_upper,
    Mnemonic.BNDMOV: move,
    Mnemonic.BNDLDX: load,
    Mnemonic.BNDSTX: store,
}


def reserved_nop(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """What was a NOP before Intel MPX, and is one without it."""
    state, form = cpu.state, None
    if instruction.code in BOUNDS_CODES and bounds.enabled(state):
        form = _form(instruction.encoding, instruction.bits, instruction.lock)
    elif instruction.lock:
        raise ud()
    if form is not None:
        watched = bounds.watches_branches(state)
        _OPERATIONS[form.instruction.mnemonic](cpu, form)
        if bounds.watches_branches(state) != watched:
            cpu.changed_system_state()
    cpu.retire(instruction)


HANDLERS: Final = {Mnemonic.RESERVEDNOP: reserved_nop}
