"""Second-level address translation as the page walker sees it: EPT, nested paging, or none.

Everything the walker touches with a guest-physical address goes through a `SecondLevel`: the paging-structure entries
it reads, the accessed and dirty flags it sets, and at last the page itself. These are two different kinds of access,
and every vendor treats them differently, so the protocol has one method for each.

Spec: SDM Vol. 3, "The Extended Page Table Mechanism (EPT)"; APM Vol. 2, "Nested Paging".
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from attrs import field, frozen

from vtx.addresses import PAGE_OFFSET_MASK, GuestPhysicalAddress, LinearAddress, PhysicalAddress


class AccessKind(enum.IntEnum):
    """How memory is accessed. The values are also the bits of a permission mask (see `ALL_PERMISSIONS`)."""

    READ = 1
    WRITE = 2
    EXECUTE = 4


ALL_PERMISSIONS: Final = 7


@frozen
class SecondLevelFault:
    """An access the second level refused; each vendor derives its own closed set from this base.

    ``guest_physical`` is exact to the byte. ``linear`` is the linear address being translated (None when there is
    none: the load of the PAE page-directory-pointer-table entries). ``shadow_stack`` marks a shadow-stack access,
    ``shadow_stack_busy`` is that of `vtx.x86.outcome.Fault`. ``asynchronous``: neither an instruction nor the delivery
    of an event through the IDT made the access.
    """

    guest_physical: GuestPhysicalAddress
    linear: LinearAddress | None
    shadow_stack: bool = field(default=False, kw_only=True)
    shadow_stack_busy: bool = field(default=False, kw_only=True, eq=False)
    asynchronous: bool = field(default=False, kw_only=True, eq=False)


@frozen
class ReservedPageAccess(SecondLevelFault):
    """An access to the page that the virtualization extension reserves (VMX: the APIC-access page).

    ``linear`` is None for an access by guest-physical address: to a paging structure. Without a second level,
    ``guest_physical`` is the physical address.
    """

    kind: AccessKind


@frozen
class SubPageWrite(SecondLevelFault):
    """A write to a page whose parts are protected one by one, so that its exact bytes decide.

    ``decide`` takes the number of bytes written from ``guest_physical`` on, all in this page. It gives the physical
    address, with flags set as the write does, or the fault.
    """

    decide: Callable[[int], PhysicalAddress | SecondLevelFault] = field(eq=False, repr=False)


@frozen
class SecondLevelPage:
    """Where a guest-physical page is.

    ``physical`` is the 4-KByte-aligned address of the 4-KByte page that holds the access. ``permissions`` is the mask
    of `AccessKind` that may be cached: a page whose dirty flag is still clear has no WRITE here, so that the first
    write comes back to the walker. ``size`` is the size in bytes of the page that maps it. ``attributes`` are added to
    those of the guest's page: who alone may fetch instructions from it, where that depends on the privilege level.
    """

    physical: PhysicalAddress
    permissions: int
    size: int
    attributes: int = 0


@frozen
class Evidence:
    """What a translation rests on: entries ``read``, by physical address, and those ``beneath``, by offset in RAM.

    The latter are the entries of the second level. Each comes with its value.
    """

    read: Sequence[tuple[int, int]]
    beneath: Sequence[tuple[int, int]] = ()


class UsedEntry(Protocol):
    """A paging-structure entry that a walk has used, by guest-physical address."""

    @property
    def address(self) -> GuestPhysicalAddress:
        """Where it is."""
        ...

    @property
    def value(self) -> int:
        """Its value."""
        ...


class SecondLevel(Protocol):
    """Translates guest-physical addresses. ``tag`` identifies the translation in TLB tags; None means there is none.

    Bits 51:12 of a tag are the physical address of the root; the other bits distinguish configurations.
    """

    names_evidence: bool
    """Whether it is worth asking for `evidence`."""

    walks_pdptes: bool
    """Whether walks under PAE paging read the PDPTEs from memory, instead of registers that MOV to CR3 loads."""

    checks_shadow_stacks: bool
    """Whether it treats shadow-stack accesses of supervisor mode differently, so that each must ask for itself."""

    @property
    def tag(self) -> int | None:
        """Identity of this translation, for TLB tags."""
        ...

    def paging_structure(
        self, address: GuestPhysicalAddress, update: bool, linear: LinearAddress | None
    ) -> PhysicalAddress | SecondLevelFault:
        """Translate the address of a guest paging-structure entry.

        ``update`` tells an update of its accessed or dirty flag from a read.
        """
        ...

    def evidence(self, used: Sequence[UsedEntry], page: GuestPhysicalAddress) -> Evidence | None:
        """What a translation to ``page`` rests on that has just ``used`` these entries; None if that is not known."""
        ...

    def translate(
        self,
        address: GuestPhysicalAddress,
        kind: AccessKind,
        linear: LinearAddress,
        rights: int,
        user: bool = False,
        shadow_stack: bool = False,
    ) -> SecondLevelPage | SecondLevelFault:
        """Translate the address that ``linear`` translates to; ``rights`` are those of the guest's page.

        ``rights`` has the layout of `vtx.x86.page_rights`: some second levels treat user-mode pages differently.
        ``user`` tells accesses of user mode from those of supervisor mode; ``shadow_stack`` is set for shadow-stack
        accesses of supervisor mode.
        """
        ...


class IdentitySecondLevel:
    """No second level: guest-physical addresses are physical addresses."""

    names_evidence = True
    walks_pdptes = False
    checks_shadow_stacks = False

    @property
    def tag(self) -> int | None:
        """There is no second level to tag."""
        return None

    def paging_structure(
        self,
        address: GuestPhysicalAddress,
        update: bool,
        linear: LinearAddress | None,
    ) -> PhysicalAddress | SecondLevelFault:
        """The address itself."""
        return PhysicalAddress(address)

    def evidence(self, used: Sequence[UsedEntry], page: GuestPhysicalAddress) -> Evidence | None:
        """The entries alone."""
        return Evidence([(entry.address, entry.value) for entry in used])

    def translate(
        self,
        address: GuestPhysicalAddress,
        kind: AccessKind,
        linear: LinearAddress,
        rights: int,
        user: bool = False,
        shadow_stack: bool = False,
    ) -> SecondLevelPage | SecondLevelFault:
        """The page of the address, with every permission."""
        return SecondLevelPage(PhysicalAddress(address & ~PAGE_OFFSET_MASK), ALL_PERMISSIONS, 1 << 52)
