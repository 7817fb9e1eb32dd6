"""Keeping code and data coherent: a frame is either writable somewhere or executable somewhere.

An engine translates code once and would keep running the translation after the code changed through another mapping,
or on another processor. Because every mapping is granted by our fill callback, one rule covers all aliases and all
engines: granting a write to a frame that has been executed first drops its translations; granting execution of a
frame that is writable first withdraws the write. A frame of code that stores to it, or that keeps changing sides, is
shared: its translations stay, because the engine's own detection of self-modifying code works through a single linear
page of a single engine, at the price of slow stores. Even then the page is executable or writable, one after the
other, so that nothing stored is translated before the engine has looked at it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import define, field

from vtx.x86.second_level import AccessKind

MIXED_AFTER: Final = 4
"""Changes of side before a frame counts as mixed; fewer make ordinary loading of code slow for ever after."""

_READ_EXECUTE: Final = AccessKind.READ | AccessKind.EXECUTE


@define(slots=True, eq=False)
class Member:
    """One engine.

    ``withdraw`` drops all its TLB entries, ``retranslate`` its translations of a frame, except, ``by_store``, those of
    the code that stores to itself at this moment: for it the engine's own detection is exact. It returns whether all
    were dropped. ``modified`` tells that code may have been modified in a way the engine detects by itself, ``detect``
    that it must go on detecting it in a frame even while it may only write there. ``view`` is the one through which
    shared frames were granted last.
    """

    withdraw: Callable[[], None]
    retranslate: Callable[[int, bool], bool]
    modified: Callable[[], None]
    detect: Callable[[int], None]
    executed: set[int] = field(factory=set)
    writable: set[int] = field(factory=set)
    view: object = None


class Coherence:
    """The sides that the frames of one memory are on.

    ``executed`` are the frames that any engine may hold translations of, ``shared`` those of code and data, each with
    the engine and the linear page that have it, ``writable`` for each engine the frames it may write. These are added
    to ``dirty``, too.
    """

    def __init__(self, dirty: set[int] | None = None) -> None:
        self.executed: set[int] = set()
        self.dirty = set() if dirty is None else dirty
        self.writable: list[set[int]] = []
        self._members: list[Member] = []
        self._changes: dict[int, int] = {}
        self.shared: dict[int, tuple[Member, int]] = {}

    def join(
        self,
        withdraw: Callable[[], None],
        retranslate: Callable[[int, bool], bool],
        modified: Callable[[], None] = lambda: None,
        detect: Callable[[int], None] = lambda frame: None,
    ) -> Member:
        """Take in an engine."""
        member = Member(withdraw, retranslate, modified, detect)
        self._members.append(member)
        self.writable.append(member.writable)
        return member

    def tlb_flushed(self, member: Member) -> None:
        """The TLB of ``member`` is empty: no frame is writable through it any more."""
        member.writable.clear()

    def withdraw_writes(self) -> None:
        """Take back every permission to write, so that the next write to a frame is asked for again."""
        self._withdraw()

    def written(self, frame: int) -> None:
        """The model wrote to ``frame`` behind the engines' backs."""
        if frame in self.executed:
            self._drop_translations(frame, by_store=False)
            if frame not in self.shared:
                self.executed.discard(frame)
                self._withdraw()

    def grant(
        self, member: Member, frame: int, page: int, kind: AccessKind, permissions: int, view: object = None
    ) -> int:
        """What to allow ``member`` at linear page ``page``, which maps ``frame``: no more than ``permissions``.

        The engine keeps it by ``view``; for the same page and view it replaces what was granted before.
        """
        if kind is AccessKind.EXECUTE:
            if frame in self.shared:
                return self._share(member, frame, page, kind, permissions, view)
            if any(frame in writable for writable in self.writable):
                if self._is_mixed(frame):
                    return self._share(member, frame, page, kind, permissions, view)
                self._withdraw()
                member.modified()
            self._note_executed(member, frame)
            return permissions & _READ_EXECUTE
        if not permissions & AccessKind.WRITE:
            return permissions & AccessKind.READ
        if frame in self.executed:
            if kind is AccessKind.READ:
                return AccessKind.READ
            if self._is_mixed(frame):
                return self._share(member, frame, page, kind, permissions, view)
            if not self._drop_translations(frame, by_store=True):
                return self._share(member, frame, page, kind, permissions, view)
            self.executed.discard(frame)
            self._withdraw()
        member.writable.add(frame)
        self.dirty.add(frame)
        return permissions & ~AccessKind.EXECUTE

    def _note_executed(self, member: Member, frame: int) -> None:
        self.executed.add(frame)
        member.executed.add(frame)

    def _withdraw(self) -> None:
        for member, _ in self.shared.values():
            member.modified()
        self.shared.clear()
        for member in self._members:
            member.withdraw()

    def _drop_translations(self, frame: int, *, by_store: bool) -> bool:
        dropped = True
        for member in self._members:
            if frame in member.executed:
                if member.retranslate(frame, by_store):
                    member.executed.discard(frame)
                else:
                    dropped = False
        return dropped

    def _is_mixed(self, frame: int) -> bool:
        changes = self._changes[frame] = self._changes.get(frame, 0) + 1
        return changes > MIXED_AFTER

    def _share(self, member: Member, frame: int, page: int, kind: AccessKind, permissions: int, view: object) -> int:
        if self.shared.get(frame) != (member, page):
            self._drop_translations(frame, by_store=True)
            self._withdraw()
            self.shared[frame] = member, page
            member.detect(frame)
        elif member.view != view:
            member.withdraw()
        member.view = view
        self._note_executed(member, frame)
        if kind is AccessKind.EXECUTE:
            return permissions & _READ_EXECUTE
        member.writable.add(frame)
        self.dirty.add(frame)
        return permissions & ~AccessKind.EXECUTE
