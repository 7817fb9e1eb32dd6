"""Paging: from a linear address to a physical page, by the plain walk of the paging structures.

This is the specification that the software TLB (`vtx.x86.tlb`) must agree with. One loop serves all modes; what differs
between them (levels, entry size, reserved bits, where a page may be mapped) is data, in a `Geometry`.

Spec: SDM Vol. 3, "Paging".
"""

from __future__ import annotations

import enum
import functools
from typing import Final, NamedTuple, Protocol

from attrs import evolve, field, frozen

from vtx.addresses import PAGE_OFFSET_MASK, PAGE_SIZE, GuestPhysicalAddress, LinearAddress, PhysicalAddress
from vtx.x86.page_rights import (
    EXECUTE_DISABLE,
    KEY_SHIFT,
    PROTECTION_KEYS,
    SHADOW_STACK,
    USER,
    WRITABLE,
    PermissionControls,
    PermissionTable,
    Privilege,
    key_permissions,
    permission_table,
)
from vtx.x86.second_level import AccessKind, SecondLevel, SecondLevelFault
from vtx.x86.state import Cr0, Cr4, Efer

PRESENT: Final = 1 << 0
ACCESSED: Final = 1 << 5
DIRTY: Final = 1 << 6
PAGE_SIZE_BIT: Final = 1 << 7
GLOBAL: Final = 1 << 8
RESTART: Final = 1 << 11
"""Of an entry used by HLAT paging: translate by ordinary paging instead; other paging ignores the bit."""
XD: Final = 1 << 63
PROTECTION_KEY_SHIFT: Final = 59

READ_EXECUTE: Final = AccessKind.READ | AccessKind.EXECUTE

# What each register contributes to paging; changes of other bits leave every translation alone.
CR0_PAGING: Final = Cr0.PG | Cr0.WP
CR4_PAGING: Final = (
    Cr4.PSE | Cr4.PAE | Cr4.PGE | Cr4.LA57 | Cr4.PCIDE | Cr4.SMEP | Cr4.SMAP | Cr4.PKE | Cr4.PKS | Cr4.LAM_SUP
)
EFER_PAGING: Final = Efer.LMA | Efer.NXE


class PageFaultError(enum.IntEnum):
    """Page-fault error code (SDM Vol. 3, "Page-Fault Exceptions")."""

    P = 1 << 0
    WR = 1 << 1
    US = 1 << 2
    RSVD = 1 << 3
    ID = 1 << 4
    PK = 1 << 5
    SS = 1 << 6
    HLAT = 1 << 7


class PagingMode(enum.Enum):
    """The paging modes, and paging disabled."""

    NONE = enum.auto()
    BITS_32 = enum.auto()
    PAE = enum.auto()
    LEVEL_4 = enum.auto()
    LEVEL_5 = enum.auto()


class Level(NamedTuple):
    """One level of paging structures.

    ``shift``: the lowest linear-address bit of the index. An entry maps a page when all ``maps_page`` bits are set in
    it (none for a page-table entry; `NEVER` where only tables may be referenced). ``reserved_table`` and
    ``reserved_page`` are the reserved bits of an entry that references a table or maps a page.
    """

    name: str
    shift: int
    maps_page: int
    reserved_table: int
    reserved_page: int


NEVER: Final = 1 << 64
"""A bit no entry has."""


class Geometry(NamedTuple):
    """The paging structures of one mode for one processor.

    ``entry_shift`` is log2 of the entry size in bytes, ``index_mask`` selects an index, ``linear_mask`` the linear
    address bits translated, ``frame_mask`` the physical-address bits of an entry.
    """

    mode: PagingMode
    levels: tuple[Level, ...]
    entry_shift: int
    index_mask: int
    linear_mask: int
    frame_mask: int


def _bits(high: int, low: int) -> int:
    """Mask of bits high:low; empty when high < low."""
    return (1 << high + 1) - (1 << low) if high >= low else 0


