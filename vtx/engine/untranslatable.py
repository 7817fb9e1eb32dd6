"""Exits: addresses at which the library stops before it looks at the instruction there, as if that were a HLT.

Some are for code that it cannot translate, which would end the process: LOCK with BT, BTS, BTR or BTC of a register is
an invalid opcode; Unicorn makes an access to memory of it, through an address that was never computed, and aborts.
Where such an instruction may begin there is an exit, so that it traps before it is looked at.

Others are `added` for branches that the model executes while control-flow enforcement or Intel MPX watches them, and
for the instructions of Intel MPX: a trap is a tenth of what it takes to execute what comes before them in their blocks
one by one.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any, Final

from iced_x86 import Decoder, Instruction

from vtx.addresses import PAGE_SHIFT, PAGE_SIZE
from vtx.engine import native
from vtx.x86.decode import BOUNDS_CODES, MAX_INSTRUCTION_LENGTH
from vtx.x86.near_branches import initializes_bounds, is_watched_branch

_BIT_TEST: Final = re.compile(rb"\x0f(?:[\xa3\xab\xb3\xbb][\xc0-\xff]|\xba[\xe0-\xff])", re.DOTALL)
_LOCK: Final = 0xF0
_PREFIXES: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, _LOCK, 0xF2, 0xF3))
_REX: Final = frozenset(range(0x40, 0x50))
_REACH: Final = MAX_INSTRUCTION_LENGTH - 1
_MOST_ADDED: Final = 4096  # all exits are set anew each time


def begins(code: bytes, *, bits: int) -> set[int]:
    """Offsets in ``code`` where an instruction begins that the library cannot translate, if one begins there.

    ``bits`` is the width of the code; REX prefixes are other instructions if that is not 64.
    """
    found: set[int] = set()
    prefixes = _PREFIXES | _REX if bits == 64 else _PREFIXES
    for match in _BIT_TEST.finditer(code):
        locked = False
        first = match.start()
        for offset in range(first - 1, max(first - _REACH, 0) - 1, -1):
            if code[offset] not in prefixes:
                break
            locked = locked or code[offset] == _LOCK
            if locked:
                found.add(offset)
    return found


def may_be_exit(instruction: Instruction) -> bool:
    """Whether ``instruction`` is one of those for which exits are added."""
    if instruction.code in BOUNDS_CODES:
        return True
    return is_watched_branch(instruction) or initializes_bounds(instruction)


class Exits:
    """The exits of one engine. ``read`` gives (linear address, size) bytes of code, fewer where none was executed."""

    def __init__(self, handle: ctypes.c_void_p, read: Callable[[int, int], bytes]) -> None:
        self._handle = handle
        self._read = read
        self._library: Any = native.library
        self._pages: dict[int, frozenset[int]] = {}
        self._added: set[int] = set()
        self.depend_on_width = False
        """Whether there is code that would have other exits if it had another width."""

    def granted(self, page: int, bits: int) -> bool:
        """Linear ``page`` will be executed, as code of so many bits.

        Returns whether there is an exit now that a translation under way has passed already: one that comes from the
        page before asks for this one to complete an instruction, or to begin its first one.
        """
        start = page << PAGE_SHIFT
        before = len(self._read(start - _REACH, _REACH)) if page else 0
        before = before if before == _REACH else 0
        code = self._read(start - before, before + PAGE_SIZE + _REACH)
        offsets = begins(code, bits=64)
        if offsets:
            narrow = begins(code, bits=32)
            self.depend_on_width = self.depend_on_width or narrow != offsets
            offsets = offsets if bits == 64 else narrow
        exits = {start - before + offset for offset in offsets}
        inside = frozenset(address for address in exits if address >> PAGE_SHIFT == page)
        known = self._pages.get(page, frozenset())
        known_before = self._pages.get(page - 1, frozenset())
        crossing = frozenset(address for address in exits - known_before if address >> PAGE_SHIFT == page - 1)
        if inside != known or crossing:
            self._pages[page] = inside
            if crossing:
                self._pages[page - 1] = known_before | crossing
            self._set()
        return bool(crossing) or start in inside - known

    def add(self, address: int) -> bool:
        """Let what is at linear ``address`` trap from now on; False if there are too many exits, or there was one.

        The caller drops what has been translated there.
        """
        if address in self._added or len(self._added) >= _MOST_ADDED:
            return False
        self._added.add(address)
        self._set()
        return True

    def is_left(self, address: int, bits: int) -> bool:
        """Whether there is an exit at ``address`` although nothing that needs one begins there any more.

        The page was of code and data, and a store changed the instruction after it trapped.
        """
        exits = self._pages.get(address >> PAGE_SHIFT, frozenset())
        if address not in exits and address not in self._added:
            return False
        code = self._read(address, MAX_INSTRUCTION_LENGTH + 3)
        return not (0 in begins(code, bits=bits) or may_be_exit(Decoder(bits, code).decode()))

    def remove(self, address: int) -> None:
        """Let what is at ``address`` no longer trap."""
        page = address >> PAGE_SHIFT
        self._pages[page] = self._pages.get(page, frozenset()) - {address}
        self._added.discard(address)
        self._set()

    def _set(self) -> None:
        addresses = sorted(self._added.union(*self._pages.values()))
        array = (ctypes.c_uint64 * len(addresses))(*addresses)
        status = self._library.uc_ctl(
            self._handle, ctypes.c_int(native.CTL_EXITS), array, ctypes.c_size_t(len(addresses))
        )
        native.check(status, "setting exits")
