"""Sub-page write permissions: writes to 128-byte parts of a page that EPT protects as a whole.

EPT hands an eligible write over as a `SubPageWrite`, because only its exact bytes decide. Writes of the model itself
are decided where they are translated; for an instruction that the engine executes, `virtualize` decides about all it
writes and then has it executed once, with the pages writable for as long.

Interpretations. A write that touches several sub-pages needs permission for each. The accessed and dirty flags and the
page-modification log see a write that is allowed as any other.

Spec: SDM Vol. 3, "VMX Support for Address Translation", "Sub-Page Write Permissions".
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vtx.addresses import PAGE_OFFSET_MASK, PAGE_SIZE, GuestPhysicalAddress, LinearAddress
from vtx.vmx.ept import ExtendedPageTables
from vtx.vmx.operation import VmxOperation
from vtx.x86.access import Operand
from vtx.x86.page_rights import Privilege
from vtx.x86.second_level import AccessKind, SecondLevelFault, SubPageWrite
from vtx.x86.state import Rflags
from vtx.x86.virtualization import RefusedInstruction

_AC: Final = int(Rflags.AC)


@frozen
class _Part:
    """The bytes of a write that are in one page."""

    linear: int
    size: int


def _parts(operand: Operand) -> list[_Part]:
    """The parts of an operand, page by page."""
    parts, linear, left = [], operand.linear, operand.size
    while left > 0:
        size = min(left, PAGE_SIZE - (linear & PAGE_OFFSET_MASK))
        parts.append(_Part(linear, size))
        linear, left = linear + size, left - size
    return parts


def virtualize(operation: VmxOperation, refused: RefusedInstruction, write: SubPageWrite) -> SecondLevelFault | None:
    """An instruction that the engine executes meets sub-page permissions: execute it if they allow it.

    The fault of the first write that they do not allow, with nothing executed.
    """
    processor = operation.processor
    state, mmu = processor.state, processor.mmu
    privilege = Privilege.of(state.cpl, bool(state.rflags & _AC))
    parts = [part for operand in refused.operands() if operand.writes for part in _parts(operand)]
    if not any(part.linear & ~PAGE_OFFSET_MASK == (write.linear or 0) & ~PAGE_OFFSET_MASK for part in parts):
        parts.append(_Part(write.linear or LinearAddress(0), 1))  # a write that no operand explains
    pages: dict[GuestPhysicalAddress, int] = {}
    for part in parts:
        found = mmu.resolve(part.linear, AccessKind.WRITE, privilege)
        if not isinstance(found, SubPageWrite):
            continue  # what else may be wrong with it, executing the instruction will show
        decided = found.decide(part.size)
        if isinstance(decided, SecondLevelFault):
            return decided
        pages[GuestPhysicalAddress(found.guest_physical & ~PAGE_OFFSET_MASK)] = part.linear
    tables = mmu.second_level
    assert isinstance(tables, ExtendedPageTables)
    tables.writable_sub_pages = frozenset(pages)
    try:
        refused.execute()
    finally:
        tables.writable_sub_pages = frozenset()
        for linear in pages.values():
            mmu.invlpg(linear)
    return None
