"""The code an engine executes: where its bytes are, how many instructions they hold, and which must not run.

A few instructions neither trap in Unicorn nor call a hook before they have an effect, or are executed although the
processor modelled does not have them (those with a VEX prefix, as their SSE cousins). The engine therefore looks at
each block of code once, when it is first entered, and stops in front of a block that holds one of them.
"""

from __future__ import annotations

from typing import Final

from iced_x86 import Code, Decoder, EncodingKind, Instruction, Mnemonic, OpKind, Register

from vtx.addresses import PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE
from vtx.x86.decode import MAX_INSTRUCTION_LENGTH
from vtx.x86.execution import Place
from vtx.x86.memory import PhysicalMemory
from vtx.x86.state import MASK32, MASK64, Rflags

STOP: Final = 1 << 32
"""Added to the number of instructions of a block that holds one the engine must not execute."""

SWITCHES_TASKS: Final = 1
"""Added to the width of code (16, 32 or 64), its *kind*, where far CALL and JMP can switch tasks."""

_MOST_REMEMBERED: Final = 1 << 16

# For INS, Unicorn stores a zero to the destination before it asks for the value; for OUTS it loads the value before it
# asks whether the access is allowed. The returns do not look whether the target is canonical. Loads of SS lack a check
# of null selectors, and nothing tells their interrupt shadow from that of STI. UMONITOR and its like pass for MFENCE.
_DIFFERENT: Final = frozenset(
    (
        *(Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD, Mnemonic.OUTSB, Mnemonic.OUTSW, Mnemonic.OUTSD),
        *(Mnemonic.SYSRET, Mnemonic.SYSRETQ, Mnemonic.SYSEXIT, Mnemonic.SYSEXITQ),
        *(Mnemonic.LSS, Mnemonic.UMONITOR, Mnemonic.UMWAIT, Mnemonic.TPAUSE),
    )
)

_FAR: Final = frozenset(
    (
        *(Code.CALL_PTR1616, Code.CALL_PTR1632, Code.JMP_PTR1616, Code.JMP_PTR1632),
        *(Code.CALL_M1616, Code.CALL_M1632, Code.JMP_M1616, Code.JMP_M1632),
    )
)


def _must_not_run(instruction: Instruction, kind: int) -> bool:
    """Whether Unicorn would do something else than the processor, which has no AVX or anything encoded like it."""
    if instruction.encoding != EncodingKind.LEGACY or instruction.mnemonic in _DIFFERENT:
        return True
    if instruction.op0_register == Register.SS and instruction.mnemonic in (Mnemonic.MOV, Mnemonic.POP):
        return True
    return bool(kind & SWITCHES_TASKS) and instruction.code in _FAR


class CodeView:
    """Code by linear address, through the translations last granted for execution."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory
        self._frames: dict[int, int] = {}
        self._writable: set[int] = set()
        self._places: dict[tuple[int, int, int], Place] = {}
        self._facts: dict[tuple[int, int, int, int | bytes | None], int] = {}

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
        """Number of instructions in ``size`` bytes of code of ``kind``, plus `STOP` if one of them must not run."""
        page = linear >> PAGE_SHIFT
        version = self.read(linear, size) if page in self._writable else self._frames.get(page)
        key = (linear, size, kind, version)
        facts = self._facts.get(key)
        if facts is None:
            if len(self._facts) >= _MOST_REMEMBERED:
                self.changed()
            code = self.read(linear, size)
            stops = STOP if self._first_stop(linear, code, kind) is not None else 0
            facts = self._facts[key] = stops + sum(1 for _ in Decoder(kind & ~SWITCHES_TASKS, code))
        return facts

    def place(self, linear: int, left: int, kind: int, known: bool) -> Place:
        """The place of the instruction at ``linear``, ``left`` bytes before the end of the block it is in (0: unknown).

        A new one each time where the instruction may change unnoticed.
        """
        page, offset = linear >> PAGE_SHIFT, linear & PAGE_OFFSET_MASK
        frame = self._frames.get(page)
        if frame is None or page in self._writable or offset > _LAST_INSIDE:
            return Place(self.facts(linear, left, kind) & ~STOP if left else 0, known)
        key = frame << PAGE_SHIFT | offset, left, kind
        place = self._places.get(key)
        if place is None:
            if len(self._places) >= _MOST_REMEMBERED:
                self._places.clear()
            place = self._places[key] = Place(self.facts(linear, left, kind) & ~STOP if left else 0, known)
        return place

    @staticmethod
    def _first_stop(linear: int, code: bytes, kind: int) -> int | None:
        for instruction in Decoder(kind & ~SWITCHES_TASKS, code, ip=linear):
            if instruction.code == Code.INVALID:
                break  # what follows is not decoded as Unicorn decodes it
            if _must_not_run(instruction, kind):
                return instruction.ip
        return None

    def last_instruction(self, linear: int, size: int, kind: int) -> int | None:
        """Linear address of the last instruction in ``size`` bytes of code."""
        last = None
        for instruction in Decoder(kind & ~SWITCHES_TASKS, self.read(linear, size), ip=linear):
            last = instruction.ip
        return last

    def stop_address(self, linear: int, size: int, kind: int) -> int | None:
        """Address of the first instruction that must not run, in a block of which `facts` said `STOP`."""
        return self._first_stop(linear, self.read(linear, size), kind)


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
