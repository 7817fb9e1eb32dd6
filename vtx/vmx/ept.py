"""Extended page tables: translation of guest-physical addresses in VMX non-root operation.

Spec: SDM Vol. 3, "The Extended Page Table Mechanism (EPT)".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from attrs import evolve, field, frozen

from vtx.addresses import PAGE_OFFSET_MASK, PAGE_SHIFT, GuestPhysicalAddress, LinearAddress, PhysicalAddress
from vtx.vmx.sub_page_tables import SubPageEvent, SubPageTables
from vtx.x86.page_rights import EXECUTE_DISABLE, USER, WRITABLE
from vtx.x86.paging import NEVER, Level, PagedMemory
from vtx.x86.second_level import (
    AccessKind,
    Evidence,
    ReservedPageAccess,
    SecondLevelFault,
    SecondLevelPage,
    SubPageWrite,
    UsedEntry,
)

# EPT paging-structure entries (SDM Vol. 3, "EPT Translation Mechanism", the tables of entry formats).
READ: Final = 1 << 0
WRITE: Final = 1 << 1
EXECUTE: Final = 1 << 2
"""Execute access; with mode-based execute control, for supervisor-mode linear addresses only."""
MAPS_PAGE: Final = 1 << 7
ACCESSED: Final = 1 << 8
DIRTY: Final = 1 << 9
EXECUTE_USER: Final = 1 << 10
"""With mode-based execute control: execute access for user-mode linear addresses."""
SUPERVISOR_SHADOW_STACK_PAGE: Final = 1 << 60
SUB_PAGE_PERMISSIONS: Final = 1 << 61
SUPPRESS_VE: Final = 1 << 63
RESERVED_MEMORY_TYPES: Final = frozenset((2, 3, 7))

# Extended-page-table pointer (SDM Vol. 3, "Extended-Page-Table Pointer (EPTP)").
EPTP_ACCESSED_DIRTY: Final = 1 << 6
EPTP_SUPERVISOR_SHADOW_STACK: Final = 1 << 7

# Exit qualification for EPT violations (SDM Vol. 3, "Exit Qualification for EPT Violations").
QUALIFICATION_READ: Final = 1 << 0
QUALIFICATION_WRITE: Final = 1 << 1
QUALIFICATION_FETCH: Final = 1 << 2
QUALIFICATION_PERMISSIONS_SHIFT: Final = 3
QUALIFICATION_EXECUTABLE_USER: Final = 1 << 6
QUALIFICATION_LINEAR_VALID: Final = 1 << 7
QUALIFICATION_TRANSLATION: Final = 1 << 8
QUALIFICATION_USER_ADDRESS: Final = 1 << 9
QUALIFICATION_WRITABLE_PAGE: Final = 1 << 10
QUALIFICATION_EXECUTE_DISABLE_PAGE: Final = 1 << 11
QUALIFICATION_SHADOW_STACK: Final = 1 << 13
QUALIFICATION_SHADOW_STACK_PAGE: Final = 1 << 14
QUALIFICATION_ASYNCHRONOUS: Final = 1 << 16

_TAG_MODE_BASED: Final = 1 << 63
_TAG_HLAT: Final = 1 << 62


@frozen
class EptViolation(SecondLevelFault):
    """VM exit with reason 48, or a virtualization exception unless that is ``suppressed``.

    ``qualification`` is complete but for bits 12 (NMI unblocking due to IRET), 13 (shadow-stack access) and 16
    (asynchronous access).
    """

    qualification: int
    suppressed: bool = field(default=False, eq=False)

    @property
    def complete_qualification(self) -> int:
        """The qualification with the bits that say that it was a shadow-stack access, or an asynchronous one."""
        asynchronous = QUALIFICATION_ASYNCHRONOUS if self.asynchronous else 0
        return self.qualification | (QUALIFICATION_SHADOW_STACK if self.shadow_stack else 0) | asynchronous


@frozen
class EptMisconfiguration(SecondLevelFault):
    """VM exit with reason 49; it has no qualification and no guest-linear address.

    ``level`` names the misconfigured entry, found at physical ``entry_address`` with value ``entry``.
    """

    level: Level | None = field(default=None, eq=False)
    entry_address: int = field(default=0, eq=False)
    entry: int = field(default=0, eq=False)


@frozen
class PageModificationLogFull(SecondLevelFault):
    """VM exit with reason 62: an accessed or dirty flag for EPT would have to be set and the log has no room."""


_SHADOW_STACK_PAGE: Final = 1 << 16  # no permission bit

EptFault = EptViolation | EptMisconfiguration | PageModificationLogFull


@frozen
class EptConfig:
    """An EPT pointer and what the processor and the VM-execution controls make of it.

    ``execute_only``, ``page_2mb`` and ``page_1gb`` are capabilities; ``mode_based_execute`` and
    ``advanced_information`` (bits 11:9 of the qualification) are off unless the control or capability is on. ``hlat``
    tells translations with HLAT paging from those without.
    """

    eptp: int
    physical_address_width: int
    execute_only: bool = True
    page_2mb: bool = True
    page_1gb: bool = True
    mode_based_execute: bool = False
    advanced_information: bool = False
    hlat: bool = False

    walk_length: int = field(init=False, eq=False)
    accessed_dirty: bool = field(init=False, eq=False)
    supervisor_shadow_stack: bool = field(init=False, eq=False)

    @walk_length.default
    def _walk_length(self) -> int:
        return (self.eptp >> 3 & 7) + 1

    @accessed_dirty.default
    def _accessed_dirty(self) -> bool:
        return bool(self.eptp & EPTP_ACCESSED_DIRTY)

    @supervisor_shadow_stack.default
    def _supervisor_shadow_stack(self) -> bool:
        return bool(self.eptp & EPTP_SUPERVISOR_SHADOW_STACK)


def _bits(high: int, low: int) -> int:
    return (1 << high + 1) - (1 << low) if high >= low else 0


@functools.lru_cache(maxsize=16)
def _levels(config: EptConfig) -> tuple[Level, ...]:
    """The levels of the walk with their reserved bits; an unsupported page size makes bit 7 reserved."""
    high = _bits(51, config.physical_address_width)

    def directory(name: str, shift: int, large: bool) -> Level:
        if large:
            return Level(name, shift, MAPS_PAGE, high | _bits(6, 3), high | _bits(shift - 1, 12))
        return Level(name, shift, NEVER, high | _bits(7, 3), 0)

    levels = (
        directory("EPT PML5E", 48, False),
        directory("EPT PML4E", 39, False),
        directory("EPT PDPTE", 30, config.page_1gb),
        directory("EPT PDE", 21, config.page_2mb),
        Level("EPT PTE", 12, 0, 0, high),
    )
    return levels[-config.walk_length :]


@functools.lru_cache(maxsize=16)
def _illegal_permissions(config: EptConfig) -> frozenset[int]:
    """Values of the permission bits (2:0, and 10 under mode-based execute control) that are misconfigurations.

    Spec: SDM Vol. 3, "EPT Misconfigurations".
    """
    mask = READ | WRITE | EXECUTE | (EXECUTE_USER if config.mode_based_execute else 0)
    values = [value for value in range(mask + 1) if value & ~mask == 0 and value and not value & READ]
    return frozenset(value for value in values if value & WRITE or not config.execute_only)


class _Mapping(NamedTuple):
    """A successful walk: the physical address, the AND of the permission bits, the page size and the dirty flag."""

    physical: int
    permissions: int
    size: int
    dirty: bool


class ExtendedPageTables:
    """The second level of VMX non-root operation with "enable EPT".

    ``log_dirty`` is called with the guest-physical page address before a dirty flag is set (page-modification
    logging), with None before accessed flags alone are; it returns False when the log is full. None: no logging.
    Guest paging structures on ``apic_access_page`` are refused with `ReservedPageAccess` (SDM Vol. 3, "Guest-Physical
    Accesses to the APIC-Access Page").

    ``sub_pages`` are the tables of sub-page write permissions; None without the control. Writes to the guest-physical
    pages ``writable_sub_pages`` are taken for decided and allowed.
    """

    names_evidence = False
    walks_pdptes = False
    checks_shadow_stacks: bool

    def __init__(
        self,
        config: EptConfig,
        memory: PagedMemory,
        log_dirty: Callable[[GuestPhysicalAddress | None], bool] | None = None,
        *,
        apic_access_page: int | None = None,
        sub_pages: SubPageTables | None = None,
    ) -> None:
        if not 4 <= config.walk_length <= 5:
            raise ValueError(f"EPT page-walk length {config.walk_length} is not one VM entry accepts")
        self.config = config
        self.memory = memory
        self.log_dirty = log_dirty
        self.apic_access_page = apic_access_page
        self.sub_pages = sub_pages
        self.writable_sub_pages: frozenset[int] = frozenset()
        self._levels = _levels(config)
        self._illegal = _illegal_permissions(config)
        self._permission_mask = READ | WRITE | EXECUTE | (EXECUTE_USER if config.mode_based_execute else 0)
        self._frame_mask = _bits(config.physical_address_width - 1, 12)
        self._root = config.eptp & self._frame_mask
        self._accessed_dirty = config.accessed_dirty
        self.checks_shadow_stacks = config.supervisor_shadow_stack
        self._tag = (
            config.eptp | (_TAG_MODE_BASED if config.mode_based_execute else 0) | (_TAG_HLAT if config.hlat else 0)
        )
        # Guest paging-structure accesses count as writes when accessed and dirty flags are enabled.
        update = QUALIFICATION_READ | QUALIFICATION_WRITE
        self._structure_access = (update if self._accessed_dirty else QUALIFICATION_READ, update)

    @property
    def tag(self) -> int | None:
        """The EPTP, with bit 63 for mode-based execute control and bit 62 for HLAT."""
        return self._tag

    def paging_structure(
        self, address: GuestPhysicalAddress, update: bool, linear: LinearAddress | None
    ) -> PhysicalAddress | SecondLevelFault:
        """Translate the address of a guest paging-structure entry (see `SecondLevel`).

        Spec: SDM Vol. 3, "EPT Violations"; "Accessed and Dirty Flags for EPT".
        """
        access = self._structure_access[update]
        result = self._walk(address, access, access, linear, 0)
        if isinstance(result, SecondLevelFault):
            return result
        if result.physical & ~PAGE_OFFSET_MASK == self.apic_access_page:
            return ReservedPageAccess(address, None, AccessKind.WRITE if update else AccessKind.READ)
        return PhysicalAddress(result.physical)

    def evidence(self, used: Sequence[UsedEntry], page: GuestPhysicalAddress) -> Evidence | None:
        """See `SecondLevel`: walks under EPT are not remembered."""
        return None

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
        execute = EXECUTE_USER if rights & USER and self.config.mode_based_execute else EXECUTE
        needed = execute if kind is AccessKind.EXECUTE else kind.value
        if shadow_stack and self.checks_shadow_stacks:
            needed = _SHADOW_STACK_PAGE
        result = self._walk(address, kind.value, needed, linear, self._translation_detail(rights))
        if isinstance(result, SecondLevelFault):
            return result
        permissions = result.permissions & READ
        if result.permissions & WRITE and (result.dirty or not self._accessed_dirty):
            permissions |= AccessKind.WRITE
        if result.permissions & execute:
            permissions |= AccessKind.EXECUTE
        return SecondLevelPage(PhysicalAddress(result.physical & ~PAGE_OFFSET_MASK), permissions, result.size)

    def _translation_detail(self, rights: int) -> int:
        """Qualification bit 8 and, with advanced VM-exit information, bits 11:9."""
        detail = QUALIFICATION_TRANSLATION
        if self.config.advanced_information:
            detail |= QUALIFICATION_USER_ADDRESS if rights & USER else 0
            detail |= QUALIFICATION_WRITABLE_PAGE if rights & WRITABLE else 0
            detail |= QUALIFICATION_EXECUTE_DISABLE_PAGE if rights & EXECUTE_DISABLE else 0
        return detail

    def _walk(
        self, address: GuestPhysicalAddress, access: int, needed: int, linear: LinearAddress | None, detail: int
    ) -> _Mapping | EptFault | SubPageWrite:
        """Walk the tables. ``access`` is bits 2:0 of the qualification, ``needed`` the permission bits required.

        Instead of those, `_SHADOW_STACK_PAGE`: that the page is one for shadow stacks of the supervisor.

        Misconfigurations and absent entries are found from the root down; permissions are those of the whole walk.
        Accessed and dirty flags are set only by a walk that succeeds.
        """
        table = self._root
        if address >> self._levels[0].shift + 9:
            # A 4-level walk has no entry for guest-physical addresses beyond 48 bits.
            return self._violation(address, access, 0, linear, detail, SUPPRESS_VE)
        read = self.memory.read_u64
        permission_mask, frame_mask = self._permission_mask, self._frame_mask
        permissions = permission_mask
        unaccessed: list[int] | None = None
        for _name, shift, maps_page, reserved_table, reserved_page in self._levels:
            entry_address = table | (address >> shift & 0x1FF) << 3
            entry = read(entry_address)
            above, permissions = permissions, permissions & entry
            present = entry & permission_mask
            if not present:
                return self._violation(address, access, 0, linear, detail, entry)
            if present in self._illegal:
                return self._misconfiguration(address, linear, shift, entry_address, entry)
            if entry & maps_page == maps_page:
                if entry & reserved_page or entry >> 3 & 7 in RESERVED_MEMORY_TYPES:
                    return self._misconfiguration(address, linear, shift, entry_address, entry)
                break
            if entry & reserved_table:
                return self._misconfiguration(address, linear, shift, entry_address, entry)
            if not entry & ACCESSED:
                unaccessed = [*(unaccessed or ()), entry_address]
            table = entry & frame_mask

        if needed == _SHADOW_STACK_PAGE:
            refused = not (permissions & READ and above & WRITE and entry & SUPERVISOR_SHADOW_STACK_PAGE)
        else:
            refused = bool(needed & ~permissions)
        if refused:
            if self.checks_shadow_stacks and entry & SUPERVISOR_SHADOW_STACK_PAGE:
                detail |= QUALIFICATION_SHADOW_STACK_PAGE
            violation = self._violation(address, access, permissions, linear, detail, entry)
            # Paging structures are never written without being read, and so never eligible.
            if access != QUALIFICATION_WRITE or not self._has_sub_pages(shift, entry, permissions):
                return violation
            if address & ~PAGE_OFFSET_MASK not in self.writable_sub_pages:
                return self._sub_page_write(violation, unaccessed or [], entry_address, entry)
            permissions |= WRITE
        dirty = bool(entry & DIRTY)
        if self._accessed_dirty:
            wanted = ACCESSED | DIRTY if access & QUALIFICATION_WRITE else ACCESSED
            if unaccessed is not None or entry & wanted != wanted:
                if not self._set_flags(address, unaccessed or [], entry_address, wanted, dirty):
                    return PageModificationLogFull(address, linear)
                dirty = dirty or bool(wanted & DIRTY)
        offset_mask = (1 << shift) - 1
        return _Mapping(entry & frame_mask & ~offset_mask | address & offset_mask, permissions, 1 << shift, dirty)

    def _misconfiguration(
        self, address: GuestPhysicalAddress, linear: LinearAddress | None, shift: int, entry_address: int, entry: int
    ) -> EptMisconfiguration:
        level = next(level for level in self._levels if level.shift == shift)
        return EptMisconfiguration(address, linear, level, entry_address, entry)

    def _violation(
        self,
        address: GuestPhysicalAddress,
        access: int,
        permissions: int,
        linear: LinearAddress | None,
        detail: int,
        entry: int,
    ) -> EptViolation:
        """The one place that assembles the qualification. ``detail`` counts only with a valid linear address.

        ``entry`` is the one at which the walk ended: not present, or mapping the page.
        """
        qualification = access | (permissions & (READ | WRITE | EXECUTE)) << QUALIFICATION_PERMISSIONS_SHIFT
        if permissions & EXECUTE_USER:
            qualification |= QUALIFICATION_EXECUTABLE_USER
        if linear is not None:
            qualification |= QUALIFICATION_LINEAR_VALID | detail
        return EptViolation(address, linear, qualification, bool(entry & SUPPRESS_VE))

    def _has_sub_pages(self, shift: int, entry: int, permissions: int) -> bool:
        """Whether a write that EPT refuses is eligible for sub-page write permissions."""
        return bool(
            self.sub_pages is not None and shift == PAGE_SHIFT and entry & SUB_PAGE_PERMISSIONS and permissions & READ
        )

    def _sub_page_write(
        self, violation: EptViolation, unaccessed: list[int], entry_address: int, entry: int
    ) -> SubPageWrite:
        """Leave it to the exact bytes of a write whether it is ``violation`` or allowed after all."""
        address, linear = violation.guest_physical, violation.linear

        def decide(size: int) -> PhysicalAddress | SecondLevelFault:
            assert self.sub_pages is not None
            allowed = self.sub_pages.allows(address, size)
            if isinstance(allowed, SubPageEvent):
                return evolve(allowed, linear=linear)
            if not allowed:
                return violation
            physical = PhysicalAddress(entry & self._frame_mask | address & PAGE_OFFSET_MASK)
            if self._accessed_dirty and not self._set_flags(
                address, unaccessed, entry_address, ACCESSED | DIRTY, bool(entry & DIRTY)
            ):
                return PageModificationLogFull(address, linear)
            if physical & ~PAGE_OFFSET_MASK == self.apic_access_page:
                return ReservedPageAccess(address, linear, AccessKind.WRITE)
            return physical

        return SubPageWrite(address, linear, decide)

    def _set_flags(
        self, address: GuestPhysicalAddress, unaccessed: list[int], leaf: int, wanted: int, was_dirty: bool
    ) -> bool:
        """Set accessed flags and the leaf's flags; False, with nothing set, when the page-modification log is full.

        A full log keeps accessed flags from being set, too, although only dirty flags are logged.

        Spec: SDM Vol. 3, "Accessed and Dirty Flags for EPT"; "Page-Modification Logging".
        """
        if self.log_dirty is not None:
            newly_dirty = wanted & DIRTY and not was_dirty
            if not self.log_dirty(GuestPhysicalAddress(address & ~PAGE_OFFSET_MASK) if newly_dirty else None):
                return False
        memory = self.memory
        for entry_address in unaccessed:
            memory.write_u64(entry_address, memory.read_u64(entry_address) | ACCESSED)
        memory.write_u64(leaf, memory.read_u64(leaf) | wanted)
        return True
