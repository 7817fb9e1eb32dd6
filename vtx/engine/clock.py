"""Counting executed code, and stopping in time.

Virtual time is made of the bytes of code executed: the one measure that does not depend on how the engine cuts code
into blocks, because a block left half-way can be taken back to the byte. Each iteration of a repeated string
instruction counts, and so does the pass that finds the count exhausted. The callback runs at the start of every block;
compiled (`_blockclock`) it costs next to nothing, in Python about a microsecond, with the same results.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

from vtx.engine import guards, native
from vtx.engine.code_kind import BITS, SHORT_CODE, width
from vtx.engine.code_view import BOUNDARY, COUNT, GUARDED, GUARDS_SHIFT, STOP
from vtx.x86.state import MASK32, SegmentRegister

try:
    from vtx.engine import _blockclock  # type: ignore[attr-defined, unused-ignore]
except ImportError:
    _blockclock = None

UNLIMITED: Final = (1 << 64) - 1
_BLOCK_SLOTS: Final = 4096
_PAGE_SLOTS: Final = 1024
_RFLAGS_IF: Final = 0x200
_NO_BLOCK: Final = (1 << 64) - 1
_MOST_GUARDED: Final = 256  # the library looks through all of them each time it translates or calls one

# Where the words of the shared structure are that are used most, in `BlockClock.words`: four times as fast as by name.
ELAPSED, LIMIT, ADDRESS, SIZE, INSTRUCTIONS, INSTRUCTION_LIMIT, SINGLE, NATIVE, WATCH_IF, STOPPED, KIND = range(11)

STOPPED_BY_LIMIT: Final = 1
STOPPED_BY_IF: Final = 2
STOPPED_BY_BLOCK: Final = 3
STOPPED_BY_GUARD: Final = 4
STOPPED_BY_LIMIT_OF_CS: Final = 5

_ExamineCallback = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)


class _PageSlot(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("page", "code", "bytes"))


class _BlockSlot(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("address", "key", "code", "facts"))


class _Shared(ctypes.Structure):
    """``struct block_clock`` of _blockclock.c."""

    _fields_ = (
        ("elapsed", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("instructions", ctypes.c_uint64),
        ("instruction_limit", ctypes.c_uint64),
        ("single", ctypes.c_uint64),
        ("native", ctypes.c_uint64),
        ("watch_if", ctypes.c_uint64),
        ("stopped", ctypes.c_uint64),
        ("kind", ctypes.c_uint64),
        ("stop", ctypes.c_void_p),
        ("read_register", ctypes.c_void_p),
        ("flags_register", ctypes.c_uint64),
        ("examine", _ExamineCallback),
        ("guards", ctypes.c_void_p),
        ("segments", ctypes.c_void_p),
        ("failed", ctypes.c_uint64),
        ("left_address", ctypes.c_uint64),
        ("left_size", ctypes.c_uint64),
        ("rip_register", ctypes.c_uint64),
        ("registers", ctypes.c_uint64 * len(native.REG_GUARDED)),
        ("generation", ctypes.c_uint64),
        ("recent", ctypes.c_uint64),
        ("recent_facts", ctypes.c_uint64),
        ("pages", _PageSlot * _PAGE_SLOTS),
        ("blocks", _BlockSlot * _BLOCK_SLOTS),
    )


def _address_of(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class BlockClock:
    """The clock of one engine; installs itself as the engine's block hook.

    ``examine`` tells the facts about the code at (linear address, size), see `vtx.engine.code_view`; ``table`` holds
    the guards that facts refer to, ``segments`` is the address of the segment registers in the engine's saved state.
    ``shared`` is the structure both callbacks work on, ``words`` its 64-bit words. ``compiled`` says which one is
    installed.
    """

    def __init__(
        self,
        handle: ctypes.c_void_p,
        examine: Callable[[int, int], int],
        table: guards.GuardTable,
        segments: int,
        *,
        allow_compiled: bool = True,
    ) -> None:
        self._handle = handle
        self._table = table
        self._segments = (guards.SegmentRecord * 6).from_address(segments)
        self._examine = examine
        self.shared = _Shared(limit=UNLIMITED, instruction_limit=UNLIMITED, recent=_NO_BLOCK)
        self.words = memoryview(self.shared).cast("B").cast("Q")
        self.shared.stop = _address_of(native.library.uc_emu_stop)
        self.shared.read_register = _address_of(native.library.uc_reg_read)
        self.shared.flags_register, self.shared.rip_register = native.REG_EFLAGS, native.REG_RIP
        self.shared.examine = _ExamineCallback(examine)
        self.shared.guards, self.shared.segments = ctypes.addressof(table.records), segments
        self.shared.registers[:] = native.REG_GUARDED
        self.compiled = allow_compiled and _blockclock is not None
        self._flags, self._value = ctypes.c_uint64(), ctypes.c_uint64()
        self._guarded_instructions: set[int] = set()
        if self.compiled:
            if _blockclock.structure_size() != ctypes.sizeof(_Shared):
                raise native.EngineUnusable("the compiled block clock does not match this version; reinstall vtx")
            native.add_hook(
                handle, native.HOOK_BLOCK, _blockclock.callback_address(), data=ctypes.addressof(self.shared)
            )
        else:
            self._callback = native.BlockCallback(self._on_block)
            self._instruction_callback = native.BlockCallback(self._on_instruction)
            native.add_hook(handle, native.HOOK_BLOCK, self._callback)

    def address_of(self, word: str) -> int:
        """Where the word of this name of ``shared`` is."""
        offset: int = getattr(_Shared, word).offset
        return ctypes.addressof(self.shared) + offset

    def _on_block(self, handle: int, address: int, size: int, data: int) -> None:
        shared = self.shared
        address = self._linear(address)
        offset = address - shared.address
        inside = 0 <= offset < shared.size
        second = shared.single and shared.size and not inside
        restarts = inside and (shared.single or offset + size != shared.size)
        if restarts and self._examine(shared.address, offset | BOUNDARY):
            # A store changed the block it is in: the block was left at the store, which starts over. Code that jumps
            # into the middle of one of its instructions is another block.
            self.take_back(address, self._examine(address, shared.size - offset) & COUNT)
        if shared.kind & SHORT_CODE and not second and self._is_beyond(size):
            shared.left_address, shared.left_size = shared.address, shared.size
            shared.address, shared.size = address, 0
            self._stop_before(STOPPED_BY_LIMIT_OF_CS)
            return
        shared.address, shared.size = address, size
        facts = self._examine(address, size)
        shared.elapsed += size
        shared.instructions += facts & COUNT
        if second or shared.elapsed > shared.limit or shared.instructions > shared.instruction_limit:
            self._stop_before(STOPPED_BY_LIMIT)
        elif facts & STOP and not shared.native:
            self._stop_before(STOPPED_BY_BLOCK)
        elif facts & GUARDED and not shared.native and self._guards_fail(facts >> GUARDS_SHIFT):
            self._stop_before(STOPPED_BY_GUARD)
        elif shared.watch_if:
            native.library.uc_reg_read(self._handle, native.REG_EFLAGS, ctypes.byref(self._flags))
            if self._flags.value & _RFLAGS_IF:
                self._stop_before(STOPPED_BY_IF)

    def _is_beyond(self, size: int) -> bool:
        """Whether a block about to run leaves the code segment before it reaches the limits of the run."""
        shared = self.shared
        if shared.native or shared.instructions >= shared.instruction_limit or shared.elapsed + size > shared.limit:
            return False
        native.library.uc_reg_read(self._handle, native.REG_RIP, ctypes.byref(self._value))
        return bool((self._value.value & MASK32) + size - 1 > self._segments[SegmentRegister.CS].limit)

    def _linear(self, address: int) -> int:
        """Outside 64-bit mode the library adds CS base and EIP without wrapping."""
        return address if width(self.shared.kind) == 64 else address & MASK32

    def guard_instruction(self, address: int) -> bool:
        """Check the operands of the instruction at ``address``, as the library sees it, right before it executes.

        False if there are too many such instructions already.
        """
        if address in self._guarded_instructions:
            return True
        if len(self._guarded_instructions) == _MOST_GUARDED:
            return False
        self._guarded_instructions.add(address)
        if self.compiled:
            callback, data = _blockclock.instruction_callback_address(), ctypes.addressof(self.shared)
            native.add_hook(self._handle, native.HOOK_CODE, callback, data=data, at=address)
        else:
            native.add_hook(self._handle, native.HOOK_CODE, self._instruction_callback, at=address)
        return True

    def _on_instruction(self, handle: int, address: int, size: int, data: int) -> None:
        if self.shared.native or self.shared.stopped:
            return
        facts = self._examine(self._linear(address), size)
        if facts & GUARDED and self._guards_fail(facts >> GUARDS_SHIFT):
            self._stop_before(STOPPED_BY_GUARD)

    def _register(self, number: int) -> int:
        native.library.uc_reg_read(self._handle, native.REG_GUARDED[number], ctypes.byref(self._value))
        return self._value.value

    def _guards_fail(self, place: int) -> bool:
        while True:
            guard = self._table.records[place]
            if self._fails(guard):
                self.shared.failed = guard.instruction
                return True
            if guard.flags & guards.LAST:
                return False
            place += 1

    def _fails(self, guard: guards.GuardRecord) -> bool:
        if guard.flags & guards.ALWAYS:
            return True
        kind, segment = self.shared.kind, guard.segment
        offset = guard.displacement
        offset += self._register(guard.base) if guard.base >= 0 else 0
        offset += self._register(guard.index) << guard.shift if guard.index >= 0 else 0
        offset &= guard.mask
        if guard.flags & guards.LIMITED and guards.forbids(self._segments[segment], kind, guard, offset):
            return True
        if not guard.alignment:
            return False
        if width(kind) != 64:
            offset += self._segments[segment].base
        elif segment >= SegmentRegister.FS:
            offset += self._register(native.GPR_COUNT + segment - SegmentRegister.FS)
        return bool(offset & guard.alignment)

    def _stop_before(self, reason: int) -> None:
        self.shared.stopped = reason
        native.library.uc_emu_stop(self._handle)

    def set_counters(self, elapsed: int, instructions: int) -> None:
        """Go on counting from other values."""
        self.shared.elapsed, self.shared.instructions = elapsed, instructions

    def begin(self, limit: int, instruction_limit: int, *, single: bool, native: bool, watch_if: bool) -> None:
        """A run begins; no block has been entered yet.

        A ``single`` step is over before a second block; a ``native`` run executes whatever is in a block. No run has
        `UNLIMITED` instructions, so that more are no limit either.
        """
        words = self.words
        words[SINGLE], words[NATIVE], words[WATCH_IF] = single, native, watch_if
        words[LIMIT], words[INSTRUCTION_LIMIT] = limit, min(instruction_limit, UNLIMITED)
        words[STOPPED] = words[SIZE] = 0

    def code_granted(self, page: int, frame: int, content: int) -> None:
        """Linear ``page`` will be executed from ``frame``.

        ``content`` is the host address of the page if stores to it go unnoticed, else 0.
        """
        slot = self.shared.pages[page % _PAGE_SLOTS]
        slot.page, slot.code, slot.bytes = page, frame << BITS, content
        self.shared.recent = _NO_BLOCK

    def code_changed(self) -> None:
        """Translated code was dropped: the facts known about it are void."""
        self.shared.generation += 1
        self.shared.recent = _NO_BLOCK

    def take_back(self, address: int, instructions: int) -> None:
        """The current block was left at linear ``address``: the ``instructions`` from there on were not executed."""
        shared = self.shared
        left = self.remaining_block(address)
        shared.elapsed -= left
        shared.size -= left
        shared.instructions -= instructions

    def count_pass(self, size: int) -> None:
        """Count one more pass over an instruction of ``size`` bytes."""
        self.shared.elapsed += size
        self.shared.instructions += 1

    def remaining_block(self, address: int) -> int:
        """Bytes of the current block from linear ``address`` on; 0 if that is not in it."""
        size = self.words[SIZE]
        left = self.words[ADDRESS] + size - address
        if left > MASK32:
            left -= 1 << 32  # the block itself goes on behind 4 GiB
        return left if 0 < left <= size else 0