def _levels_32(width: int, pse: bool) -> tuple[Level, ...]:
    # PSE-36: M is the smaller of 40 and MAXPHYADDR; bits (M-20):13 extend the address, bits 21:(M-19) are reserved.
    large = _bits(21, min(40, width) - 19)
    return (
        Level("PDE", 22, PAGE_SIZE_BIT if pse else NEVER, 0, large),
        Level("PTE", 12, 0, 0, 0),
    )


def _levels_64(mode: PagingMode, width: int, nxe: bool, page1gb: bool, amd: bool) -> tuple[Level, ...]:
    # PAE entries reserve everything above the address but XD; in IA-32e modes bits 62:52 are ignored (or the key).
    high = _bits(62, width) if mode is PagingMode.PAE else _bits(51, width)
    high |= 0 if nxe else XD
    # Where no page can be mapped, AMD processors reserve the global bit too.
    never_pages = high | PAGE_SIZE_BIT | (GLOBAL if amd else 0)
    levels = (
        Level("PML5E", 48, NEVER, never_pages, 0),
        Level("PML4E", 39, NEVER, never_pages, 0),
        Level("PDPTE", 30, PAGE_SIZE_BIT, high, high | _bits(29, 13))
        if page1gb
        else Level("PDPTE", 30, NEVER, high | PAGE_SIZE_BIT, 0),
        Level("PDE", 21, PAGE_SIZE_BIT, high, high | _bits(20, 13)),
        Level("PTE", 12, 0, 0, high),
    )
    first = {PagingMode.LEVEL_5: 0, PagingMode.LEVEL_4: 1, PagingMode.PAE: 3}[mode]
    return levels[first:]


@functools.lru_cache(maxsize=64)
def geometry(
    mode: PagingMode, width: int, nxe: bool, pse: bool, page1gb: bool, amd: bool = False, restarts: bool = False
) -> Geometry:
    """The paging structures of ``mode`` with physical addresses of ``width`` bits.

    With ``restarts``, an entry that restarts HLAT paging stops the walk as one with a reserved bit does.

    Spec: SDM Vol. 3, "32-Bit Paging", "PAE Paging", "4-Level Paging and 5-Level Paging" (the tables of entry formats).
    """
    if mode is PagingMode.NONE:
        return Geometry(mode, (), 0, 0, _bits(31, 0), 0)
    if mode is PagingMode.BITS_32:
        return Geometry(mode, _levels_32(width, pse), 2, 0x3FF, _bits(31, 0), _bits(31, 12))
    linear_bits = {PagingMode.PAE: 32, PagingMode.LEVEL_4: 48, PagingMode.LEVEL_5: 57}[mode]
    levels = _levels_64(mode, width, nxe, page1gb, amd)
    if restarts:
        levels = tuple(
            level._replace(reserved_table=level.reserved_table | RESTART, reserved_page=level.reserved_page | RESTART)
            for level in levels
        )
    return Geometry(mode, levels, 3, 0x1FF, _bits(linear_bits - 1, 0), _bits(width - 1, 12))


def paging_mode(cr0: int, cr4: int, efer: int) -> PagingMode:
    """The paging mode the control registers select (SDM Vol. 3, "Paging-Mode Enabling")."""
    if not cr0 & Cr0.PG:
        return PagingMode.NONE
    if not cr4 & Cr4.PAE:
        return PagingMode.BITS_32
    if not efer & Efer.LMA:
        return PagingMode.PAE
    return PagingMode.LEVEL_5 if cr4 & Cr4.LA57 else PagingMode.LEVEL_4


