"""Decoding of the instructions the model handles itself, and the addresses of their memory operands.

iced-x86 does the decoding; this module turns its result into the few facts handlers need, in this project's terms
(register numbers as indexes of ``CpuState.gpr`` and ``CpuState.segments``), and caches by instruction bytes.

Spec: SDM Vol. 2, "Instruction Format"; SDM Vol. 1, "Operand Addressing"; SDM Vol. 3, "Limit Checking".
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from attrs import frozen
from iced_x86 import Code, Decoder, DecoderError, DecoderOptions, Mnemonic, OpKind, Register, RegisterExt
from iced_x86 import Instruction as IcedInstruction

from vtx.x86.linear_masking import data_address
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import MASK32, MASK64, AccessRights, CpuState, Segment, SegmentRegister

MAX_INSTRUCTION_LENGTH: Final = 15
RIP_BASE: Final = 16  # MemoryOperand.base of a RIP-relative operand

SEGMENT_REGISTERS: Final[Mapping[int, SegmentRegister]] = {
    Register.ES: SegmentRegister.ES,
    Register.CS: SegmentRegister.CS,
    Register.SS: SegmentRegister.SS,
    Register.DS: SegmentRegister.DS,
    Register.FS: SegmentRegister.FS,
    Register.GS: SegmentRegister.GS,
}
"""Segment registers by iced register number."""

BOUNDS_CODES: Final = frozenset(
    (
        *(Code.RESERVEDNOP_RM16_R16_0F1A, Code.RESERVEDNOP_RM32_R32_0F1A, Code.RESERVEDNOP_RM64_R64_0F1A),
        *(Code.RESERVEDNOP_RM16_R16_0F1B, Code.RESERVEDNOP_RM32_R32_0F1B, Code.RESERVEDNOP_RM64_R64_0F1B),
    )
)
"""The instructions of Intel MPX as iced-x86 decodes them here: as the NOPs they are where that is not enabled."""

_ADDRESS_MASKS: Final = {2: 0xFFFF, 4: MASK32, 8: MASK64}
_STRING_MEMORY: Final = {
    OpKind.MEMORY_SEG_SI: (6, 2),
    OpKind.MEMORY_SEG_ESI: (6, 4),
    OpKind.MEMORY_SEG_RSI: (6, 8),
    OpKind.MEMORY_ESDI: (7, 2),
    OpKind.MEMORY_ESEDI: (7, 4),
    OpKind.MEMORY_ESRDI: (7, 8),
}
# By address size; the operand is DS:rAX, and not encoded.
_MONITOR: Final = {
    Code.MONITORW: 2,
    Code.MONITORD: 4,
    Code.MONITORQ: 8,
    Code.MONITORXW: 2,
    Code.MONITORXD: 4,
    Code.MONITORXQ: 8,
}


@frozen
class MemoryOperand:
    """A memory operand as encoded.

    ``base`` and ``index`` are GPR numbers or None; ``base`` is `RIP_BASE` for RIP-relative operands, whose
    ``displacement`` then counts from the start of the instruction. ``scale`` is 1, 2, 4 or 8. ``displacement`` is
    unsigned, already sign-extended to 64 bits. ``address_size`` is 2, 4 or 8 bytes.
    """

    segment: SegmentRegister
    base: int | None
    index: int | None
    scale: int
    displacement: int
    address_size: int


@frozen
class RegisterOperand:
    """A general register operand: ``number`` indexes ``CpuState.gpr``; ``high_byte`` is set for AH, CH, DH, BH."""

    number: int
    size: int
    high_byte: bool = False


@frozen
class Instruction:
    """One decoded instruction; independent of processor state, so it can be cached.

    ``registers[i]`` is the general register of operand i or None; ``system_registers[i]`` the number of a control,
    debug or segment register operand; ``immediate`` the last immediate operand, zero-extended. ``operand_size`` and
    ``address_size`` are in bytes.
    """

    mnemonic: int
    code: int
    length: int
    encoding: bytes
    bits: int
    operand_size: int
    address_size: int
    memory: MemoryOperand | None
    registers: tuple[RegisterOperand | None, ...]
    system_registers: tuple[int | None, ...]
    immediate: int
    rep: bool
    lock: bool

    @property
    def name(self) -> str:
        """The mnemonic, as the manuals write it."""
        return mnemonic_name(self.mnemonic)


_MNEMONIC_NAMES: Final = {value: name for name, value in vars(Mnemonic).items() if isinstance(value, int)}


def mnemonic_name(mnemonic: int) -> str:
    """Name of an iced mnemonic number, for example ``VMLAUNCH``."""
    return _MNEMONIC_NAMES.get(mnemonic, f"mnemonic-{mnemonic}")


def _memory_operand(raw: IcedInstruction, bits: int) -> MemoryOperand | None:
    for i in range(raw.op_count):
        kind = raw.op_kind(i)
        if kind == OpKind.MEMORY:
            return _explicit_memory(raw, bits)
        if kind in _STRING_MEMORY:
            register, size = _STRING_MEMORY[kind]
            segment = SegmentRegister.ES if register == 7 else SEGMENT_REGISTERS[raw.memory_segment]
            return MemoryOperand(segment, register, None, 1, 0, size)
    if raw.code in _MONITOR:
        return MemoryOperand(
            SEGMENT_REGISTERS.get(raw.segment_prefix, SegmentRegister.DS), 0, None, 1, 0, _MONITOR[raw.code]
        )
    return None


def _explicit_memory(raw: IcedInstruction, bits: int) -> MemoryOperand:
    base: int | None = None
    displacement = raw.memory_displacement
    if raw.is_ip_rel_memory_operand:
        size = 8 if raw.memory_base == Register.RIP else 4
        return MemoryOperand(SEGMENT_REGISTERS[raw.memory_segment], RIP_BASE, None, 1, displacement & MASK64, size)
    if raw.memory_base != Register.NONE:
        base = RegisterExt.number(raw.memory_base)
        size = RegisterExt.size(raw.memory_base)
    elif raw.memory_index != Register.NONE:
        size = RegisterExt.size(raw.memory_index)
    else:
        size = raw.memory_displ_size  # an absolute address is as wide as the address size
    index = None if raw.memory_index == Register.NONE else RegisterExt.number(raw.memory_index)
    return MemoryOperand(
        SEGMENT_REGISTERS[raw.memory_segment], base, index, raw.memory_index_scale, displacement & MASK64, size
    )


def _general_register(raw: IcedInstruction, operand: int) -> RegisterOperand | None:
    register = raw.op_register(operand)
    if not RegisterExt.is_gpr(register):
        return None
    high = register in (Register.AH, Register.CH, Register.DH, Register.BH)
    number = RegisterExt.number(RegisterExt.full_register(register))
    return RegisterOperand(number, RegisterExt.size(register), high)


def _system_register(raw: IcedInstruction, operand: int) -> int | None:
    register = raw.op_register(operand)
    if (
        RegisterExt.is_cr(register)
        or RegisterExt.is_dr(register)
        or RegisterExt.is_segment_register(register)
        or RegisterExt.is_xmm(register)
    ):
        return RegisterExt.number(register)
    return None


_IMMEDIATES: Final = {
    OpKind.IMMEDIATE8,
    OpKind.IMMEDIATE16,
    OpKind.IMMEDIATE32,
    OpKind.IMMEDIATE64,
    OpKind.IMMEDIATE8TO16,
    OpKind.IMMEDIATE8TO32,
    OpKind.IMMEDIATE8TO64,
    OpKind.IMMEDIATE32TO64,
}


@lru_cache(maxsize=4096)
def decode(encoding: bytes, bits: int) -> Instruction | None:
    """Decode the instruction at the start of ``encoding`` (up to 15 bytes) for ``bits``-bit code.

    None if the bytes are no valid instruction or too few for one.
    """
    raw = Decoder(bits, encoding, DecoderOptions.NONE, 0).decode()
    if raw.code == Code.INVALID:
        raw = Decoder(bits, encoding, DecoderOptions.NO_INVALID_CHECK, 0).decode()
        if raw.code not in BOUNDS_CODES:  # they may have a LOCK prefix, which only their handlers know
            return None
    return describe(raw, encoding[: raw.len], bits)


def describe(raw: IcedInstruction, encoding: bytes, bits: int) -> Instruction:
    """``raw``, decoded as if it were at 0, as an `Instruction` whose bytes are ``encoding``."""
    registers = tuple(
        _general_register(raw, i) if raw.op_kind(i) == OpKind.REGISTER else None for i in range(raw.op_count)
    )
    system = tuple(_system_register(raw, i) if raw.op_kind(i) == OpKind.REGISTER else None for i in range(raw.op_count))
    immediates = [raw.immediate(i) for i in range(raw.op_count) if raw.op_kind(i) in _IMMEDIATES]
    operand_size, address_size = _sizes(encoding, bits)
    memory = _memory_operand(raw, bits)
    return Instruction(
        mnemonic=raw.mnemonic,
        code=raw.code,
        length=len(encoding),
        encoding=encoding,
        bits=bits,
        operand_size=operand_size,
        address_size=memory.address_size if memory else address_size,
        memory=memory,
        registers=registers,
        system_registers=system,
        immediate=immediates[-1] & MASK64 if immediates else 0,
        rep=raw.has_rep_prefix or raw.has_repne_prefix,
        lock=raw.has_lock_prefix,
    )


def is_cut_short(encoding: bytes, bits: int) -> bool:
    """Whether more bytes than ``encoding`` has would tell what instruction it is."""
    decoder = Decoder(bits, encoding)
    decoder.decode()
    return bool(decoder.last_error == DecoderError.NO_MORE_BYTES)


_LEGACY_PREFIXES: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))


def _sizes(encoding: bytes, bits: int) -> tuple[int, int]:
    """Operand and address size in bytes, from the prefixes."""
    operand_override = address_override = rex_w = False
    for byte in encoding:
        if byte in _LEGACY_PREFIXES:
            operand_override |= byte == 0x66
            address_override |= byte == 0x67
            rex_w = False  # a REX prefix counts only right before the opcode
        elif bits == 64 and byte & 0xF0 == 0x40:
            rex_w = bool(byte & 8)
        else:
            break
    if bits == 64:
        operand = 8 if rex_w else 2 if operand_override else 4
        return operand, 4 if address_override else 8
    wide = bits == 32
    return (4 if wide != operand_override else 2), (4 if wide != address_override else 2)


def effective_address(state: CpuState, instruction: Instruction, operand: MemoryOperand) -> int:
    """Offset of ``operand`` in its segment, cut to the address size."""
    address = operand.displacement
    if operand.base is not None:
        if operand.base == RIP_BASE:
            address += state.rip  # decoded as if at 0, so the displacement counts the length already
        else:
            address += state.gpr[operand.base]
    if operand.index is not None:
        address += state.gpr[operand.index] * operand.scale
    return address & _ADDRESS_MASKS[operand.address_size]


def is_canonical(address: int, width: int = 48) -> bool:
    """Whether the bits of ``address`` above ``width`` - 1 all equal bit ``width`` - 1."""
    top = address >> (width - 1)
    return top in (0, (1 << (65 - width)) - 1)


def linear_address(state: CpuState, instruction: Instruction, size: int, *, write: bool, width: int = 48) -> int:
    """Linear address of the memory operand, after segment checks for an access of ``size`` bytes.

    Raises `InstructionAborted` with #GP(0), or #SS(0) for the stack segment, where segmentation forbids the access or
    the address is not canonical.
    """
    operand = instruction.memory
    assert operand is not None
    offset = effective_address(state, instruction, operand)
    vector = Vector.SS if operand.segment == SegmentRegister.SS else Vector.GP
    segment = state.segments[operand.segment]
    if state.in_64_bit_mode:
        if operand.segment >= SegmentRegister.FS:
            offset = (offset + segment.base) & MASK64
        offset = data_address(state, offset)
        if not (is_canonical(offset, width) and is_canonical((offset + size - 1) & MASK64, width)):
            raise InstructionAborted(Fault(vector, 0))
        return offset
    if not segment_allows(state, segment, offset, size, write=write):
        raise InstructionAborted(Fault(vector, 0))
    return (offset + segment.base) & MASK32


def unchecked_linear_address(state: CpuState, instruction: Instruction) -> int:
    """Linear address of the memory operand, whether or not it may be accessed."""
    operand = instruction.memory
    assert operand is not None
    offset = effective_address(state, instruction, operand)
    base = state.segments[operand.segment].base
    if state.in_64_bit_mode:
        return (offset + base) & MASK64 if operand.segment >= SegmentRegister.FS else offset
    return (offset + base) & MASK32


def segment_allows(state: CpuState, segment: Segment, offset: int, size: int, *, write: bool) -> bool:
    """Whether ``segment`` may be used to access ``size`` bytes at ``offset``; not for 64-bit mode."""
    rights, limit = segment.access_rights, segment.limit
    if state.protected and not state.virtual_8086:
        if rights & AccessRights.UNUSABLE or not rights & AccessRights.PRESENT:
            return False
        code = rights & AccessRights.CODE
        if write and (code or not rights & AccessRights.WRITABLE_OR_READABLE):
            return False
        if code and not rights & AccessRights.WRITABLE_OR_READABLE:
            return False
        if not code and rights & AccessRights.EXPAND_DOWN_OR_CONFORMING:
            top = MASK32 if rights & AccessRights.DEFAULT_BIG else 0xFFFF
            return offset > limit and offset + size - 1 <= top
    return offset + size - 1 <= limit


def read_register(state: CpuState, operand: RegisterOperand) -> int:
    """Value of a general register operand, zero-extended."""
    value = state.gpr[operand.number]
    if operand.high_byte:
        return value >> 8 & 0xFF
    return value & ((1 << 8 * operand.size) - 1)


def write_register(state: CpuState, operand: RegisterOperand, value: int) -> None:
    """Write a general register operand; 32-bit writes clear the upper half, narrower ones keep the rest."""
    number, size = operand.number, operand.size
    if operand.high_byte:
        state.gpr[number] = state.gpr[number] & ~0xFF00 | (value & 0xFF) << 8
    elif size == 8:
        state.gpr[number] = value & MASK64
    elif size == 4:
        state.gpr[number] = value & MASK32
    else:
        mask = (1 << 8 * size) - 1
        state.gpr[number] = state.gpr[number] & ~mask | value & mask
