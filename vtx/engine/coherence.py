"""Keeping code and data coherent: a frame is either writable somewhere or executable somewhere.

The engine translates code once and would keep running the translation after the code changed through another mapping.
Because every mapping is granted by our fill callback, one rule covers all aliases: granting a write to a frame that has
been executed first drops its translations; granting execution of a frame that is writable first withdraws the write.
A frame that keeps changing sides (code and data on one page) is granted both through a single linear page, where the
engine's own detection of self-modifying code works, at the price of slow stores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vtx.x86.second_level import AccessKind

MIXED_AFTER: Final = 4
"""Changes of side before a frame counts as mixed; fewer make ordinary loading of code slow for ever after."""

_READ_EXECUTE: Final = AccessKind.READ | AccessKind.EXECUTE


class Coherence:
    """The sides frames are on. ``withdraw`` drops all engine TLB entries; ``retranslate`` a frame's translations."""

    def __init__(self, withdraw: Callable[[], None], retranslate: Callable[[int], None]) -> None:
        self._withdraw = withdraw
        self._retranslate = retranslate
        self.executed: set[int] = set()
        self.writable: set[int] = set()
        self._changes: dict[int, int] = {}
        self._owners: dict[int, int] = {}

    def tlb_flushed(self) -> None:
        """The engine's TLB is empty: no frame is writable through it any more."""
        self.writable.clear()
        self._owners.clear()

    def written(self, frame: int) -> None:
        """The model wrote to ``frame`` behind the engine's back."""
        if frame in self.executed:
            self._retranslate(frame)
            if frame not in self._owners:
                self.executed.discard(frame)
                self._withdraw()

    def grant(self, frame: int, page: int, kind: AccessKind, permissions: int) -> int:
        """Permissions to hand out for ``frame`` at linear page ``page``, no more than ``permissions``."""
        if kind is AccessKind.EXECUTE:
            if frame in self.writable:
                if self._mixed(frame):
                    return self._share(frame, page, permissions)
                self._withdraw()
            self.executed.add(frame)
            return permissions & _READ_EXECUTE
        if not permissions & AccessKind.WRITE:
            return permissions & AccessKind.READ
        if frame in self.executed:
            if kind is AccessKind.READ:
                return AccessKind.READ
            if self._mixed(frame):
                return self._share(frame, page, permissions)
            self._retranslate(frame)
            self._withdraw()
            self.executed.discard(frame)
        self.writable.add(frame)
        return permissions & ~AccessKind.EXECUTE

    def _mixed(self, frame: int) -> bool:
        changes = self._changes[frame] = self._changes.get(frame, 0) + 1
        return changes > MIXED_AFTER

    def _share(self, frame: int, page: int, permissions: int) -> int:
        if self._owners.get(frame) != page:
            self._retranslate(frame)
            self._withdraw()
            self._owners[frame] = page
        self.executed.add(frame)
        self.writable.add(frame)
        return permissions