@frozen
class PagingContext:
    """Everything but memory that a translation depends on.

    ``pdptrs`` are the four PDPTE registers of PAE paging, unless ``pdptes_in_memory``: then each walk reads its PDPTE,
    as in nested paging (APM Vol. 2, "Legacy PAE Mode"). ``amd``: reserved bits are those of AMD processors;
    ``restarts``: the walk stops at entries that restart HLAT paging.
    ``physical_address_width`` is MAXPHYADDR, in bits.
    The attributes below the blank line are derived.

    Spec: SDM Vol. 3, "Paging Modes and Control Bits".
    """

    cr0: int
    cr3: int
    cr4: int
    efer: int
    physical_address_width: int
    pdptrs: tuple[int, int, int, int] = (0, 0, 0, 0)
    pkru: int = 0
    pkrs: int = 0
    page1gb: bool = True
    pdptes_in_memory: bool = False
    amd: bool = False
    restarts: bool = False

    mode: PagingMode = field(init=False, eq=False)
    geometry: Geometry = field(init=False, eq=False)
    root: int = field(init=False, eq=False)
    controls: PermissionControls = field(init=False, eq=False)
    permissions: PermissionTable = field(init=False, eq=False, repr=False)
    reports_fetch: bool = field(init=False, eq=False)
    pge: bool = field(init=False, eq=False)

    @mode.default
    def _mode(self) -> PagingMode:
        return paging_mode(self.cr0, self.cr4, self.efer)

    @geometry.default
    def _geometry(self) -> Geometry:
        nxe, pse = bool(self.efer & Efer.NXE), bool(self.cr4 & Cr4.PSE)
        return geometry(self.mode, self.physical_address_width, nxe, pse, self.page1gb, self.amd, self.restarts)

    @root.default
    def _root(self) -> int:
        return self.cr3 & self.geometry.frame_mask

    @controls.default
    def _controls(self) -> PermissionControls:
        keys = self.mode in (PagingMode.LEVEL_4, PagingMode.LEVEL_5)
        return PermissionControls(
            paging=self.mode is not PagingMode.NONE,
            wp=bool(self.cr0 & Cr0.WP),
            smep=bool(self.cr4 & Cr4.SMEP),
            smap=bool(self.cr4 & Cr4.SMAP),
            pkru=self.pkru if keys and self.cr4 & Cr4.PKE else None,
            pkrs=self.pkrs if keys and self.cr4 & Cr4.PKS else None,
        )

    @permissions.default
    def _permissions(self) -> PermissionTable:
        return permission_table(self.controls)

    @reports_fetch.default
    def _reports_fetch(self) -> bool:
        # Error-code bit I/D: only where a fetch can be told from a read at all.
        return bool(self.cr4 & Cr4.SMEP or (self.cr4 & Cr4.PAE and self.efer & Efer.NXE))

    @pge.default
    def _pge(self) -> bool:
        return bool(self.cr4 & Cr4.PGE)


@frozen
class Translation:
    """A linear page and all that a TLB entry must remember of it.

    ``physical`` and ``guest_physical`` are addresses of 4-KByte pages, ``size`` the size in bytes of the page that the
    paging structures map. ``attributes`` are the rights, the protection key and who may fetch (see
    `vtx.x86.page_rights`). ``cacheable`` is the mask of `AccessKind` that the second level and the dirty flag allow
    without another walk.
    """

    physical: PhysicalAddress
    guest_physical: GuestPhysicalAddress
    size: int
    attributes: int
    cacheable: int
    dirty: bool
    global_: bool

    def permissions(self, context: PagingContext, privilege: Privilege) -> int:
        """Mask of `AccessKind` that accesses of ``privilege`` may make without another walk."""
        return context.permissions[privilege][self.attributes] & self.cacheable

    @property
    def user(self) -> bool:
        """A user-mode address: U/S is set in every entry used."""
        return bool(self.attributes & USER)

    @property
    def writable(self) -> bool:
        """R/W is set in every entry used."""
        return bool(self.attributes & WRITABLE)

    @property
    def execute_disable(self) -> bool:
        """XD is set in some entry used."""
        return bool(self.attributes & EXECUTE_DISABLE)

    @property
    def protection_key(self) -> int:
        """The protection key, 0 in modes that have none."""
        return self.attributes >> KEY_SHIFT & PROTECTION_KEYS - 1


@frozen
class PageFault:
    """The translation ends in #PF with ``error_code``; ``linear`` is the new CR2."""

    linear: LinearAddress
    error_code: int


