"""Linear addresses as event delivery, IRET and task switches use them: memory behind paging, and canonical addresses.

Spec: SDM Vol. 3, "Access Rights" (supervisor-mode and user-mode accesses); SDM Vol. 1, "Canonical Addressing".
"""

from __future__ import annotations

from typing import Final, Protocol

from vtx.x86.outcome import gp
from vtx.x86.state import MASK32, MASK64, CpuState, Cr4

_LA57: Final = Cr4.LA57.value


class LinearMemory(Protocol):
    """Memory at linear addresses, paging applied; little-endian values.

    The default is an implicit supervisor access (descriptor tables, TSS). ``user`` marks an access made at CPL 3,
    ``ac`` an explicit one below CPL 3 with RFLAGS.AC set, which SMAP lets pass. An access may cross a page boundary.
    Either method raises `InstructionAborted` with the page fault (or what a hypervisor makes of it) when it is refused.
    """

    def read(self, linear: int, size: int, *, user: bool = False, ac: bool = False) -> int:
        """The value of ``size`` bytes at ``linear``."""
        ...

    def write(self, linear: int, size: int, value: int, *, user: bool = False, ac: bool = False) -> None:
        """Store the low ``size`` bytes of ``value`` at ``linear``."""
        ...

    def shadow_read(self, linear: int, size: int, *, user: bool) -> int:
        """The value of ``size`` bytes at ``linear``, by a shadow-stack access of user or supervisor mode."""
        ...

    def shadow_write(self, linear: int, size: int, value: int, *, user: bool) -> None:
        """Store the low ``size`` bytes of ``value`` at ``linear`` by a shadow-stack access."""
        ...


def linear_address_width(state: CpuState) -> int:
    """Bits of a linear address in IA-32e mode: 57 with 5-level paging, else 48."""
    return 57 if state.cr4 & _LA57 else 48


def is_canonical(address: int, width: int) -> bool:
    """Whether bits 63 to ``width`` - 1 of ``address`` are all equal."""
    return not ((address + (1 << width - 1)) & MASK64) >> width


def linear_code_address(state: CpuState, rip: int) -> int:
    """Linear address of ``rip`` in the code segment."""
    return rip if state.in_64_bit_mode else (state.cs.base + rip) & MASK32


def system_address(state: CpuState, base: int, offset: int, external: int = 0) -> int:
    """Linear address of byte ``offset`` of a system structure (GDT, LDT, IDT, TSS) at ``base``.

    Raises #GP for a non-canonical address in IA-32e mode, with no more in the error code than ``external``, the EXT bit
    while an event is delivered; outside it addresses wrap at 4 GiB.
    """
    if not state.long_mode:
        return (base + offset) & MASK32
    address = (base + offset) & MASK64
    if not is_canonical(address, linear_address_width(state)):
        raise gp(external)
    return address
