"""INVLPGB and TLBSYNC: invalidations in the TLBs of all processors.

Interpretations. An invalidation is complete when INVLPGB is. The TLB holds final translations alone, so that whether
others are to be forgotten too makes no difference. An address that is not canonical is in no TLB, and no fault. A guest
forgets translations of its own ASID, whatever ASID it names. An ASID other than 0 needs EFER.SVME, a PCID other than 0
CR4.PCIDE. Where the control block disables both instructions they are invalid opcodes before anything else.

Spec: APM Vol. 3, "System Instruction Reference" (INVLPGB, TLBSYNC); APM Vol. 2, "Instruction Intercepts", "Layout of
VMCB".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vmcs.bits import bit_range
from vtx.addresses import PAGE_SHIFT
from vtx.x86.decode import Instruction
from vtx.x86.instructions.common import require_feature, require_ring_0
from vtx.x86.operations import SIMPLE, BroadcastInvalidation, Plain
from vtx.x86.outcome import gp
from vtx.x86.state import MASK32, MASK64, Cr4, Efer, Gpr
from vtx.x86.tlb import Selection

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

# rAX: the address is in the bits from 12 on.
_VALID_ADDRESS: Final = 1 << 0
_VALID_PCID: Final = 1 << 1
_VALID_ASID: Final = 1 << 2
_INCLUDE_GLOBAL: Final = 1 << 3
_INCLUDE_NESTED: Final = 1 << 5  # bit 4: final translations only
_RAX_RESERVED: Final = bit_range(11, 6)

# ECX: how many pages follow the first one.
_COUNT: Final = bit_range(15, 0)
_ECX_RESERVED: Final = bit_range(30, 16)
_BY_2_MBYTES: Final = 1 << 31
_LARGE_SHIFT: Final = 21

# EDX.
_ASID: Final = bit_range(15, 0)
_PCID_SHIFT: Final = 16
_PCID: Final = bit_range(11, 0)
_EDX_RESERVED: Final = bit_range(31, 28)


def invlpgb(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """INVLPGB: its intercepts come before the faults of its operands."""
    require_feature(cpu, "INVLPGB")
    require_ring_0(cpu)
    selection = _selection(cpu, instruction)
    if cpu.intercepts(BroadcastInvalidation(legal=selection is not None), instruction):
        return
    if selection is None:
        raise gp(0)
    for mmu in cpu.all_mmus():
        mmu.forget(selection)
    cpu.retire(instruction)


def _selection(cpu: LogicalProcessor, instruction: Instruction) -> Selection | None:
    """What the operands ask for, None if they are illegal."""
    gpr, extension = cpu.state.gpr, cpu.virtualization
    addresses = MASK64 if instruction.address_size == 8 else MASK32
    what = gpr[Gpr.RAX] & addresses
    extent, context = gpr[Gpr.RCX] & MASK32, gpr[Gpr.RDX] & MASK32
    if what & _RAX_RESERVED or extent & _ECX_RESERVED or context & _EDX_RESERVED:
        return None
    if extent & _COUNT > cpu.profile.invlpgb_count_max:
        return None
    if what & _INCLUDE_NESTED and not cpu.profile.has("INVLPGBnestedPages"):
        return None
    asid = context & _ASID if what & _VALID_ASID else None
    if extension is not None and extension.non_root:
        asid = cpu.mmu.asid
    elif asid and (asid >= cpu.profile.asids or not cpu.state.efer & Efer.SVME):
        return None
    pcid = context >> _PCID_SHIFT & _PCID if what & _VALID_PCID else None
    if pcid and not cpu.state.cr4 & Cr4.PCIDE:
        return None
    return Selection(
        asid,
        pcid,
        _pages(what, extent, addresses) if what & _VALID_ADDRESS else None,
        bool(what & _INCLUDE_GLOBAL),
        bool(what & _INCLUDE_NESTED),
    )


def _pages(what: int, extent: int, addresses: int) -> tuple[int, ...]:
    """The page numbers: of the address and of those that follow, each a page or 2 MBytes on, among ``addresses``."""
    step = 1 << (_LARGE_SHIFT if extent & _BY_2_MBYTES else PAGE_SHIFT)
    return tuple((what + index * step & addresses) >> PAGE_SHIFT for index in range((extent & _COUNT) + 1))


def tlbsync(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """TLBSYNC: nothing is left to wait for."""
    require_feature(cpu, "INVLPGB")
    require_ring_0(cpu)
    if not cpu.intercepts(SIMPLE[Plain.TLBSYNC], instruction):
        cpu.retire(instruction)


HANDLERS: Final = {Mnemonic.INVLPGB: invlpgb, Mnemonic.TLBSYNC: tlbsync}
