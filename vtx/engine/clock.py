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

from vtx.engine import native
from vtx.engine.code_view import STOP

try:
    from vtx.engine import _blockclock  # type: ignore[attr-defined, unused-ignore]
except ImportError:
    _blockclock = None

UNLIMITED: Final = (1 << 64) - 1
_BLOCK_SLOTS: Final = 4096
_PAGE_SLOTS: Final = 1024
_RFLAGS_IF: Final = 0x200
_NO_BLOCK: Final = (1 << 64) - 1

# Where the words of the shared structure are that are used most, in `BlockClock.words`: four times as fast as by name.
ELAPSED, LIMIT, ADDRESS, SIZE, INSTRUCTIONS, INSTRUCTION_LIMIT, SINGLE, NATIVE, WATCH_IF, STOPPED = range(10)

STOPPED_BY_LIMIT: Final = 1
STOPPED_BY_IF: Final = 2
STOPPED_BY_BLOCK: Final = 3

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
        ("stop", ctypes.c_void_p),
        ("read_register", ctypes.c_void_p),
        ("flags_register", ctypes.c_uint64),
        ("examine", _ExamineCallback),
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

    ``examine`` tells the facts about the code at (linear address, size), see `vtx.engine.code_view`. ``shared`` is the
    structure both callbacks work on, ``words`` its 64-bit words. ``compiled`` says which one is installed.
    """

    def __init__(
        self, handle: ctypes.c_void_p, examine: Callable[[int, int], int], *, allow_compiled: bool = True
    ) -> None:
        self._handle = handle
        self._examine = examine
        self.shared = _Shared(limit=UNLIMITED, instruction_limit=UNLIMITED, recent=_NO_BLOCK)
        self.words = memoryview(self.shared).cast("B").cast("Q")
        self.shared.stop = _address_of(native.library.uc_emu_stop)
        self.shared.read_register = _address_of(native.library.uc_reg_read)
        self.shared.flags_register = native.REG_EFLAGS
        self.shared.examine = _ExamineCallback(examine)
        self.compiled = allow_compiled and _blockclock is not None
        self._flags = ctypes.c_uint64()
        if self.compiled:
            if _blockclock.structure_size() != ctypes.sizeof(_Shared):
                raise native.EngineUnusable("the compiled block clock does not match this version; reinstall vtx")
            native.add_hook(
                handle, native.HOOK_BLOCK, _blockclock.callback_address(), data=ctypes.addressof(self.shared)
            )
        else:
            self._callback = native.BlockCallback(self._on_block)
            native.add_hook(handle, native.HOOK_BLOCK, self._callback)

    def _on_block(self, handle: int, address: int, size: int, data: int) -> None:
        shared = self.shared
        offset = address - shared.address
        inside = 0 <= offset < shared.size
        second = shared.single and shared.size and not inside
        if inside and (shared.single or offset + size != shared.size):
            # A store changed the block it is in: the block was left at the store, which starts over.
            self.take_back(address, self._examine(address, shared.size - offset) & ~STOP)
        shared.address, shared.size = address, size
        facts = self._examine(address, size)
        shared.elapsed += size
        shared.instructions += facts & ~STOP
        if second or shared.elapsed > shared.limit or shared.instructions > shared.instruction_limit:
            self._stop_before(STOPPED_BY_LIMIT)
        elif facts & STOP and not shared.native:
            self._stop_before(STOPPED_BY_BLOCK)
        elif shared.watch_if:
            native.library.uc_reg_read(self._handle, native.REG_EFLAGS, ctypes.byref(self._flags))
            if self._flags.value & _RFLAGS_IF:
                self._stop_before(STOPPED_BY_IF)

    def _stop_before(self, reason: int) -> None:
        self.shared.stopped = reason
        native.library.uc_emu_stop(self._handle)

    def set_counters(self, elapsed: int, instructions: int) -> None:
        """Go on counting from other values."""
        self.shared.elapsed, self.shared.instructions = elapsed, instructions

    def begin(self, limit: int, instruction_limit: int, *, single: bool, native: bool, watch_if: bool) -> None:
        """A run begins; no block has been entered yet.

        A ``single`` step is over before a second block; a ``native`` run executes whatever is in a block.
        """
        words = self.words
        words[SINGLE], words[NATIVE], words[WATCH_IF] = single, native, watch_if
        words[LIMIT], words[INSTRUCTION_LIMIT] = limit, instruction_limit
        words[STOPPED] = words[SIZE] = 0

    def code_granted(self, page: int, frame: int, kind: int, content: int) -> None:
        """Linear ``page`` will be executed from ``frame``, as code of ``kind``.

        ``content`` is the host address of the page if stores to it go unnoticed, else 0.
        """
        slot = self.shared.pages[page % _PAGE_SLOTS]
        slot.page, slot.code, slot.bytes = page, frame << 8 | kind, content
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
        """Bytes of the current block from linear ``address`` on."""
        left = self.shared.address + self.shared.size - address
        return left if 0 < left <= self.shared.size else 0
