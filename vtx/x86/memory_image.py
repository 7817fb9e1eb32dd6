"""Contents of RAM at some moment, kept so that going back costs only what was written since.

An image holds the pages that are not zero. Images of one machine share the pages that did not change between them, and
`RamHistory` knows from which image memory now differs by no more than `PhysicalMemory.dirty`: going back to that one
copies those pages, going to another one also the pages in which the two images differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from attrs import frozen

from vtx.addresses import PAGE_SHIFT, PAGE_SIZE
from vtx.x86.memory import ZERO_PAGE, PhysicalMemory


@frozen(eq=False)
class MemoryImage:
    """The pages of RAM that are not zero, by page number; nobody changes the mapping."""

    pages: Mapping[int, bytes]


_EMPTY: Final = MemoryImage({})


class RamHistory:
    """The images of ``memory``, which is new and all zero.

    ``withdraw_writes`` is called when writes must be noted anew: whoever may write unnoticed asks again.
    """

    def __init__(self, memory: PhysicalMemory, withdraw_writes: Callable[[], None]) -> None:
        self._memory = memory
        self._withdraw_writes = withdraw_writes
        self._base = _EMPTY

    def save(self) -> MemoryImage:
        """The image of memory as it is; takes a copy of each page written since the last image."""
        memory, pages = self._memory, dict(self._base.pages)
        for page in sorted(memory.dirty):
            data = memory.read(page << PAGE_SHIFT, PAGE_SIZE)
            if data == ZERO_PAGE:
                pages.pop(page, None)
            elif pages.get(page) != data:
                pages[page] = data
        image = MemoryImage(pages)
        self._rebase(image)
        return image

    def restore(self, image: MemoryImage) -> int:
        """Make memory what it was; the number of pages that had to be looked at."""
        pages = self._memory.dirty if image is self._base else self._memory.dirty | _differing(self._base, image)
        count = len(pages)
        self._memory.put_pages(pages, image.pages)
        self._rebase(image)
        return count

    def _rebase(self, image: MemoryImage) -> None:
        self._base = image
        self._withdraw_writes()
        self._memory.dirty.clear()


def _differing(one: MemoryImage, other: MemoryImage) -> set[int]:
    """The pages that are not the same object in both: a superset of those that differ."""
    pages = {page for page, data in one.pages.items() if other.pages.get(page) is not data}
    return pages | {page for page in other.pages if page not in one.pages}
