"""Hypervisor-managed linear-address translation: a second root of paging structures, which the hypervisor chooses.

Its entries are as those of ordinary paging but for one bit, which sends the walk back to ordinary paging.

Spec: SDM Vol. 3, "4-Level Paging and 5-Level Paging" (HLAT paging); "Page-Fault Exceptions".
"""

from __future__ import annotations

import functools

from attrs import evolve, frozen

from vtx.addresses import LinearAddress
from vtx.x86.page_rights import Privilege
from vtx.x86.paging import (
    PRESENT,
    RESTART,
    PagedMemory,
    PageFault,
    PageFaultError,
    PagingContext,
    PagingMode,
    Translation,
    WalkStep,
    walk,
)
from vtx.x86.second_level import AccessKind, SecondLevel, SecondLevelFault


@frozen
class Hlat:
    """The HLAT pointer, and whether HLAT paging is for every linear address or the upper half alone."""

    pointer: int
    upper_half_only: bool

    def translates(self, context: PagingContext, linear: int) -> bool:
        """Whether HLAT paging is tried first for ``linear``."""
        if context.mode not in (PagingMode.LEVEL_4, PagingMode.LEVEL_5):
            return False
        return not self.upper_half_only or bool(linear >> 63)


@functools.lru_cache(maxsize=64)
def _context(context: PagingContext, pointer: int) -> PagingContext:
    return evolve(context, cr3=pointer, restarts=True)


def walk_with_hlat(
    hlat: Hlat,
    context: PagingContext,
    linear: LinearAddress,
    kind: AccessKind,
    privilege: Privilege,
    memory: PagedMemory,
    second_level: SecondLevel,
    steps: list[WalkStep] | None = None,
) -> Translation | PageFault | SecondLevelFault:
    """As `walk`, with HLAT paging where ``hlat`` has it; a restarted walk leaves its steps of both kinds."""
    if not hlat.translates(context, linear):
        return walk(context, linear, kind, privilege, memory, second_level, steps)
    managed = _context(context, hlat.pointer)
    taken: list[WalkStep] = []
    result = walk(managed, linear, kind, privilege, memory, second_level, taken)
    if steps is not None:
        steps += taken
    if not isinstance(result, PageFault) or not taken:
        return result
    last = taken[-1].value
    if last & PRESENT and last & RESTART:
        return _restart(context, len(taken), walk(context, linear, kind, privilege, memory, second_level, steps))
    if not last & PRESENT or result.error_code & PageFaultError.RSVD:
        return evolve(result, error_code=result.error_code | PageFaultError.HLAT)
    return result


def _restart(
    context: PagingContext, levels: int, result: Translation | PageFault | SecondLevelFault
) -> Translation | PageFault | SecondLevelFault:
    """The result of ordinary paging, cached as no larger page than the entry that restarted controls."""
    if not isinstance(result, Translation):
        return result
    return evolve(result, size=min(result.size, 1 << context.geometry.levels[levels - 1].shift))