@frozen
class WalkStep:
    """One paging-structure entry used by a walk: its name, guest-physical address and value when read."""

    name: str
    address: GuestPhysicalAddress
    value: int


@frozen
class InvalidPdpte:
    """Loading the PDPTE registers found a present entry with reserved bits set: #GP(0)."""

    index: int
    value: int


class PagedMemory(Protocol):
    """The physical memory a walk needs."""

    def read_u64(self, address: int) -> int:
        """The 8-byte value at ``address``."""
        ...

    def write_u64(self, address: int, value: int) -> None:
        """Store an 8-byte value."""
        ...

    def read_u32(self, address: int) -> int:
        """The 4-byte value at ``address``."""
        ...

    def write_u32(self, address: int, value: int) -> None:
        """Store a 4-byte value."""
        ...


def _page_fault(context: PagingContext, linear: int, kind: AccessKind, privilege: Privilege, cause: int) -> PageFault:
    """A page fault whose error code adds the access to its ``cause`` (P, RSVD and PK bits)."""
    code = cause
    if kind is AccessKind.WRITE:
        code |= PageFaultError.WR
    if privilege.user:
        code |= PageFaultError.US
    if privilege.shadow_stack:
        code |= PageFaultError.SS
    if kind is AccessKind.EXECUTE and context.reports_fetch:
        code |= PageFaultError.ID
    return PageFault(LinearAddress(linear), code)


# Members of an enumeration are slow to look up.
_USER_MODE: Final = Privilege.USER
_USER_SHADOW_STACK: Final = Privilege.USER_SHADOW_STACK
_SUPERVISOR_SHADOW_STACK: Final = Privilege.SUPERVISOR_SHADOW_STACK
_SHADOWING: Final = DIRTY | WRITABLE
_NOT_PRESENT: Final = 0
_PROTECTION: Final = PageFaultError.P.value
_RESERVED: Final = PageFaultError.P | PageFaultError.RSVD
_KEY: Final = PageFaultError.P | PageFaultError.PK


def _without_paging(
    linear: LinearAddress, kind: AccessKind, privilege: Privilege, second_level: SecondLevel
) -> Translation | SecondLevelFault:
    """CR0.PG = 0: linear addresses are (guest-)physical addresses, and count as user-mode and writable."""
    address = GuestPhysicalAddress(linear & _bits(31, 0))
    rights = USER | WRITABLE
    page = second_level.translate(address, kind, linear, rights, privilege.user)
    if isinstance(page, SecondLevelFault):
        return _of_access(page, privilege)
    guest_page = GuestPhysicalAddress(address & ~PAGE_OFFSET_MASK)
    return Translation(page.physical, guest_page, PAGE_SIZE, rights | page.attributes, page.permissions, True, False)


def _of_access(fault: SecondLevelFault, privilege: Privilege) -> SecondLevelFault:
    """``fault`` of the access itself, not of one to a paging structure."""
    return evolve(fault, shadow_stack=True) if privilege.shadow_stack else fault


class _Leaf(NamedTuple):
    """The entry that maps the page, and what the way down to it adds up to.

    ``unset`` lists the entries (address, flags) on the way whose accessed flag is clear, None when there is none.
    """

    address: GuestPhysicalAddress
    entry: int
    shift: int
    attributes: int
    unset: list[tuple[int, int]] | None


