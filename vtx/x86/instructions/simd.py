"""SSE arithmetic while MXCSR unmasks a SIMD floating-point exception: #XM, before the instruction has any effect.

The engine gives masked responses only. It stops before such an instruction as long as an exception is unmasked, and
what the masked response met tells whether it stands. Denormal operands, which the engine does not report, are looked
for here, and so are comparisons whose predicate has reserved bits set, which are an invalid opcode to it.

Interpretations. The reserved bits of the predicate of a comparison are ignored.

Spec: SDM Vol. 1, "SIMD Floating-Point Exception Conditions", "MXCSR Control and Status Register"; Vol. 3,
"Interrupt 19—SIMD Floating-Point Exception (#XM)".
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from attrs import frozen
from iced_x86 import Decoder, MemorySize, MemorySizeExt, Mnemonic, OpKind, RegisterExt
from iced_x86 import Instruction as IcedInstruction

from vtx.x86 import access
from vtx.x86.decode import Instruction
from vtx.x86.instructions.common import operand_address, read_linear
from vtx.x86.instructions.sse_control import MXCSR, XMM, require_sse
from vtx.x86.operand_checks import operand_fault
from vtx.x86.outcome import Fault, InstructionAborted, Vector, ud
from vtx.x86.state import Cr4

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_BEFORE_COMPUTATION: Final = 0b0000111
"""Invalid operation, denormal, divide-by-zero: the others are not looked at if one of them is not masked."""

_INVALID: Final = 1 << 0
_DENORMAL: Final = 1 << 1
_ALL: Final = 0x3F
_MASKS_SHIFT: Final = 7
_DENORMALS_ARE_ZEROS: Final = 1 << 6
_OSXMMEXCPT: Final = int(Cr4.OSXMMEXCPT)


def _mnemonics(operations: str, kinds: str) -> frozenset[int]:
    return frozenset(getattr(Mnemonic, operation + kind) for operation in operations.split() for kind in kinds.split())


_DIVISIONS: Final = _mnemonics("DIV", "PS PD SS SD")
_ROOTS: Final = _mnemonics("SQRT", "PS PD SS SD")
_OF_TWO_OPERANDS: Final = (
    _mnemonics("ADD SUB MUL DIV MIN MAX CMP", "PS PD SS SD")
    | _mnemonics("ADDSUB HADD HSUB DP", "PS PD")
    | _mnemonics("COMI UCOMI", "SS SD")
)
_MEETS_DENORMALS: Final = _OF_TWO_OPERANDS | _ROOTS | _mnemonics("CVT", "SS2SD SD2SS PS2PD PD2PS")
_CONVERSIONS: Final = _mnemonics("CVT", "DQ2PS PI2PS SI2SS SI2SD PD2DQ PD2PI PS2DQ PS2PI SD2SI SS2SI")
_TRUNCATIONS: Final = _mnemonics("CVTT", "PD2DQ PD2PI PS2DQ PS2PI SD2SI SS2SI")

ARITHMETIC: Final = _MEETS_DENORMALS | _CONVERSIONS | _TRUNCATIONS | _mnemonics("ROUND", "PS PD SS SD")
"""What can raise a SIMD floating-point exception. The mnemonic CMPSD is also that of a string instruction."""

_COMPARISONS: Final = _mnemonics("CMP", "PS PD SS SD")
_PREDICATE: Final = 7
"""The bits of a comparison's immediate operand that are not reserved: a relation, and whether it is negated."""

_OF_ORDER: Final = (1, 2)
_RELATIONS: Final[tuple[Callable[[float, float], bool], ...]] = (
    operator.eq,
    operator.lt,
    operator.le,
    lambda one, other: math.isnan(one) or math.isnan(other),
)


@frozen
class _Format:
    """A floating-point format, by the masks of its fields."""

    size: int
    exponent: int
    fraction: int

    def is_nan(self, value: int) -> bool:
        return value & self.exponent == self.exponent and bool(value & self.fraction)

    def is_signaling_nan(self, value: int) -> bool:
        return self.is_nan(value) and not value & (self.fraction + 1) >> 1

    def is_denormal(self, value: int) -> bool:
        return not value & self.exponent and bool(value & self.fraction)

    def is_zero(self, value: int) -> bool:
        return not value & (self.exponent | self.fraction)

    def is_negative(self, value: int) -> bool:
        return bool(value >> 8 * self.size - 1)

    def number(self, value: int) -> float:
        number: float = struct.unpack("<f" if self.size == 4 else "<d", value.to_bytes(self.size, "little"))[0]
        return number


_FORMATS: Final = {
    MemorySize.FLOAT32: _Format(4, 0x7F80_0000, 0x007F_FFFF),
    MemorySize.FLOAT64: _Format(8, 0x7FF0_0000_0000_0000, 0x000F_FFFF_FFFF_FFFF),
}


def _mxcsr(area: bytearray) -> int:
    return int.from_bytes(area[MXCSR], "little")


