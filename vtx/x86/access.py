"""Which exact address an instruction touched, when only the page is known.

The engine reports refused translations by page. The linear address that #PF puts into CR2, and that VM exits report,
is found by computing the memory operands of the instruction at RIP, implicit stack accesses included.

Spec: SDM Vol. 3, "Interrupt 14—Page-Fault Exception (#PF)", "Access Rights" (implicit supervisor-mode accesses).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from attrs import frozen
from iced_x86 import (
    CodeSize,
    Decoder,
    DecoderOptions,
    InstructionInfoFactory,
    MemorySizeExt,
    Mnemonic,
    OpAccess,
    OpKind,
    Register,
    RegisterExt,
    UsedMemory,
)
from iced_x86 import Instruction as IcedInstruction

from vtx.addresses import PAGE_OFFSET_MASK, PAGE_SIZE
from vtx.x86 import bounds
from vtx.x86.alignment import required_alignment
from vtx.x86.decode import SEGMENT_REGISTERS, Instruction
from vtx.x86.second_level import AccessKind
from vtx.x86.state import MASK32, MASK64, CpuState, Gpr, SegmentRegister

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_WRITES: Final = frozenset(
    (OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE),
)
_READS: Final = frozenset(
    (OpAccess.READ, OpAccess.COND_READ, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE),
)
_WIDTHS: Final[Mapping[int, int]] = {CodeSize.CODE16: 0xFFFF, CodeSize.CODE32: MASK32}
_LARGEST_OPERAND: Final = 512  # FXSAVE; an XSAVE area is larger but reported without a size
_BIT_STRINGS: Final = frozenset((Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC))
_FACTORY: Final = InstructionInfoFactory()


def _register_value(state: CpuState, register: int) -> int:
    if register in SEGMENT_REGISTERS:
        segment = SEGMENT_REGISTERS[register]
        if state.in_64_bit_mode and segment < SegmentRegister.FS:
            return 0
        return state.segments[segment].base
    if register in (Register.RIP, Register.EIP):
        return state.rip
    value = state.gpr[RegisterExt.number(register)]  # type: ignore[arg-type]
    return value & ((1 << 8 * RegisterExt.size(register)) - 1)  # type: ignore[arg-type]


@frozen
class Operand:
    """A memory operand, explicit or implicit, of an instruction about to execute; ``stack`` if through SS.

    ``offset`` is its address in ``segment``. Without ``alignment`` (in bytes, 1: none) the access raises #GP(0).
    """

    linear: int
    size: int
    reads: bool
    writes: bool
    stack: bool
    segment: SegmentRegister = SegmentRegister.DS
    offset: int = 0
    alignment: int = 1


@lru_cache(maxsize=4096)
def _decoded(encoding: bytes, bits: int, rip: int, mpx: bool) -> tuple[IcedInstruction, int, tuple[UsedMemory, ...]]:
    """An instruction at ``rip``: as iced-x86 has it, the alignment it asks for, and the memory it accesses."""
    raw = Decoder(bits, encoding, DecoderOptions.MPX if mpx else DecoderOptions.NONE, rip).decode()
    return raw, required_alignment(raw), tuple(_FACTORY.info(raw).used_memory())


def operands(processor: LogicalProcessor) -> list[Operand]:
    """The memory operands of the instruction at RIP; none if its bytes are no instruction.

    Raises `InstructionAborted` if it cannot be fetched.
    """
    instruction = processor.fetch()
    if instruction is None:
        return []
    state = processor.state
    raw, alignment, accessed = _decoded(instruction.encoding, instruction.bits, state.rip, bounds.enabled(state))
    if (instruction.rep and raw.is_string_instruction) and not state.gpr[Gpr.RCX] & _count_mask(instruction):
        return []
    found = []
    for memory in accessed:
        reads, writes = memory.access in _READS, memory.access in _WRITES
        if not reads and not writes:
            continue
        values = [0, 0, 0]
        for i, register in enumerate((memory.segment, memory.base, memory.index)):
            if register != Register.NONE:
                values[i] = _register_value(state, register)
        offset = values[1] + values[2] * memory.scale + memory.displacement + _bit_string_offset(state, raw)
        offset &= _width(state, raw, memory)
        linear = (values[0] + offset) & (MASK64 if state.in_64_bit_mode else MASK32)
        size = MemorySizeExt.size(memory.memory_size) or MemorySizeExt.size(raw.memory_size) or _LARGEST_OPERAND
        segment = SEGMENT_REGISTERS.get(memory.segment, SegmentRegister.DS)
        stack = segment == SegmentRegister.SS
        found.append(Operand(linear, size, reads, writes, stack, segment, offset, alignment))
    return found


def _count_mask(instruction: Instruction) -> int:
    return (1 << 8 * instruction.address_size) - 1


def _width(state: CpuState, raw: IcedInstruction, memory: UsedMemory) -> int:
    """Mask of the address size; the stack has its own, whatever the code's."""
    if raw.is_stack_instruction and not state.in_64_bit_mode:
        pushes = raw.stack_pointer_increment < 0
        if raw.stack_pointer_increment == 0 or (memory.access == OpAccess.WRITE) == pushes:
            return MASK32 if state.ss.big else 0xFFFF
    return _WIDTHS.get(memory.address_size, MASK64)


def _bit_string_offset(state: CpuState, raw: IcedInstruction) -> int:
    """Bytes from the address of a bit string to what BT and its relatives access for the bit that a register says."""
    if raw.mnemonic not in _BIT_STRINGS or raw.op1_kind != OpKind.REGISTER or raw.op0_kind != OpKind.MEMORY:
        return 0
    bits = 8 * RegisterExt.size(raw.op1_register)
    number = _register_value(state, raw.op1_register)
    number -= (number >> bits - 1) << bits
    return number // bits * (bits // 8)


@frozen
class Access:
    """What an instruction does to a page: the first address in it, and how that is accessed.

    ``implicit`` marks a supervisor-mode access that no operand explains, to a descriptor table or the TSS; the address
    is then the page's own, because only the page is known. ``stack`` marks one through SS.
    """

    linear: int
    kind: AccessKind
    implicit: bool = False
    stack: bool = False


def exact_access(processor: LogicalProcessor, page: int, kind: AccessKind) -> Access:
    """The access of the instruction at RIP to linear ``page`` that the engine was refused as ``kind``.

    An operand that is read and written is accessed as for writing from the start, whatever the engine does first.
    Raises `InstructionAborted` if the instruction can no longer be fetched.
    """
    fallback = None
    for operand in operands(processor):
        last = operand.linear + operand.size - 1
        if operand.linear & ~PAGE_OFFSET_MASK <= page <= last & ~PAGE_OFFSET_MASK:
            exact = max(operand.linear, page)
            if operand.writes if kind is AccessKind.WRITE else operand.reads:
                return Access(exact, AccessKind.WRITE if operand.writes else kind, stack=operand.stack)
            fallback = Access(exact, kind, stack=operand.stack)
    return fallback or Access(page, kind, implicit=_holds_system_table(processor.state, page))


def _holds_system_table(state: CpuState, page: int) -> bool:
    tables = (
        (state.gdtr.base, state.gdtr.limit),
        (state.idtr.base, state.idtr.limit),
        (state.ldtr.base, state.ldtr.limit if state.ldtr.usable else -1),
        (state.tr.base, state.tr.limit if state.tr.usable else -1),
    )
    return any(limit >= 0 and base < page + PAGE_SIZE and base + limit >= page for base, limit in tables)