def _descend(
    context: PagingContext,
    linear: LinearAddress,
    memory: PagedMemory,
    second_level: SecondLevel,
    steps: list[WalkStep] | None,
) -> _Leaf | SecondLevelFault | int:
    """Follow the entries from the root to the page; an integer is the cause of a page fault (P and RSVD bits)."""
    mode, levels, entry_shift, index_mask, linear_mask, frame_mask = context.geometry
    used = linear & linear_mask
    table = context.root
    if mode is PagingMode.PAE:
        pdpte = context.pdptrs[used >> 30]
        if context.pdptes_in_memory:
            found = _pdpte_in_memory(context, linear, memory, second_level, steps)
            if isinstance(found, SecondLevelFault):
                return found
            pdpte = found
        if not pdpte & PRESENT:
            return _NOT_PRESENT
        if context.pdptes_in_memory and pdpte & _reserved_in_pdpte(context.physical_address_width):
            return _RESERVED
        table = pdpte & frame_mask
    read = memory.read_u64 if entry_shift == 3 else memory.read_u32
    locate = second_level.paging_structure
    rights = WRITABLE | USER
    execute_disable = 0
    unset: list[tuple[int, int]] | None = None
    for name, shift, maps_page, reserved_table, reserved_page in levels:
        address = GuestPhysicalAddress(table | (used >> shift & index_mask) << entry_shift)
        physical = locate(address, False, linear)
        if isinstance(physical, SecondLevelFault):
            return physical
        entry = read(physical)
        if steps is not None:
            steps.append(WalkStep(name, address, entry))
        if not entry & PRESENT:
            return _NOT_PRESENT
        above, rights = rights, rights & entry
        execute_disable |= entry
        if entry & maps_page == maps_page:
            if entry & reserved_page:
                return _RESERVED
            break
        if entry & reserved_table:
            return _RESERVED
        if not entry & ACCESSED:
            unset = [*(unset or ()), (address, ACCESSED)]
        table = entry & frame_mask
    attributes = rights | execute_disable >> 63
    if entry & _SHADOWING == DIRTY and above & WRITABLE:
        attributes |= SHADOW_STACK
    if mode is PagingMode.LEVEL_4 or mode is PagingMode.LEVEL_5:
        attributes |= (entry >> PROTECTION_KEY_SHIFT & 0xF) << KEY_SHIFT
    return _Leaf(address, entry, shift, attributes, unset)


def _pdpte_in_memory(
    context: PagingContext,
    linear: LinearAddress,
    memory: PagedMemory,
    second_level: SecondLevel,
    steps: list[WalkStep] | None,
) -> int | SecondLevelFault:
    address = GuestPhysicalAddress((context.cr3 & _bits(31, 5)) + 8 * (linear >> 30 & 3))
    physical = second_level.paging_structure(address, False, linear)
    if isinstance(physical, SecondLevelFault):
        return physical
    entry = memory.read_u64(physical)
    if steps is not None:
        steps.append(WalkStep("PDPTE", address, entry))
    return entry


def walk(
    context: PagingContext,
    linear: LinearAddress,
    kind: AccessKind,
    privilege: Privilege,
    memory: PagedMemory,
    second_level: SecondLevel,
    steps: list[WalkStep] | None = None,
) -> Translation | PageFault | SecondLevelFault:
    """Translate ``linear`` for one access, setting accessed and dirty flags as the access does.

    Faults carry the exact address given. Bits of ``linear`` that the mode does not translate are ignored: canonicality
    is the caller's check. Each entry read is appended to ``steps`` when it is given.

    Order: every level's present flag and reserved bits from the root down, then the permissions of the whole
    translation, then the flags, then the second level's verdict on the page itself. A page fault sets no flag: the
    manual only says that A is set when an entry is *used* for a translation, and hardware has been seen to leave the
    upper levels alone when the walk fails (so says the comment at the flag update in Xen's guest_walk.c). Software can
    rely on neither.

    Spec: SDM Vol. 3, "Hierarchical Paging Structures: an Overview", "Access Rights", "Accessed and Dirty Flags",
    "Page-Fault Exceptions".
    """
    if context.mode is PagingMode.NONE:
        return _without_paging(linear, kind, privilege, second_level)
    leaf = _descend(context, linear, memory, second_level, steps)
    if isinstance(leaf, SecondLevelFault):
        return leaf
    if isinstance(leaf, int):
        return _page_fault(context, linear, kind, privilege, leaf)
    address, entry, shift, attributes, unset = leaf
    if not context.permissions[privilege][attributes] & kind:
        denied_by_key = not key_permissions(context.controls, privilege, attributes) & kind
        return _page_fault(context, linear, kind, privilege, _KEY if denied_by_key else _PROTECTION)

    wanted = ACCESSED | DIRTY if kind is AccessKind.WRITE else ACCESSED
    if entry & wanted != wanted:
        unset = [*(unset or ()), (address, wanted)]
    if unset is not None:
        fault = _set_flags(unset, linear, context.geometry.entry_shift, memory, second_level)
        if fault is not None:
            return fault

    guest_physical = _frame(entry, shift, context.geometry.frame_mask) | linear & (1 << shift) - 1
    user = privilege is _USER_MODE or privilege is _USER_SHADOW_STACK
    supervisors = privilege is _SUPERVISOR_SHADOW_STACK
    page = second_level.translate(GuestPhysicalAddress(guest_physical), kind, linear, attributes, user, supervisors)
    if isinstance(page, SecondLevelFault):
        return _of_access(page, privilege)
    dirty = bool((entry | wanted) & DIRTY)
    return Translation(
        page.physical,
        GuestPhysicalAddress(guest_physical & ~PAGE_OFFSET_MASK),
        1 << shift,
        attributes | page.attributes,
        page.permissions if dirty else page.permissions & READ_EXECUTE,
        dirty,
        context.pge and bool(entry & GLOBAL),
    )


