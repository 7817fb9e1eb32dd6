"""The code an engine executes: where its bytes are, how many instructions they hold, and which must not run.

A few instructions neither trap in Unicorn nor call a hook before they have an effect. The engine therefore looks at
each block of code once, when it is first entered, and stops in front of a block that holds one of them.
"""

from __future__ import annotations

from typing import Final

from iced_x86 import Decoder, Mnemonic, OpKind

from vtx.addresses import PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE
from vtx.x86.memory import PhysicalMemory
from vtx.x86.state import MASK32, MASK64, Rflags

STOP: Final = 1 << 32
"""Added to the number of instructions of a block that holds one the engine must not execute."""

_MOST_REMEMBERED: Final = 1 << 16

# Unicorn stores a zero to the destination of INS before it asks for the value.
_MUST_NOT_RUN: Final = frozenset((Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD))


class CodeView:
    """Code by linear address, through the translations last granted for execution."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory
        self._frames: dict[int, int] = {}
        self._facts: dict[tuple[int, int, int, int | None], int] = {}
        self._stops: dict[tuple[int, int, int, int | None], int] = {}

    def granted(self, page: int, frame: int) -> bool:
        """Linear ``page`` is executed from ``frame`` from now on; whether that is a change."""
        changed = self._frames.get(page) != frame
        self._frames[page] = frame
        return changed

    def changed(self) -> None:
        """Code was modified: what is remembered about it is void."""
        self._facts.clear()
        self._stops.clear()

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

    def facts(self, linear: int, size: int, bits: int) -> int:
        """Number of instructions in ``size`` bytes of ``bits``-bit code, plus `STOP` if one of them must not run."""
        key = (linear, size, bits, self._frames.get(linear >> PAGE_SHIFT))
        facts = self._facts.get(key)
        if facts is None:
            if len(self._facts) >= _MOST_REMEMBERED:
                self.changed()
            facts = self._facts[key] = self._examine(key, self.read(linear, size))
        return facts

    def _examine(self, key: tuple[int, int, int, int | None], code: bytes) -> int:
        linear, _, bits, _ = key
        count, facts = 0, 0
        for instruction in Decoder(bits, code, ip=linear):
            if instruction.mnemonic in _MUST_NOT_RUN and not facts:
                facts = STOP
                self._stops[key] = instruction.ip
            count += 1
        return facts + count

    def stop_address(self, linear: int, size: int, bits: int) -> int:
        """Address of the first instruction that must not run, in a block of which `facts` said `STOP`."""
        return self._stops[linear, size, bits, self._frames.get(linear >> PAGE_SHIFT)]


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
