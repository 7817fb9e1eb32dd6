"""Guards: checks of memory operands that Unicorn leaves out, made once per block of code before the block runs.

Unicorn looks neither at segment limits and rights nor at alignment. Where one of them can matter, each memory operand
of a block is expressed through the registers as they are at its entry, which works for what compilers make of stack
frames and arrays; the block clock computes the addresses and stops before a block one of whose operands fails. An
instruction whose operand depends on something its own block loads is guarded by itself, right before it executes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Final

from attrs import define, field, frozen
from iced_x86 import (
    Code,
    Instruction,
    InstructionInfoFactory,
    MemorySizeExt,
    Mnemonic,
    OpAccess,
    OpKind,
    Register,
    RegisterExt,
    UsedMemory,
)

from vtx.engine.code_kind import CHECKS_ALIGNMENT, LIKE_8086, SHORT_SEGMENTS, SMALL_STACK, is_limited, width
from vtx.x86.alignment import checked_alignment, required_alignment
from vtx.x86.decode import SEGMENT_REGISTERS
from vtx.x86.instructions.near import CONDITIONAL
from vtx.x86.instructions.simd import ARITHMETIC
from vtx.x86.instructions.table import HANDLERS
from vtx.x86.state import MASK32, MASK64, SegmentRegister

CAPACITY: Final = 1 << 14

WRITES: Final = 1 << 0
LIMITED: Final = 1 << 1
ALWAYS: Final = 1 << 2
LAST: Final = 1 << 3

# Of the second doubleword of a descriptor, as which Unicorn keeps access rights.
_WRITABLE_OR_READABLE: Final = 1 << 9
_EXPAND_DOWN: Final = 1 << 10
_CODE: Final = 1 << 11
_PRESENT: Final = 1 << 15
_BIG: Final = 1 << 22

NO_REGISTER: Final = -1
_RSP: Final = 4
_RBP: Final = 5
_LARGEST: Final = 512
_ACCESSES: Final = frozenset(
    (
        *(OpAccess.READ, OpAccess.COND_READ, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE),
        *(OpAccess.WRITE, OpAccess.COND_WRITE),
    )
)
_READ_ONLY: Final = frozenset((OpAccess.READ, OpAccess.COND_READ))
_REGISTER_WRITES: Final = frozenset(
    (OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE)
)
_BIT_STRINGS: Final = frozenset((Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC))
# They come to the model, which checks their operands in the right order; what is behind them is in another block.
_TRAPPING: Final = frozenset(HANDLERS) - {
    *(Mnemonic.MOV, Mnemonic.POP, Mnemonic.CALL, Mnemonic.JMP, Mnemonic.RET, Mnemonic.RETF),
    *(Mnemonic.RESERVEDNOP, *CONDITIONAL),
    *(Mnemonic.IN, Mnemonic.OUT, Mnemonic.LDS, Mnemonic.LES, Mnemonic.LFS, Mnemonic.LGS),
    *(Mnemonic.CLI, Mnemonic.STI, Mnemonic.POPF, Mnemonic.POPFD, Mnemonic.POPFQ, Mnemonic.SWAPGS),
    *ARITHMETIC,
} | {
    *(Mnemonic.VMXON, Mnemonic.VMCLEAR, Mnemonic.VMPTRLD, Mnemonic.VMPTRST, Mnemonic.VMREAD, Mnemonic.VMWRITE),
    *(Mnemonic.INVEPT, Mnemonic.INVVPID, Mnemonic.VMCALL, Mnemonic.VMLAUNCH, Mnemonic.VMRESUME, Mnemonic.VMXOFF),
    *(Mnemonic.VMFUNC, Mnemonic.VMRUN, Mnemonic.VMLOAD, Mnemonic.VMSAVE, Mnemonic.VMMCALL, Mnemonic.STGI),
    *(Mnemonic.CLGI, Mnemonic.SKINIT, Mnemonic.INVLPGA),
}
_ADDRESS_WIDTHS: Final = {1: 16, 2: 32, 3: 64}  # by iced's code size
_FACTORY: Final = InstructionInfoFactory()


class GuardRecord(ctypes.Structure):
    """``struct guard`` of _blockclock.c: one operand, ``displacement + base + (index << shift)``, cut to ``mask``."""

    _fields_ = (
        ("instruction", ctypes.c_uint64),
        ("displacement", ctypes.c_uint64),
        ("mask", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("alignment", ctypes.c_uint32),
        ("segment", ctypes.c_int8),
        ("base", ctypes.c_int8),
        ("index", ctypes.c_int8),
        ("shift", ctypes.c_int8),
        ("flags", ctypes.c_uint32),
    )


class SegmentRecord(ctypes.Structure):
    """``struct segment`` of _blockclock.c: a segment register as Unicorn keeps it."""

    _fields_ = (
        ("selector", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


def forbids(segment: SegmentRecord, kind: int, guard: GuardRecord, offset: int) -> bool:
    """Whether ``segment`` forbids the access of ``guard`` at ``offset``."""
    first, last, flags = 0, segment.limit, segment.flags
    if not kind & LIKE_8086:
        code, allowed = flags & _CODE, flags & _WRITABLE_OR_READABLE
        if not flags & _PRESENT or (code or not allowed if guard.flags & WRITES else code and not allowed):
            return True
        if not code and flags & _EXPAND_DOWN:
            first, last = last + 1, MASK32 if flags & _BIG else 0xFFFF
    return not first <= offset <= last - guard.size + 1


@frozen
class _Value:
    """A register's value: that of ``register`` at the entry plus ``distance``, in the low ``width`` bits at least."""

    register: int
    distance: int
    width: int


