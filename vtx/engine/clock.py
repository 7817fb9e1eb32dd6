"""Counting executed code, and stopping in time.

Virtual time is made of the bytes of code executed: the one measure that does not depend on how the engine cuts code
into blocks, because a block left half-way can be taken back to the byte. The callback runs at the start of every
block; compiled (`_blockclock`) it costs next to nothing, in Python about a microsecond, with the same results.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from vtx.engine import native

try:
    from vtx.engine import _blockclock  # type: ignore[attr-defined, unused-ignore]
except ImportError:
    _blockclock = None

UNLIMITED: Final = (1 << 64) - 1
_CACHE_SLOTS: Final = 4096
_RFLAGS_IF: Final = 0x200

STOPPED_BY_LIMIT: Final = 1
STOPPED_BY_IF: Final = 2


class _CacheSlot(ctypes.Structure):
    _fields_ = (("address", ctypes.c_uint64), ("key", ctypes.c_uint64), ("instructions", ctypes.c_uint64))


class _Shared(ctypes.Structure):
    """``struct block_clock`` of _blockclock.c."""

    _fields_ = (
        ("elapsed", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("instructions", ctypes.c_uint64),
        ("instruction_limit", ctypes.c_uint64),
        ("watch_if", ctypes.c_uint64),
        ("stopped", ctypes.c_uint64),
        ("stop", ctypes.c_void_p),
        ("control", ctypes.c_void_p),
        ("read_register", ctypes.c_void_p),
        ("request_block", ctypes.c_uint64),
        ("flags_register", ctypes.c_uint64),
        ("generation", ctypes.c_uint64),
        ("cache", _CacheSlot * _CACHE_SLOTS),
    )


def _address_of(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class BlockClock:
    """The clock of one engine; installs itself as the engine's block hook.

    ``shared`` is the structure both callbacks work on. ``compiled`` says which one is installed.
    """

    def __init__(self, handle: ctypes.c_void_p, *, allow_compiled: bool = True) -> None:
        self.shared = _Shared(limit=UNLIMITED, instruction_limit=UNLIMITED)
        self.shared.stop = _address_of(native.library.uc_emu_stop)
        self.shared.control = _address_of(native.library.uc_ctl)
        self.shared.read_register = _address_of(native.library.uc_reg_read)
        self.shared.request_block = native.CTL_REQUEST_BLOCK & 0xFFFF_FFFF
        self.shared.flags_register = native.REG_EFLAGS
        self.compiled = allow_compiled and _blockclock is not None
        self._handle = handle
        self._icounts: dict[tuple[int, int, int], int] = {}
        self._block = native.TranslatedBlock()
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
        shared.address, shared.size = address, size
        shared.elapsed += size
        shared.instructions += self._count_instructions(address, size)
        if shared.elapsed > shared.limit or shared.instructions > shared.instruction_limit:
            shared.stopped = STOPPED_BY_LIMIT
            native.library.uc_emu_stop(self._handle)
        elif shared.watch_if:
            native.library.uc_reg_read(self._handle, native.REG_EFLAGS, ctypes.byref(self._flags))
            if self._flags.value & _RFLAGS_IF:
                shared.stopped = STOPPED_BY_IF
                native.library.uc_emu_stop(self._handle)

    def _count_instructions(self, address: int, size: int) -> int:
        key = (address, size, self.shared.generation)
        count = self._icounts.get(key)
        if count is None:
            code = ctypes.c_int(native.CTL_REQUEST_BLOCK & 0xFFFF_FFFF)
            native.library.uc_ctl(self._handle, code, ctypes.c_uint64(address), ctypes.byref(self._block))
            count = self._icounts[key] = self._block.icount
        return count

    def code_changed(self) -> None:
        """Translated code was dropped: instruction counts remembered for it are void."""
        self.shared.generation += 1
        self._icounts.clear()

    def take_back(self, address: int, instructions: int) -> None:
        """The current block was left at linear ``address``: the ``instructions`` from there on were not executed."""
        shared = self.shared
        left = self.remaining_block(address)
        shared.elapsed -= left
        shared.size -= left
        shared.instructions -= instructions

    def remaining_block(self, address: int) -> int:
        """Bytes of the current block from linear ``address`` on."""
        left = self.shared.address + self.shared.size - address
        return left if 0 < left <= self.shared.size else 0
