"""Misses of the engine's TLB on their way to the engine, and the compiled memory that answers many of them at once.

At every VM entry and VM exit the engine forgets all translations. The compiled `_fills` gives them again when all
that the answers rest on is as it was; `Fills` in Python always asks. What runs is the same with both, by a test.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final, Protocol

from vtx.addresses import PAGE_OFFSET_MASK
from vtx.engine import layout, native
from vtx.engine.clock import BlockClock
from vtx.engine.coherence import Coherence, Member
from vtx.engine.transfer import Hook
from vtx.x86.memory import PhysicalMemory
from vtx.x86.mmu import Translations

try:
    from vtx.engine import _fills  # type: ignore[attr-defined, unused-ignore]
except ImportError:
    _fills = None

_INTERFACE: Final = 1

Ask = Callable[[int, int], int]
"""Asked for the grant at a linear address, for an access of `UC_MEM_...`: physical address and permissions, or 0."""


class FillMemory(Protocol):
    """What both do."""

    most: int
    """How many fills may be given without asking before the engine's TLB is emptied."""

    active: bool
    """Whether the engine runs, and not only ends a run: misses want a true answer."""

    @property
    def count(self) -> int:
        """Fills since the engine's TLB was empty."""
        ...

    @property
    def given(self) -> int:
        """Fills that were given without asking, ever."""
        ...

    @property
    def wanted(self) -> bool:
        """Whether the fill being asked for is worth remembering."""
        ...

    def emptied(self, translations: Translations | None) -> None:
        """The engine's TLB is empty; ``translations`` are in force from now on, None to remember nothing."""
        ...

    def remember(
        self, grant: int, frame: int, translation: object, large: object, entries: tuple[tuple[int, int], ...] | None
    ) -> None:
        """The answer to the fill being asked for, and what it rests on (see `vtx.x86.mmu.Basis`)."""
        ...


class Fills:
    """Asks, and remembers nothing."""

    def __init__(self) -> None:
        self.most = self.count = self.given = 0
        self.active = self.wanted = False

    def emptied(self, translations: Translations | None) -> None:
        """See `FillMemory`."""
        self.count = 0

    def remember(
        self, grant: int, frame: int, translation: object, large: object, entries: tuple[tuple[int, int], ...] | None
    ) -> None:
        """See `FillMemory`."""


def fill_memory(
    ask: Ask,
    memory: PhysicalMemory,
    coherence: Coherence,
    member: Member,
    noted: dict[int, tuple[int, bool]],
    where: tuple[ctypes.c_void_p, ctypes.c_void_p, int, BlockClock, int],
    *,
    allow_compiled: bool,
) -> tuple[FillMemory, Hook]:
    """The compiled memory if it is there and allowed, else the one in Python; and the hook that fills the engine's TLB.

    ``noted`` are the frames of code that the engine knows, by linear page. ``where`` says where things are: engine,
    saved context, its address, clock, address of RAM.
    """
    handle, context, image, clock, ram = where
    if _fills is None or not allow_compiled:
        return _in_python(ask)
    if _fills.INTERFACE != _INTERFACE:
        raise native.EngineUnusable("the compiled memory of fills does not match this version; reinstall vtx")
    save = ctypes.cast(native.library.uc_context_save, ctypes.c_void_p).value
    places = (
        *(handle.value, context.value, save, image + layout.EFLAGS, image + layout.HFLAGS),
        *(clock.address_of("size"), clock.address_of("stopped"), ram),
    )
    sets = coherence.executed, coherence.dirty, coherence.shared, member.executed, member.writable, coherence.writable
    fills = _fills.Fills(ask, memory, places, sets, noted)
    return fills, Hook(_fills.callback(), id(fills), fills)


def _in_python(ask: Ask) -> tuple[FillMemory, Hook]:
    fills = Fills()

    def callback(handle: int, address: int, access: int, entry: Any, data: int) -> bool:
        fills.count += 1
        grant = ask(address, access)
        entry.contents.paddr, entry.contents.perms = grant & ~PAGE_OFFSET_MASK, grant & PAGE_OFFSET_MASK
        return bool(grant)

    return fills, Hook(native.FillCallback(callback))
