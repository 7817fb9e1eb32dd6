"""Walks remembered with the paging-structure entries they read.

A walk is a function of the paging context and of the entries it reads. When translations had to be dropped although no
entry changed, as at every VM entry and VM exit without VPID and at many a MOV to CR3, comparing the entries gives the
same translation again for a fraction of the work of the walk. Nothing is assumed: each entry is read again.

Only walks through RAM are remembered, and only those that set no flag, because then reading is all they do. Under a
second level, the entries count that its translations rest on, too; not every second level can name them.
"""

from __future__ import annotations

from typing import Final

from vtx.x86.memory import PhysicalMemory
from vtx.x86.paging import Translation
from vtx.x86.second_level import Evidence

_MOST_PAGES: Final = 1 << 12
_MOST_CONTEXTS: Final = 64

Remembered = tuple[Translation, tuple[tuple[int, int], ...]]
"""A translation, and the entries it was made from: (offset in RAM, value) of each."""

_NONE: Final[dict[int, Remembered | None]] = {}


class WalkMemory:
    """The walks remembered of one processor; `select` says in which context."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory
        self._contexts: dict[tuple[int | None, ...], dict[int, Remembered | None]] = {}
        self._pages: dict[int, Remembered | None] = {}
        self._remembers = False

    def select(self, context: tuple[int | None, ...], *, remembers: bool) -> None:
        """Recall and remember walks of ``context``, the registers and second level they depend on; or none."""
        self._remembers = remembers
        pages = self._contexts.get(context) if remembers else _NONE
        if pages is None:
            if len(self._contexts) >= _MOST_CONTEXTS:
                self._contexts.clear()
            pages = self._contexts[context] = {}
        self._pages = pages

    def recall(self, page: int) -> Translation | None:
        """What a walk for linear page number ``page`` would give, if it has been remembered and reads the same."""
        remembered = self._pages.get(page)
        if remembered is None:
            return None
        translation, entries = remembered
        read = self._memory.read_at
        for offset, value in entries:
            if read(offset) != value:
                self._pages[page] = None
                return None
        return translation

    def wants(self, page: int) -> bool:
        """Whether a walk for ``page`` is worth remembering: it is not the first."""
        if not self._remembers:
            return False
        if page in self._pages:
            return True
        if len(self._pages) >= _MOST_PAGES:
            self._pages.clear()
        self._pages[page] = None
        return False

    def remember(self, page: int, translation: Translation, evidence: Evidence | None) -> None:
        """A walk for ``page`` gave ``translation``, by ``evidence``; None if that is not all known."""
        if evidence is None:
            return
        entries = []
        for address, value in evidence.read:
            offset = self._memory.ram_offset(address)
            if offset is None or offset & 7 or self._memory.read_at(offset) != value:
                return  # no RAM, an entry of 4 bytes, or a flag was set
            entries.append((offset, value))
        self._pages[page] = translation, (*entries, *evidence.beneath)

    def remembered(self, page: int) -> Remembered | None:
        """What has been remembered for ``page``, whether or not it still holds."""
        return self._pages.get(page)