def _frame(entry: int, shift: int, frame_mask: int) -> int:
    """Physical address of the page of 1 << ``shift`` bytes that ``entry`` maps."""
    frame = entry & frame_mask & -(1 << shift)
    if shift == 22:
        # Only 32-bit paging has 4-MByte pages; PSE-36 puts address bits 39:32 into entry bits 20:13.
        frame |= (entry >> 13 & 0xFF) << 32
    return frame


def _set_flags(
    unset: list[tuple[int, int]],
    linear: LinearAddress,
    entry_shift: int,
    memory: PagedMemory,
    second_level: SecondLevel,
) -> SecondLevelFault | None:
    """Set accessed and dirty flags, root first, each by a locked OR, for the entries may alias each other."""
    for address, flags in unset:
        physical = second_level.paging_structure(GuestPhysicalAddress(address), True, linear)
        if isinstance(physical, SecondLevelFault):
            return physical
        if entry_shift == 3:
            memory.write_u64(physical, memory.read_u64(physical) | flags)
        else:
            memory.write_u32(physical, memory.read_u32(physical) | flags)
    return None


def _reserved_in_pdpte(physical_address_width: int) -> int:
    return _bits(63, physical_address_width) | _bits(8, 5) | _bits(2, 1)


def load_pdptrs(
    cr3: int, physical_address_width: int, memory: PagedMemory, second_level: SecondLevel
) -> tuple[int, int, int, int] | InvalidPdpte | SecondLevelFault:
    """The four PDPTEs that ``cr3`` references, as MOV to CR0, CR3 or CR4 loads them under PAE paging.

    Spec: SDM Vol. 3, "PDPTE Registers".
    """
    reserved = _reserved_in_pdpte(physical_address_width)
    table = cr3 & _bits(31, 5)
    entries = []
    for index in range(4):
        physical = second_level.paging_structure(GuestPhysicalAddress(table + 8 * index), False, None)
        if isinstance(physical, SecondLevelFault):
            return physical
        entry = memory.read_u64(physical)
        if entry & PRESENT and entry & reserved:
            return InvalidPdpte(index, entry)
        entries.append(entry)
    return entries[0], entries[1], entries[2], entries[3]


def is_canonical(context: PagingContext, linear: int) -> bool:
    """Whether ``linear`` is canonical for the paging mode; 32-bit addresses always are.

    Spec: SDM Vol. 1, "Canonical Addressing".
    """
    if not context.efer & Efer.LMA:
        return True
    top = linear >> (56 if context.cr4 & Cr4.LA57 else 47)
    return top == 0 or top == (1 << (8 if context.cr4 & Cr4.LA57 else 17)) - 1
