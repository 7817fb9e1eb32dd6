"""The software TLB: translations by linear page, tagged as the architecture tags them.

One dictionary per tag, so that a hit is one look-up and an invalidation by tag is one deletion. The tag has the three
identifiers by which the manuals let software keep mappings apart: the address-space identifier (VPID or ASID), the root
of the second level, and the PCID. Global translations live beside the PCIDs. Mappings made with paging disabled are
the manual's *guest-physical mappings*: no linear-address invalidation touches them.

The TLB holds what paging gave, never what an access may do with it: permissions are computed at each access from the
current registers (`vtx.x86.page_rights`). What does not suffice is walked again, so raising rights in memory needs no
invalidation, exactly as on hardware.

Spec: SDM Vol. 3, "Caching Translation Information", "Caching Translation Information in VMX Operation",
"Invalidation of TLBs and Paging-Structure Caches"; APM Vol. 3, "System Instruction Reference" (INVLPGB).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from attrs import frozen

from vtx.addresses import PAGE_SHIFT, PAGE_SIZE
from vtx.x86.paging import Translation

NO_PAGING: Final = -1
"""In place of a PCID: mappings made with CR0.PG = 0."""
GLOBAL: Final = -2
"""In place of a PCID: global translations, shared by all PCIDs."""

ROOT_MASK: Final = ((1 << 52) - 1) & ~(PAGE_SIZE - 1)
"""The bits of a second-level tag that hold its root (for EPT, the EPTRTA)."""

LARGE_SIZES: Final = (1 << 21, 1 << 22, 1 << 30)


class TlbTag(NamedTuple):
    """Whose translations: ``asid`` (VPID or ASID, 0 for none), second-level tag, PCID (or `NO_PAGING`, `GLOBAL`)."""

    asid: int
    second_level: int | None
    pcid: int


class _Space:
    """The translations of one tag, by 4-KByte page number.

    A large page is cached in 4-KByte pieces, because the second level may scatter it; ``large`` finds the pieces
    again, since one INVLPG must drop them all.
    """

    __slots__ = ("large", "pages")

    def __init__(self) -> None:
        self.pages: dict[int, Translation] = {}
        self.large: dict[tuple[int, int], set[int]] = {}

    def insert(self, page: int, translation: Translation, capacity: int) -> None:
        if len(self.pages) >= capacity:
            self._evict()
        self.pages[page] = translation
        if translation.size > PAGE_SIZE:
            self._note_large(page, translation.size)

    def clear(self) -> None:
        self.pages.clear()
        self.large.clear()

    def discard(self, page: int) -> None:
        self.pages.pop(page, None)
        if self.large:
            for size in LARGE_SIZES:
                for piece in self.large.pop((size, page // (size >> PAGE_SHIFT)), ()):
                    self.pages.pop(piece, None)

    def _note_large(self, page: int, size: int) -> None:
        key = size, page // (size >> PAGE_SHIFT)
        pieces = self.large.get(key)
        if pieces is None:
            self.large[key] = {page}
        else:
            pieces.add(page)

    def _evict(self) -> None:
        """Drop the older half: insertion order is deterministic, and halving makes the cost of one insertion small."""
        kept = list(self.pages.items())[len(self.pages) // 2 :]
        self.pages.clear()
        self.large.clear()
        for page, translation in kept:
            self.pages[page] = translation
            if translation.size > PAGE_SIZE:
                self._note_large(page, translation.size)


@frozen
class Selection:
    """What INVLPGB asks a TLB to forget.

    ``asid`` and ``pcid`` are None for all of them, ``pages`` are linear page numbers, None for all. With
    ``include_global`` global translations are selected too, whatever their PCID; with ``include_nested`` everything
    that a second level of translation has had a part in.
    """

    asid: int | None
    pcid: int | None
    pages: tuple[int, ...] | None
    include_global: bool
    include_nested: bool

    def of_address_space(self, tag: TlbTag) -> bool:
        """Whether translations of ``tag`` at the pages are selected."""
        if self.asid is not None and tag.asid != self.asid:
            return False
        if tag.pcid == GLOBAL:
            return self.include_global
        return self.pcid is None or self.pcid == max(tag.pcid, 0)

    def of_second_level(self, tag: TlbTag) -> bool:
        """Whether all translations of ``tag`` are selected as nested ones."""
        return self.include_nested and tag.second_level is not None and self.asid in (None, tag.asid)


@frozen
class SavedSpace:
    """The translations of one tag, as `Tlb.save` returns them."""

    tag: TlbTag
    pages: Mapping[int, Translation]
    large: Mapping[tuple[int, int], frozenset[int]]


@frozen
class SavedTlb:
    """The contents of a TLB, and the tag in use."""

    tag: TlbTag
    spaces: tuple[SavedSpace, ...]


class Tlb:
    """A bounded TLB; ``capacity`` is in pages per tag, ``tags`` the number of tags kept."""

    def __init__(self, capacity: int = 32768, tags: int = 64) -> None:
        if capacity < 2 or tags < 2:
            raise ValueError(f"a TLB of {capacity} pages and {tags} tags is too small")
        self._capacity = capacity
        self._tags = tags
        self._spaces: dict[TlbTag, _Space] = {}
        self.select(TlbTag(0, None, NO_PAGING))

    def select(self, tag: TlbTag) -> None:
        """Make ``tag`` the one that look-ups and insertions use."""
        self.tag = tag
        self._local = self._space(tag)
        # With paging disabled there are no global translations; look-ups then see the one space twice.
        asid, second_level, pcid = tag
        self._global = self._local if pcid == NO_PAGING else self._space(TlbTag(asid, second_level, GLOBAL))
        self._find_local = self._local.pages.get
        self._find_global = self._global.pages.get
        if len(self._spaces) > self._tags:
            self._evict_tags()

    def find(self, page: int) -> Translation | None:
        """The cached translation of linear page number ``page``; its permissions are the caller's check."""
        return self._find_local(page) or self._find_global(page)

    def pages(self) -> tuple[dict[int, Translation], dict[int, Translation]]:
        """The translations that `find` looks at: local and global ones, by linear page number."""
        return self._local.pages, self._global.pages

    def insert(self, page: int, translation: Translation) -> None:
        """Cache a translation of linear page number ``page``."""
        if translation.global_:
            # The local copy, if any, is older and would hide this one.
            self._local.pages.pop(page, None)
            self._global.insert(page, translation, self._capacity)
        else:
            self._local.insert(page, translation, self._capacity)

    def invalidate_page(self, page: int) -> None:
        """INVLPG, and what a page fault does: the current PCID and the global translations, for every second level.

        Spec: SDM Vol. 3, "Operations that Invalidate TLBs and Paging-Structure Caches".
        """
        self._discard(page, lambda tag: tag.asid == self.tag.asid and tag.pcid in (self.tag.pcid, GLOBAL))

    def invalidate_pcid_page(self, pcid: int, page: int) -> None:
        """INVPCID type 0, individual-address: one page of one PCID, global translations excepted."""
        self._discard(page, lambda tag: tag.asid == self.tag.asid and tag.pcid == pcid)

    def invalidate_pcid(self, pcid: int) -> None:
        """INVPCID type 1, single-context, and MOV to CR3: one PCID, global translations excepted."""
        self._drop(lambda tag: tag.asid == self.tag.asid and tag.pcid == pcid)

    def invalidate_asid(self, asid: int, *, keep_global: bool = False) -> None:
        """All PCIDs of one address-space identifier.

        INVVPID types 1 and 3 (``keep_global``); for the current identifier also INVPCID types 2 and 3
        (``keep_global``), the changes of CR0, CR4 and EFER that invalidate everything, and for VPID 0 every VM entry
        and VM exit.
        """
        kept = GLOBAL if keep_global else NO_PAGING
        for tag in [tag for tag in self._spaces if tag[0] == asid and tag[2] != NO_PAGING and tag[2] != kept]:
            self._drop_tag(tag)

    def invalidate_asid_page(self, asid: int, page: int) -> None:
        """INVVPID type 0, individual-address: one page of all PCIDs, global translations included."""
        self._discard(page, lambda tag: tag.asid == asid and tag.pcid != NO_PAGING)

    def invalidate_asids(self) -> None:
        """INVVPID type 2, all-context: every identifier but 0."""
        self._drop(lambda tag: tag.asid != 0 and tag.pcid != NO_PAGING)

    def invalidate_root(self, root: int) -> None:
        """INVEPT type 1, single-context: guest-physical and combined mappings of one second-level root."""
        self._drop(lambda tag: tag.second_level is not None and not (tag.second_level ^ root) & ROOT_MASK)

    def invalidate_roots(self) -> None:
        """INVEPT type 2, all-context: all guest-physical and combined mappings."""
        self._drop(lambda tag: tag.second_level is not None)

    def clear(self) -> None:
        """Drop everything."""
        self._drop(lambda tag: True)

    def flush_asid(self, asid: int, *, keep_global: bool = False) -> None:
        """TLB_CONTROL of VMRUN: all of one ASID, mappings made with paging disabled included."""
        self._drop(lambda tag: tag.asid == asid and not (keep_global and tag.pcid == GLOBAL))

    def forget(self, selection: Selection) -> None:
        """INVLPGB. Without paging the PCID counts as 0."""
        self._drop(selection.of_second_level)
        if selection.pages is None:
            self._drop(selection.of_address_space)
        else:
            for page in selection.pages:
                self._discard(page, selection.of_address_space)

    def save(self) -> SavedTlb:
        """All that is cached; later changes do not reach it."""
        return SavedTlb(
            self.tag,
            tuple(
                SavedSpace(tag, dict(space.pages), {key: frozenset(pieces) for key, pieces in space.large.items()})
                for tag, space in self._spaces.items()
            ),
        )

    def restore(self, saved: SavedTlb) -> None:
        """Cache what `save` found, in the same order, and nothing else."""
        self._spaces.clear()
        for each in saved.spaces:
            space = self._space(each.tag)
            space.pages.update(each.pages)
            space.large.update((key, set(pieces)) for key, pieces in each.large.items())
        self.select(saved.tag)

    def __len__(self) -> int:
        """Number of pages cached, over all tags."""
        return sum(len(space.pages) for space in self._spaces.values())

    def _space(self, tag: TlbTag) -> _Space:
        space = self._spaces.get(tag)
        if space is None:
            space = self._spaces[tag] = _Space()
        return space

    def _drop(self, selects: Callable[[TlbTag], bool]) -> None:
        for tag in [tag for tag in self._spaces if selects(tag)]:
            self._drop_tag(tag)

    def _drop_tag(self, tag: TlbTag) -> None:
        space = self._spaces[tag]
        if space is self._local or space is self._global:
            space.clear()
        else:
            del self._spaces[tag]

    def _discard(self, page: int, selects: Callable[[TlbTag], bool]) -> None:
        for tag, space in self._spaces.items():
            if selects(tag):
                space.discard(page)

    def _evict_tags(self) -> None:
        """Drop the oldest tags that are not in use."""
        in_use = (self._local, self._global)
        idle = [tag for tag, space in self._spaces.items() if space not in in_use]
        for tag in idle[: len(self._spaces) - self._tags]:
            del self._spaces[tag]