def arithmetic(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """An instruction of `ARITHMETIC`."""
    state, engine = cpu.state, cpu.engine
    area = bytearray(engine.legacy_area())
    mxcsr = _mxcsr(area)
    masks = mxcsr >> _MASKS_SHIFT & _ALL
    by_model = _has_reserved_predicate(instruction)
    if masks == _ALL and not by_model:
        raise ud()  # the engine stopped because it does not have the instruction
    require_sse(cpu)
    fault = operand_fault(state, access.operands(cpu))
    if fault is not None:
        raise InstructionAborted(fault)
    denormal = not mxcsr & _DENORMALS_ARE_ZEROS and _meets_denormal(cpu, instruction, area)
    before = list(state.gpr), state.rip, state.rflags, state.shadow, state.pending_debug
    if by_model:
        result, met = _compare(cpu, instruction, area)
    else:
        cpu.native(instruction)
        met = engine.simd_exceptions()
    met |= _DENORMAL if denormal else 0
    unmasked = met & ~masks
    if unmasked:
        if unmasked & _BEFORE_COMPUTATION:
            met &= _BEFORE_COMPUTATION
        state.gpr[:], state.rip, state.rflags, state.shadow, state.pending_debug = before
    elif by_model:
        area = result
        cpu.retire(instruction)
    elif denormal:
        area[:] = engine.legacy_area()
    else:
        return
    area[MXCSR] = (mxcsr | met).to_bytes(4, "little")
    engine.set_legacy_area(bytes(area))
    if unmasked:
        raise InstructionAborted(Fault(Vector.XM)) if state.cr4 & _OSXMMEXCPT else ud()


def _has_reserved_predicate(instruction: Instruction) -> bool:
    return instruction.mnemonic in _COMPARISONS and instruction.immediate > _PREDICATE


def _compare(cpu: LogicalProcessor, instruction: Instruction, area: bytearray) -> tuple[bytearray, int]:
    """The registers after a comparison in `_COMPARISONS`, and the exceptions it meets but for denormal operands."""
    raw = Decoder(instruction.bits, instruction.encoding).decode()
    form, result, met = _FORMATS[MemorySizeExt.element_type(raw.memory_size)], bytearray(area), 0
    relation, negated = instruction.immediate & 3, instruction.immediate >> 2 & 1
    start = XMM + 16 * RegisterExt.number(raw.op0_register)
    for number, (source, destination) in enumerate(_elements(cpu, instruction, raw, form, area)):
        if any(map(form.is_nan if relation in _OF_ORDER else form.is_signaling_nan, (source, destination))):
            met |= _INVALID
        flush = bool(_mxcsr(area) & _DENORMALS_ARE_ZEROS)
        one, other = (0 if flush and form.is_denormal(value) else value for value in (destination, source))
        holds = _RELATIONS[relation](form.number(one), form.number(other))
        place = start + form.size * number
        result[place : place + form.size] = (b"\0", b"\xff")[holds ^ negated] * form.size
    return result, met


def _meets_denormal(cpu: LogicalProcessor, instruction: Instruction, area: bytearray) -> bool:
    """Whether an operand is denormal, and nothing that has priority over that is the case for its element."""
    if instruction.mnemonic not in _MEETS_DENORMALS:
        return False
    raw = Decoder(instruction.bits, instruction.encoding).decode()
    form = _FORMATS[MemorySizeExt.element_type(raw.memory_size)]
    for values in _elements(cpu, instruction, raw, form, area):
        denormal = any(form.is_denormal(value) for value in values)
        by_zero = instruction.mnemonic in _DIVISIONS and form.is_zero(values[0])
        root = instruction.mnemonic in _ROOTS and form.is_negative(values[0])
        if denormal and not (by_zero or root or any(form.is_nan(value) for value in values)):
            return True
    return False


def _elements(
    cpu: LogicalProcessor, instruction: Instruction, raw: IcedInstruction, form: _Format, area: bytearray
) -> Iterator[tuple[int, ...]]:
    """For each element the value of the source, and that of the destination if it is an operand, too."""

    def of_register(register: int, number: int) -> int:
        start = XMM + 16 * register + form.size * number
        return int.from_bytes(area[start : start + form.size], "little")

    count = MemorySizeExt.element_count(raw.memory_size)
    in_memory = raw.op1_kind != OpKind.REGISTER
    linear = operand_address(cpu, instruction, form.size * count) if in_memory else 0
    for number in range(count):
        if in_memory:
            source = read_linear(cpu, linear + form.size * number, form.size)
        else:
            source = of_register(RegisterExt.number(raw.op1_register), number)
        if instruction.mnemonic in _OF_TWO_OPERANDS:
            yield source, of_register(RegisterExt.number(raw.op0_register), number)
        else:
            yield (source,)


HANDLERS: Final = dict.fromkeys(ARITHMETIC, arithmetic)