@frozen
class Guard:
    """One operand to check; ``flags`` as in `GuardRecord`, without `LAST`. ``alignment`` is a mask."""

    instruction: int
    segment: int
    base: int
    index: int
    shift: int
    displacement: int
    mask: int
    size: int
    alignment: int
    flags: int


@define(slots=True)
class _Block:
    """The registers while the instructions of a block are looked at one after the other."""

    kind: int
    values: dict[int, _Value | None] = field(factory=lambda: {n: _Value(n, 0, 64) for n in range(16)})
    changed_segments: set[int] = field(factory=set)

    def guards(self, instruction: Instruction) -> list[Guard] | None:
        """Guards of the next instruction; None if an operand depends on what the block has loaded."""
        required = required_alignment(instruction)
        checks = self.kind & CHECKS_ALIGNMENT
        if required == 1 and not checks and self.kind >> 8 == 0:
            return []
        found = []
        for memory in _FACTORY.info(instruction).used_memory():
            if memory.access not in _ACCESSES:
                continue
            segment = int(SEGMENT_REGISTERS.get(memory.segment, SegmentRegister.DS))
            size = _size(instruction, memory)
            alignment = max(required, checked_alignment(size)) if checks else required
            limited = is_limited(self.kind, segment) and not self._always_inside(memory, size)
            if alignment == 1 and not limited:
                continue
            guard = self._guard(instruction, memory, segment, size, alignment - 1, limited)
            if guard is None:
                return None
            found.append(guard)
        return found

    def _always_inside(self, memory: UsedMemory, size: int) -> bool:
        """Whether no 16-bit offset can be outside a segment of 64 KiB."""
        whole = self.kind & (LIKE_8086 | SHORT_SEGMENTS) == LIKE_8086
        return whole and size == 1 and _ADDRESS_WIDTHS[memory.address_size] == 16

    def _guard(
        self, instruction: Instruction, memory: UsedMemory, segment: int, size: int, alignment: int, limited: bool
    ) -> Guard | None:
        bits = _ADDRESS_WIDTHS[memory.address_size]
        on_stack = memory.segment == Register.SS and instruction.is_stack_instruction and width(self.kind) != 64
        if on_stack and (bits == 16) != bool(self.kind & SMALL_STACK):
            return self._unknown(instruction)
        if instruction.mnemonic in _BIT_STRINGS and instruction.op1_kind == OpKind.REGISTER:
            return self._unknown(instruction)
        if segment in self.changed_segments and (alignment or not self.kind & LIKE_8086):
            return None
        displacement, registers = memory.displacement, [NO_REGISTER, NO_REGISTER]
        for i, (register, factor) in enumerate(((memory.base, 1), (memory.index, memory.scale))):
            if register == Register.NONE:
                continue
            if RegisterExt.size(register) * 8 != bits:
                return self._unknown(instruction)
            value = self.values[RegisterExt.number(register)]
            if value is None or value.width < bits:
                return None
            registers[i] = value.register
            displacement += value.distance * factor
        flags = (0 if memory.access in _READ_ONLY else WRITES) | (LIMITED if limited else 0)
        return Guard(
            instruction.ip,
            segment,
            registers[0],
            registers[1],
            memory.scale.bit_length() - 1,
            displacement & MASK64,
            (1 << bits) - 1,
            size,
            alignment,
            flags,
        )

    @staticmethod
    def _unknown(instruction: Instruction) -> Guard:
        """An operand that cannot be expressed even at the entry: always left to the model."""
        return Guard(instruction.ip, 0, NO_REGISTER, NO_REGISTER, 0, 0, 0, 0, 0, ALWAYS)

    def execute(self, instruction: Instruction) -> None:
        """Follow what ``instruction`` does to the registers."""
        moved = self._moved(instruction)
        leaves = instruction.mnemonic == Mnemonic.LEAVE
        stack = self.values[_RBP if leaves else _RSP]
        increment = instruction.stack_pointer_increment if instruction.is_stack_instruction else 0
        if leaves:
            increment = _OPERAND_SIZES.get(instruction.code, 0)
        for used in _FACTORY.info(instruction).used_registers():
            if used.access not in _REGISTER_WRITES:
                continue
            if RegisterExt.is_gpr(used.register):
                self.values[RegisterExt.number(RegisterExt.full_register(used.register))] = None
            elif used.register in SEGMENT_REGISTERS:
                self.changed_segments.add(SEGMENT_REGISTERS[used.register])
        if instruction.mnemonic == Mnemonic.SWAPGS:
            self.changed_segments.add(SegmentRegister.GS)
        if moved is not None:
            self.values[RegisterExt.number(instruction.op0_register)] = moved
        elif increment and stack is not None and RegisterExt.full_register(instruction.op0_register) != Register.RSP:
            bits = 64 if width(self.kind) == 64 else 16 if self.kind & SMALL_STACK else 32
            self.values[_RSP] = _Value(stack.register, stack.distance + increment, min(stack.width, bits))

    def _moved(self, instruction: Instruction) -> _Value | None:
        """The new value of a destination register that is another register, or itself, at a known distance."""
        target = instruction.op0_register
        if instruction.op0_kind != OpKind.REGISTER or not RegisterExt.is_gpr(target) or RegisterExt.size(target) == 1:
            return None
        mnemonic, bits = instruction.mnemonic, 8 * RegisterExt.size(target)
        source, distance = target, 0
        if mnemonic == Mnemonic.MOV and RegisterExt.is_gpr(instruction.op1_register):
            source = instruction.op1_register
        elif mnemonic in (Mnemonic.INC, Mnemonic.DEC):
            distance = 1 if mnemonic == Mnemonic.INC else -1
        elif mnemonic in (Mnemonic.ADD, Mnemonic.SUB) and instruction.op1_kind in _IMMEDIATES:
            distance = instruction.immediate(1) if mnemonic == Mnemonic.ADD else -instruction.immediate(1)
        elif mnemonic == Mnemonic.LEA and instruction.memory_index == Register.NONE:
            source, distance = instruction.memory_base, instruction.memory_displacement
            if source in (Register.NONE, Register.RIP, Register.EIP):
                return None
            bits = min(bits, 8 * RegisterExt.size(source))
        else:
            return None
        value = self.values[RegisterExt.number(source)]
        return None if value is None else _Value(value.register, value.distance + distance, min(value.width, bits))


