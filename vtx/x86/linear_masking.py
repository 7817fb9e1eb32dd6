"""Linear-address masking: bits of pointers to data that software may use for itself.

For pointers of user addresses (bit 63 is clear) CR3 says which bits, for those of supervisor addresses CR4.LAM_SUP. The
processor puts the bit below them in their place, and what follows sees nothing of them: whether the address is
canonical, paging, CR2. Instruction fetches and addresses that are not of operands are never masked.

Interpretation. Page faults, EPT violations and data breakpoints know the masked address alone.

Spec: SDM Vol. 3, "Linear-Address Pre-Processing".
"""

from __future__ import annotations

from typing import Final

from vtx.x86.state import CpuState, Cr4, Efer

CR3_LAM_U57: Final = 1 << 61
CR3_LAM_U48: Final = 1 << 62
CR3_LAM: Final = CR3_LAM_U57 | CR3_LAM_U48

Widths = tuple[int, int]
"""How many bits of a user address and of a supervisor address are left, 64 for all."""

_NONE: Final = 64
_BIT_63: Final = 1 << 63


def masking(cr3: int, cr4: int, efer: int) -> Widths | None:
    """What these registers leave of pointers to data; None if it is all of them."""
    if not efer & Efer.LMA or not (cr3 & CR3_LAM or cr4 & Cr4.LAM_SUP):
        return None
    user = 57 if cr3 & CR3_LAM_U57 else 48 if cr3 & CR3_LAM_U48 else _NONE
    supervisor = (57 if cr4 & Cr4.LA57 else 48) if cr4 & Cr4.LAM_SUP else _NONE
    return user, supervisor


def masked(address: int, widths: Widths) -> int:
    """``address`` with its upper bits, but for bit 63, replaced by the highest one that is left."""
    width = widths[address >> 63]
    if width == _NONE:
        return address
    low = (1 << width) - 1
    upper = _BIT_63 - 1 & ~low if address >> width - 1 & 1 else 0
    return address & (_BIT_63 | low) | upper


def data_address(state: CpuState, address: int) -> int:
    """The linear address that a pointer to data means now."""
    widths = masking(state.cr3, state.cr4, state.efer) if state.cr4 & Cr4.LAM_SUP or state.cr3 >> 61 else None
    return address if widths is None else masked(address, widths)
