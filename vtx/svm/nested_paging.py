"""Nested paging: translation of guest-physical addresses by page tables in the format of the host's paging mode.

A nested walk is a walk like any other (`vtx.x86.paging.walk`): its root is N_CR3, its control registers are the host's
at VMRUN, and every access counts as one of user mode. What it refuses is a #NPF instead of a page fault.

With the guest mode execute trap, U/S of a nested page says who may fetch instructions from it: user mode if it is set,
else supervisor mode, by the guest's privilege level whatever the guest's own page tables say. Fetches are reported as
what they are.

Interpretations. Under the guest mode execute trap, U/S means nothing to other accesses, which are reported as those of
user mode all the same. A fetch is reported as one where it is without the trap: with NX or SMEP in the host.

Spec: APM Vol. 2, "Nested Paging", "Nested Table Walk", "Nested versus Guest Page Faults, Fault Ordering", "Guest Mode
Execute Trap Extension".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from attrs import frozen

from vtx.addresses import PAGE_OFFSET_MASK, PAGE_SHIFT, GuestPhysicalAddress, LinearAddress, PhysicalAddress
from vtx.x86.memory import PhysicalMemory
from vtx.x86.page_rights import FETCHED_BY_SUPERVISOR, FETCHED_BY_USER, USER, Privilege
from vtx.x86.paging import PageFault, PageFaultError, PagingContext, PagingMode, Translation, WalkStep, walk
from vtx.x86.second_level import (
    AccessKind,
    Evidence,
    IdentitySecondLevel,
    SecondLevelFault,
    SecondLevelPage,
    UsedEntry,
)
from vtx.x86.state import CpuState, Cr0, Cr4, Efer
from vtx.x86.walk_memory import WalkMemory

FINAL_TRANSLATION: Final = 1 << 32
"""EXITINFO1 of #NPF: the fault came while translating the guest's final physical address."""
TABLE_WALK: Final = 1 << 33
"""EXITINFO1 of #NPF: the fault came while translating the address of a guest page table."""

NO_SECOND_LEVEL: Final = IdentitySecondLevel()

_WR, _US, _ID = (each.value for each in (PageFaultError.WR, PageFaultError.US, PageFaultError.ID))
_ADDRESS_BITS: Final = {
    PagingMode.BITS_32: 32,
    PagingMode.PAE: 32,
    PagingMode.LEVEL_4: 48,
    PagingMode.LEVEL_5: 57,
}
# Bits of the tag: what besides the root tells nested page tables apart.
_TAG_NXE, _TAG_LONG, _TAG_PAE, _TAG_PSE, _TAG_LA57, _TAG_GMET, _TAG_APIC = (1 << bit for bit in range(7))
_TAG_APIC_SHIFT: Final = 52  # above the root: the number of the APIC page
APIC_ACCESS: Final = PhysicalAddress(1 << 52)
"""Where the guest's APIC page is put: no address that memory has, reserved in the MMU."""


@frozen
class NestedPageFault(SecondLevelFault):
    """#NPF; ``error`` is EXITINFO1."""

    error: int


