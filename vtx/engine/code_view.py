"""The code an engine executes: where its bytes are, how many instructions they hold, and which must not run.

A few instructions neither trap in Unicorn nor call a hook before they have an effect, or are executed although the
processor modelled does not have them (those with a VEX prefix, as their SSE cousins). The engine therefore looks at
each block of code once, when it is first entered, and stops in front of a block that holds one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import frozen
from iced_x86 import Code, Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic, OpKind, Register, RegisterExt

from vtx.addresses import PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE
from vtx.engine.code_kind import BOUNDS, CONTROL_FLOW, FRED, INITIALIZES_BOUNDS, LIKE_8086, UNMASKED_SIMD, width
from vtx.engine.guards import Guard, GuardTable, guards_of
from vtx.engine.untranslatable import may_be_exit
from vtx.x86.decode import BOUNDS_CODES, MAX_INSTRUCTION_LENGTH
from vtx.x86.execution import OperandTrap, Place
from vtx.x86.instructions.simd import ARITHMETIC
from vtx.x86.memory import PhysicalMemory
from vtx.x86.near_branches import FAR_TRANSFERS, initializes_bounds, is_near_branch, is_watched_branch
from vtx.x86.state import MASK32, MASK64, Rflags

# Facts about a block: the number of instructions, and
COUNT: Final = (1 << 32) - 1
STOP: Final = 1 << 32
"""it holds an instruction that the engine must not execute, or not before it was looked at again,"""
GUARDED: Final = 1 << 33
"""operands must be checked before it runs,"""
GUARDS_SHIFT: Final = 40
"""the place of its guards."""

BOUNDARY: Final = 1 << 63
"""Added to a size to ask something else: whether an instruction begins so far behind the begin of the block."""

_MOST_REMEMBERED: Final = 1 << 16

_Key = tuple[int, int, int, int | bytes | None]

# For INS, Unicorn stores a zero to the destination before it asks for the value; for OUTS it loads the value before it
# asks whether the access is allowed. The returns do not look whether the target is canonical. Loads of SS lack a check
# of null selectors, and nothing tells their interrupt shadow from that of STI. UMONITOR and its like pass for MFENCE.
# Loads of MXCSR take reserved bits, stores of it lack the exceptions. INCSSP passes for LFENCE, CLRSSBSY for XSAVEOPT,
# ERETS and ERETU for CLAC.
_DIFFERENT: Final = frozenset(
    (
        *(Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD, Mnemonic.OUTSB, Mnemonic.OUTSW, Mnemonic.OUTSD),
        *(Mnemonic.SYSRET, Mnemonic.SYSRETQ, Mnemonic.SYSEXIT, Mnemonic.SYSEXITQ),
        *(Mnemonic.UMONITOR, Mnemonic.UMWAIT, Mnemonic.TPAUSE),
        *(Mnemonic.LDMXCSR, Mnemonic.FXRSTOR, Mnemonic.FXRSTOR64),
        *(Mnemonic.STMXCSR, Mnemonic.FXSAVE, Mnemonic.FXSAVE64),
        *(Mnemonic.INCSSPD, Mnemonic.INCSSPQ, Mnemonic.CLRSSBSY),
        *(Mnemonic.ERETS, Mnemonic.ERETU),
    )
)

_FAR_POINTERS: Final = frozenset((Mnemonic.LDS, Mnemonic.LES, Mnemonic.LFS, Mnemonic.LGS))

# What reads or changes the shadow stack or the tracker of indirect branches, near branches apart.
_SHADOW_STACK: Final = frozenset((Mnemonic.RDSSPD, Mnemonic.RDSSPQ))


def _must_not_run(instruction: Instruction, kind: int) -> bool:
    """Whether Unicorn would do something else than the processor, which has no AVX or anything encoded like it."""
    if instruction.encoding != EncodingKind.LEGACY or instruction.mnemonic in _DIFFERENT:
        return True
    if instruction.mnemonic == Mnemonic.INT and kind & LIKE_8086:
        return True  # Unicorn checks RFLAGS.IOPL by itself
    if _is_segment_load(instruction, kind):
        return True
    if kind & UNMASKED_SIMD and instruction.mnemonic in ARITHMETIC:
        return not instruction.is_string_instruction
    if kind & FRED and instruction.mnemonic == Mnemonic.SWAPGS:
        return True
    if kind & CONTROL_FLOW and (instruction.mnemonic in _SHADOW_STACK or is_watched_branch(instruction)):
        return True
    if kind & BOUNDS and instruction.code in BOUNDS_CODES:
        return True
    if kind & INITIALIZES_BOUNDS and initializes_bounds(instruction):
        return True
    # They may switch tasks, go to a non-canonical address, and change the kind of the code.
    return not kind & LIKE_8086 and instruction.code in FAR_TRANSFERS


def _is_segment_load(instruction: Instruction, kind: int) -> bool:
    """Whether the instruction loads SS, or another segment register with limits and rights that will be checked."""
    mnemonic, register = instruction.mnemonic, instruction.op0_register
    loads_all = width(kind) != 64 and not kind & LIKE_8086
    if mnemonic in (Mnemonic.MOV, Mnemonic.POP):
        return register == Register.SS or (loads_all and RegisterExt.is_segment_register(register))
    return mnemonic == Mnemonic.LSS or (loads_all and mnemonic in _FAR_POINTERS)


@frozen
class Stop:
    """The engine must stop before the instruction at linear ``address``; because it ``traps``, or to look again."""

    address: int
    traps: bool


@frozen
class StoppedBefore:
    """The engine stopped at ``block`` because of its ``instruction`` (linear addresses).

    It must not execute that at all if it ``traps``, else not before its operands were looked at again.
    """

    block: int
    instruction: int
    traps: bool


@frozen
class Block:
    """What there is to know about a block of code before it runs; ``guards`` are for what comes before ``stop``."""

    stop: Stop | None
    guards: list[Guard]

    @classmethod
    def of(cls, linear: int, code: bytes, kind: int, guarded: Callable[[int], bool]) -> Block:
        """Look at ``code`` at ``linear``; ``guarded`` are the instructions that are guarded by themselves."""
        instructions, stop = [], None
        for instruction in Decoder(width(kind), code, ip=linear):
            if instruction.code == Code.INVALID:
                # What follows is not decoded as Unicorn decodes it.
                if _is_locked_in_vain(code[instruction.ip - linear :], kind):
                    stop = Stop(instruction.ip, traps=True)
                break
            if _must_not_run(instruction, kind):
                stop = Stop(instruction.ip, traps=True)
                break
            instructions.append(instruction)
        guards, cut = guards_of(instructions, kind, guarded)
        return cls(stop if cut is None else Stop(cut, traps=False), guards)


def _is_locked_in_vain(code: bytes, kind: int) -> bool:
    """Whether an instruction is invalid only because of its LOCK prefix, which Unicorn mostly ignores."""
    instruction = Decoder(width(kind), code, DecoderOptions.NO_INVALID_CHECK).decode()
    return instruction.code != Code.INVALID and instruction.has_lock_prefix


class CodeView:
    """Code by linear address, through the translations last granted for execution."""

    def __init__(self, memory: PhysicalMemory, guards: GuardTable, forget: Callable[[], None]) -> None:
        self._memory = memory
        self._guards = guards
        self._forget = forget
        self._frames: dict[int, int] = {}
        self._writable: set[int] = set()
        self._guarded: set[tuple[int, int | None]] = set()
        self._places: dict[tuple[int, int, int], Place] = {}
        self._facts: dict[_Key, int] = {}
        self._stops: dict[_Key, Stop] = {}  # of the blocks whose facts have one

    def granted(self, page: int, frame: int, *, writable: bool) -> None:
        """Linear ``page`` is executed from ``frame`` from now on; ``writable`` if stores to it go unnoticed."""
        self._frames[page] = frame
        if writable:
            self._writable.add(page)
        else:
            self._writable.discard(page)

    def changed(self) -> None:
        """Code was modified: what is remembered about it is void."""
        self._facts.clear()
        self._stops.clear()
        self._places.clear()

    def frames(self, linear: int, size: int) -> set[int | None]:
        """The frames that hold the ``size`` bytes of code at ``linear``."""
        pages = range(linear >> PAGE_SHIFT, (linear + size - 1 >> PAGE_SHIFT) + 1)
        return {self._frames.get(page) for page in pages}

    def read(self, linear: int, size: int) -> bytes:
        """The ``size`` bytes of code at ``linear``; fewer where nothing was ever executed."""
        code = b""
        while len(code) < size:
            address = linear + len(code)
            frame = self._frames.get(address >> PAGE_SHIFT)
            if frame is None:
                break
            length = min(size - len(code), PAGE_SIZE - (address & PAGE_OFFSET_MASK))
            code += self._memory.read(frame << PAGE_SHIFT | address & PAGE_OFFSET_MASK, length)
        return code

    def facts(self, linear: int, size: int, kind: int) -> int:
        """The facts about ``size`` bytes of code of ``kind``."""
        key = self._key(linear, size, kind)
        facts = self._facts.get(key)
        if facts is None:
            if len(self._facts) >= _MOST_REMEMBERED:
                self.changed()
            facts = self._facts[key] = self._look(key, self.read(linear, size))
        return facts

    def _key(self, linear: int, size: int, kind: int) -> _Key:
        """What is remembered about a block is for these bytes: where they cannot change unnoticed, for the frame."""
        page = linear >> PAGE_SHIFT
        return linear, size, kind, self.read(linear, size) if page in self._writable else self._frames.get(page)

    def has_boundary(self, linear: int, size: int, kind: int) -> bool:
        """Whether an instruction of the code at ``linear`` begins ``size`` bytes behind it."""
        for instruction in Decoder(width(kind), self.read(linear, size + MAX_INSTRUCTION_LENGTH), ip=linear):
            if instruction.ip - linear >= size:
                return bool(instruction.ip - linear == size)
        return False

    def _look(self, key: _Key, code: bytes) -> int:
        linear, _, kind, _ = key
        count = sum(1 for _ in Decoder(width(kind), code))
        block = self._block(linear, code, kind)
        facts = count
        if block.stop is not None:
            facts |= STOP
            self._stops[key] = block.stop
        if not block.guards:
            return facts
        place = self._guards.add(block.guards)
        if place is None:
            self._forget()
            place = self._guards.add(block.guards)
            assert place is not None, "a block has fewer guards than there is room for"
        return facts | GUARDED | place << GUARDS_SHIFT

    def place(self, linear: int, left: int, kind: int, known: bool) -> Place:
        """The place of the instruction at ``linear``, ``left`` bytes before the end of the block it is in (0: unknown).

        A new one each time where the instruction may change unnoticed.
        """
        page, offset = linear >> PAGE_SHIFT, linear & PAGE_OFFSET_MASK
        frame = self._frames.get(page)
        if frame is None or page in self._writable or offset > _LAST_INSIDE:
            return Place(self.facts(linear, left, kind) & COUNT if left else 0, known)
        key = frame << PAGE_SHIFT | offset, left, kind
        place = self._places.get(key)
        if place is None:
            if len(self._places) >= _MOST_REMEMBERED:
                self._places.clear()
            place = self._places[key] = Place(self.facts(linear, left, kind) & COUNT if left else 0, known)
        return place

    def may_be_exit(self, linear: int, kind: int) -> bool:
        """Whether the instruction at ``linear`` is one that can be made to trap by itself."""
        return may_be_exit(Decoder(width(kind), self.read(linear, MAX_INSTRUCTION_LENGTH)).decode())

    def near_branch(self, linear: int, size: int, kind: int) -> int | None:
        """Linear address of the last instruction in ``size`` bytes of code if that is a near branch."""
        last = None
        for last in Decoder(width(kind), self.read(linear, size), ip=linear):  # noqa: B007
            pass
        return last.ip if last is not None and is_near_branch(last) else None

    def beyond_limit(self, linear: int, room: int, before: tuple[int, int], kind: int) -> OperandTrap | StoppedBefore:
        """Of the block at ``linear``, only ``room`` bytes are in the code segment: where to stop.

        ``before`` are linear address and size of the block before it.
        """
        if room <= 0:
            return OperandTrap(self.near_branch(*before, kind))
        for instruction in Decoder(width(kind), self.read(linear, room + MAX_INSTRUCTION_LENGTH), ip=linear):
            if instruction.ip != linear and (instruction.code == Code.INVALID or instruction.next_ip - linear > room):
                return StoppedBefore(linear, instruction.ip, False)
            if instruction.next_ip - linear > room:
                break
        return OperandTrap()

    def stop(self, linear: int, size: int, kind: int) -> Stop | None:
        """Where to stop in a block of which `facts` said `STOP`."""
        stop = self._stops.get(self._key(linear, size, kind))
        # The clock may have kept facts that were forgotten here to make room.
        return stop or self._block(linear, self.read(linear, size), kind).stop

    def _block(self, linear: int, code: bytes, kind: int) -> Block:
        frame = self._frames.get(linear >> PAGE_SHIFT)
        return Block.of(linear, code, kind, lambda address: (address, frame) in self._guarded)

    def guarded(self, block: int, address: int) -> None:
        """The instruction at linear ``address`` in ``block`` is guarded by itself from now on."""
        self._guarded.add((address, self._frames.get(block >> PAGE_SHIFT)))


_LAST_INSIDE: Final = PAGE_SIZE - MAX_INSTRUCTION_LENGTH
"""Last offset in a page from where every instruction ends in the page."""

_COUNT_MASKS: Final = {
    OpKind.MEMORY_SEG_SI: 0xFFFF,
    OpKind.MEMORY_ESDI: 0xFFFF,
    OpKind.MEMORY_SEG_ESI: MASK32,
    OpKind.MEMORY_ESEDI: MASK32,
    OpKind.MEMORY_SEG_RSI: MASK64,
    OpKind.MEMORY_ESRDI: MASK64,
}
_COMPARING: Final = {
    *(Mnemonic.CMPSB, Mnemonic.CMPSW, Mnemonic.CMPSD, Mnemonic.CMPSQ),
    *(Mnemonic.SCASB, Mnemonic.SCASW, Mnemonic.SCASD, Mnemonic.SCASQ),
}


def ends_with_another_pass(code: bytes, bits: int, count: int, flags: int) -> bool:
    """Whether the instruction is a repeated one that ended because its count is exhausted.

    In a run, Unicorn enters such an instruction once more to find that out. ``count`` is RCX and ``flags`` RFLAGS after
    the last iteration.
    """
    instruction = Decoder(bits, code).decode()
    if not instruction.is_string_instruction or not (instruction.has_rep_prefix or instruction.has_repne_prefix):
        return False
    masks = [_COUNT_MASKS[kind] for i in range(2) if (kind := instruction.op_kind(i)) in _COUNT_MASKS]
    if not masks or count & masks[0]:
        return False
    if instruction.mnemonic in _COMPARING:
        return bool(flags & Rflags.ZF) != instruction.has_repne_prefix
    return True