_IMMEDIATES: Final = frozenset(
    (
        *(OpKind.IMMEDIATE8, OpKind.IMMEDIATE16, OpKind.IMMEDIATE32, OpKind.IMMEDIATE8TO16, OpKind.IMMEDIATE8TO32),
        *(OpKind.IMMEDIATE8TO64, OpKind.IMMEDIATE32TO64),
    )
)


_OPERAND_SIZES: Final = {Code.LEAVEW: 2, Code.LEAVED: 4, Code.LEAVEQ: 8}


def _size(instruction: Instruction, memory: UsedMemory) -> int:
    """Size in bytes; that of one element for a repeated string instruction."""
    return MemorySizeExt.size(memory.memory_size) or MemorySizeExt.size(instruction.memory_size) or _LARGEST


def _moves_system_register(instruction: Instruction) -> bool:
    return instruction.mnemonic == Mnemonic.MOV and any(
        RegisterExt.is_cr(register) or RegisterExt.is_dr(register)
        for register in (instruction.op0_register, instruction.op1_register)
    )


def guards_of(
    instructions: Iterable[Instruction], kind: int, guarded: Callable[[int], bool]
) -> tuple[list[Guard], int | None]:
    """Guards of a block of code, and the address of the first instruction that must be guarded by itself, if any.

    ``guarded`` says whether the instruction at an address is guarded by itself already.
    """
    block = _Block(kind)
    guards: list[Guard] = []
    for number, instruction in enumerate(instructions):
        if instruction.mnemonic in _TRAPPING or _moves_system_register(instruction):
            break
        wanted = block.guards(instruction)
        if wanted is None:
            if not number:
                wanted = [_Block._unknown(instruction)]
            elif guarded(instruction.ip):
                wanted = []
            else:
                return guards, instruction.ip
        guards += wanted
        block.execute(instruction)
    return guards, None


class GuardTable:
    """The guards of all blocks looked at, one after the other, in memory that the compiled block clock reads."""

    def __init__(self) -> None:
        self.records = (GuardRecord * CAPACITY)()
        self._used = 0

    def add(self, guards: list[Guard]) -> int | None:
        """Append the guards of a block; their place, or None if there is no room for them."""
        place = self._used
        if place + len(guards) > CAPACITY:
            return None
        for guard in guards:
            self.records[self._used] = GuardRecord(
                guard.instruction,
                guard.displacement,
                guard.mask,
                guard.size,
                guard.alignment,
                guard.segment,
                guard.base,
                guard.index,
                guard.shift,
                guard.flags,
            )
            self._used += 1
        self.records[self._used - 1].flags |= LAST
        return place

    def clear(self) -> None:
        """Forget all guards; nothing may refer to them any more."""
        self._used = 0
