"""Instructions that access the MMU's reserved page: which operands lie there, and executing one on another page.

The MMU refuses every access to the reserved page. One that the virtualization extension allows is made after all, on a
page of the extension's: the engine executes the instruction once while the MMU redirects its accesses there, so that
any instruction will do.

Spec: SDM Vol. 3, "Virtualizing Memory-Mapped APIC Accesses"; APM Vol. 2, "Virtual APIC Register Accesses".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import frozen

from vtx.addresses import PAGE_OFFSET_MASK, PAGE_SIZE, PhysicalAddress
from vtx.x86.access import Operand
from vtx.x86.page_rights import Privilege
from vtx.x86.second_level import AccessKind, ReservedPageAccess
from vtx.x86.state import Rflags
from vtx.x86.virtualization import Processor, RefusedInstruction

_AC: Final = int(Rflags.AC)

Allows = Callable[[int, int], bool]
"""Whether an access of a number of bytes (second) at an offset of the page (first) may be made."""


@frozen
class Hit:
    """An operand on the reserved page, even in part; ``linear`` is the first address of it there."""

    operand: Operand
    linear: int

    @property
    def kind(self) -> AccessKind:
        """How it is accessed; one that is read and written counts as written."""
        return AccessKind.WRITE if self.operand.writes else AccessKind.READ


def hits(processor: Processor, refused: RefusedInstruction) -> list[Hit]:
    """The operands of the instruction that are on the reserved page, reads before writes."""
    state, mmu = processor.state, processor.mmu
    privilege = Privilege.of(state.cpl, bool(state.rflags & _AC))
    found = []
    for operand in refused.operands():
        kind = AccessKind.WRITE if operand.writes else AccessKind.READ
        starts = [operand.linear]
        if (operand.linear & PAGE_OFFSET_MASK) + operand.size > PAGE_SIZE:
            starts.append((operand.linear + operand.size - 1) & ~PAGE_OFFSET_MASK)
        linear = next((at for at in starts if isinstance(mmu.resolve(at, kind, privilege), ReservedPageAccess)), None)
        if linear is not None:
            found.append(Hit(operand, linear))
    return sorted(found, key=lambda hit: hit.operand.writes)


def not_allowed(found: list[Hit], reads: Allows, writes: Allows) -> Hit | None:
    """The first of an instruction's accesses to the page that may not be made; None if all may.

    After one that may, only a write of the same bytes can be made: that of a read-modify-write operand.
    """
    first, *others = found
    operand, offset = first.operand, first.operand.linear & PAGE_OFFSET_MASK
    if operand.reads and not reads(offset, operand.size):
        return first
    if operand.writes and not writes(offset, operand.size):
        return first
    return others[0] if others else None


def perform(processor: Processor, refused: RefusedInstruction, hit: Hit, page: int) -> bool:
    """Execute the instruction at RIP with its access made to the physical page ``page``; whether it completed."""
    with processor.mmu.redirection(PhysicalAddress(page), hit.operand.linear):
        return refused.execute()