class NestedPaging:
    """The second level of a guest with NP_ENABLE, for the host's control registers as they are in ``host``.

    ``gmet`` is the guest mode execute trap.

    ``apic_page`` is the number of the guest-physical page of AVIC's registers, None without one: the nested page tables
    say whether it may be accessed, but not where it is.

    Walks are remembered together with the entries they read, and where guest page tables are until `begin`: processors
    cache nested translations too, and hypervisors that change them flush before the next VMRUN.
    """

    names_evidence = True
    walks_pdptes = True
    checks_shadow_stacks = False

    def __init__(
        self,
        n_cr3: int,
        host: CpuState,
        memory: PhysicalMemory,
        physical_address_width: int,
        *,
        page1gb: bool,
        gmet: bool,
        apic_page: int | None = None,
    ) -> None:
        self.memory = memory
        self.host_cr4, self.host_efer = host.cr4, host.efer
        self.inputs = n_cr3, host.cr4, host.efer, gmet, apic_page
        self._apic_page = apic_page
        self._walks = WalkMemory(memory)
        self._walks.select((), remembers=True)
        self.structures: dict[int, int] = {}
        self._gmet = gmet
        self._context = PagingContext(
            int(Cr0.PG | Cr0.WP),
            n_cr3,
            host.cr4 & int(Cr4.PSE | Cr4.PAE | Cr4.LA57 | Cr4.SMEP),
            host.efer & int(Efer.LMA | Efer.NXE),
            physical_address_width,
            page1gb=page1gb,
            pdptes_in_memory=True,
            amd=True,
        )
        self._limit = _ADDRESS_BITS[self._context.mode]
        self._tag = n_cr3 & ((1 << 52) - 0x1000) | self._configuration(host)
        if apic_page is not None:
            self._tag |= apic_page << _TAG_APIC_SHIFT | _TAG_APIC
        if gmet:
            self._fetch_context = PagingContext(
                int(Cr0.PG | Cr0.WP),
                n_cr3,
                self._context.cr4 | Cr4.SMEP,
                self._context.efer,
                physical_address_width,
                page1gb=page1gb,
                pdptes_in_memory=True,
                amd=True,
            )

    def _configuration(self, host: CpuState) -> int:
        return (
            (_TAG_NXE if host.efer & Efer.NXE else 0)
            | (_TAG_LONG if host.efer & Efer.LMA else 0)
            | (_TAG_PAE if host.cr4 & Cr4.PAE else 0)
            | (_TAG_PSE if host.cr4 & Cr4.PSE else 0)
            | (_TAG_LA57 if host.cr4 & Cr4.LA57 else 0)
            | (_TAG_GMET if self._gmet else 0)
        )

    def begin(self) -> None:
        """A VMRUN begins: forget where guest page tables are."""
        self.structures.clear()

    @property
    def tag(self) -> int | None:
        """The root, and what of the host's paging mode matters."""
        return self._tag

    def paging_structure(
        self, address: GuestPhysicalAddress, update: bool, linear: LinearAddress | None
    ) -> PhysicalAddress | SecondLevelFault:
        """Translate the address of a guest paging-structure entry: always a write (see `SecondLevel`)."""
        page = self.structures.get(address >> PAGE_SHIFT)
        if page is None:
            result = self._walk(address, AccessKind.WRITE, user=True)
            if isinstance(result, int):
                return NestedPageFault(address, linear, result | TABLE_WALK)
            page = self.structures[address >> PAGE_SHIFT] = result.physical
        return PhysicalAddress(page | address & PAGE_OFFSET_MASK)

    def evidence(self, used: Sequence[UsedEntry], page: GuestPhysicalAddress) -> Evidence | None:
        """See `SecondLevel`. The nested walks have to be remembered, and where the entries are to rest on them."""
        read: list[tuple[int, int]] = []
        beneath: dict[tuple[int, int], None] = {}
        for entry in used:
            number = entry.address >> PAGE_SHIFT
            nested, located = self._walks.remembered(number), self.structures.get(number)
            if nested is None or nested[0].physical != located:
                return None
            read.append((located | entry.address & PAGE_OFFSET_MASK, entry.value))
            beneath.update(dict.fromkeys(nested[1]))
        nested = self._walks.remembered(page >> PAGE_SHIFT)
        if nested is None:
            return None
        beneath.update(dict.fromkeys(nested[1]))
        return Evidence(read, tuple(beneath))

    def translate(
        self,
        address: GuestPhysicalAddress,
        kind: AccessKind,
        linear: LinearAddress,
        rights: int,
        user: bool = False,
        shadow_stack: bool = False,
    ) -> SecondLevelPage | SecondLevelFault:
        """Translate the translation of a linear address (see `SecondLevel`)."""
        result = self._walk(address, kind, user=user)
        if isinstance(result, int):
            return NestedPageFault(address, linear, result | FINAL_TRANSLATION)
        physical = APIC_ACCESS if address >> PAGE_SHIFT == self._apic_page else result.physical
        attributes = 0
        if self._gmet:
            attributes = FETCHED_BY_USER if result.attributes & USER else FETCHED_BY_SUPERVISOR
        # With the trap, as a page of user mode: who may fetch from it is among the attributes.
        permissions = self._context.permissions[Privilege.USER][result.attributes | (USER if self._gmet else 0)]
        return SecondLevelPage(physical, permissions & result.cacheable, result.size, attributes)

    def _walk(self, address: GuestPhysicalAddress, kind: AccessKind, *, user: bool) -> Translation | int:
        """The nested translation, or the page-fault error code of the nested walk."""
        context, privilege, reported = self._context, Privilege.USER, _US
        if self._gmet:
            if kind is not AccessKind.EXECUTE:
                privilege = Privilege.SUPERVISOR
            elif not user:
                context, privilege, reported = self._fetch_context, Privilege.SUPERVISOR, 0
        if address >> self._limit:
            return self._report(kind, reported)
        page = address >> PAGE_SHIFT
        recalled = self._walks.recall(page)
        if recalled is not None and context.permissions[privilege][recalled.attributes] & recalled.cacheable & kind:
            return recalled
        steps: list[WalkStep] | None = [] if self._walks.wants(page) else None
        found = walk(context, LinearAddress(address), kind, privilege, self.memory, NO_SECOND_LEVEL, steps)
        if isinstance(found, Translation):
            if steps is not None:
                self._walks.remember(page, found, NO_SECOND_LEVEL.evidence(steps, found.guest_physical))
            return found
        assert isinstance(found, PageFault)
        return found.error_code & ~_ID | self._report(kind, reported)

    def _report(self, kind: AccessKind, privilege: int) -> int:
        """The bits of the error code that say what the access was: ``privilege`` is US or nothing."""
        if kind is AccessKind.WRITE:
            return privilege | _WR
        return privilege | _ID if kind is AccessKind.EXECUTE and self._context.reports_fetch else privilege
