"""The memory-management unit of one logical processor: paging, second level and TLB behind one door.

Two users: the engine asks `Mmu.fill` on each miss of its own TLB; the model itself reads and writes linear memory
(descriptor tables, stacks, operands) with the accessors, which raise `InstructionAborted` when the access faults.

The engine's TLB is a cache of the grants given here. Whenever they may no longer hold, ``flush_engine`` is called,
with a linear page number, or with None for everything.

Spec: SDM Vol. 3, "Paging", "VMX Support for Address Translation".
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from attrs import evolve

from vtx.addresses import (
    PAGE_OFFSET_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    GuestPhysicalAddress,
    LinearAddress,
    PhysicalAddress,
)
from vtx.x86.hlat import Hlat, walk_with_hlat
from vtx.x86.linear_masking import masked, masking
from vtx.x86.memory import PhysicalMemory
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.page_rights import Privilege
from vtx.x86.paging import (
    CR0_PAGING,
    CR4_PAGING,
    EFER_PAGING,
    InvalidPdpte,
    PageFault,
    PagingContext,
    PagingMode,
    Translation,
    WalkStep,
    is_canonical,
    load_pdptrs,
    walk,
)
from vtx.x86.second_level import (
    AccessKind,
    IdentitySecondLevel,
    ReservedPageAccess,
    SecondLevel,
    SecondLevelFault,
    SubPageWrite,
)
from vtx.x86.state import MASK32, MASK64, CpuState, Cr0, Cr4, Efer
from vtx.x86.tlb import LARGE_SIZES, NO_PAGING, Selection, Tlb, TlbTag
from vtx.x86.walk_memory import WalkMemory

PCID_MASK: Final = 0xFFF
_CONTEXTS_NUMBERED: Final = 256
_LARGE_PAGES_NOTED: Final = 4096
"""How many large pages granted to the engine are remembered; beyond that every INVLPG flushes everything."""

_privilege_of = Privilege.of
_SUPERVISOR_SHADOW_STACK: Final = Privilege.SUPERVISOR_SHADOW_STACK
_paging_context = functools.lru_cache(maxsize=256)(PagingContext)

Refusal = Fault | SecondLevelFault
"""Why an access cannot be made: an exception, or an event of the second level."""


class Grant(NamedTuple):
    """What the engine may do with a linear page: ``permissions`` is a mask of `AccessKind` (1, 2, 4).

    ``physical_page`` is a page *number*. The grant holds for the privilege it was asked with, until a flush.
    """

    physical_page: int
    permissions: int

    @property
    def readable(self) -> bool:
        """Data reads are allowed."""
        return bool(self.permissions & AccessKind.READ)

    @property
    def writable(self) -> bool:
        """Data writes are allowed."""
        return bool(self.permissions & AccessKind.WRITE)

    @property
    def executable(self) -> bool:
        """Instruction fetches are allowed."""
        return bool(self.permissions & AccessKind.EXECUTE)


class Translations(NamedTuple):
    """Where what fills rest on is kept, as long as the engine's TLB needs no flush.

    ``context`` is a number of its own for each set of registers, second level and so on that a fill depends on.
    ``local`` and ``global_`` are translations by linear page number; the former come first. The page numbers in
    ``implicit`` are granted for one access only. Large pages that were granted are noted in ``large``.
    """

    context: int
    local: dict[int, Translation]
    global_: dict[int, Translation]
    implicit: set[int]
    large: set[tuple[int, int]]


class Basis(NamedTuple):
    """What a fill rests on: ``translation``, which is among `Translations` or could be made anew from ``entries``.

    These are offsets of paging-structure entries in RAM and their values, None if they are not known. ``large`` is what
    is to be noted about a large page.
    """

    translation: Translation
    large: tuple[int, int] | None
    entries: tuple[tuple[int, int], ...] | None


def _large_page(size: int, page: int) -> tuple[int, int]:
    """The large page of ``size`` bytes that the linear page number ``page`` is a piece of, as it is noted."""
    return size, page // (size >> PAGE_SHIFT)


def _invalidates_all(old: PagingContext, new: PagingContext) -> bool:
    """Whether going from ``old`` to ``new`` by MOV to CR0 or CR4 or WRMSR invalidates all translations.

    The manual asks for less in some of these cases (the current PCID only, or one direction of CR0.PG); dropping more
    is always allowed.

    Spec: SDM Vol. 3, "Operations that Invalidate TLBs and Paging-Structure Caches".
    """
    shape = Cr4.PSE | Cr4.PAE | Cr4.PGE | Cr4.LA57
    rising, falling = new.cr4 & ~old.cr4, old.cr4 & ~new.cr4
    return bool(
        (old.cr0 ^ new.cr0) & Cr0.PG
        or (old.cr4 ^ new.cr4) & shape
        or falling & Cr4.PCIDE
        or rising & Cr4.SMEP
        or (old.efer ^ new.efer) & (Efer.LMA | Efer.NXE)
    )


class Mmu:
    """Address translation for one logical processor; starts in the reset state (paging disabled, no second level).

    ``pkrs`` holds IA32_PKRS; who changes it calls `update`. ``reserved_page`` is the physical
    address of a page that every access by linear address is refused, with `ReservedPageAccess`; None without one. Who
    changes it sees to it that the engine's TLB is flushed, as a VM entry or VM exit does.
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        physical_address_width: int,
        *,
        page1gb: bool = True,
        amd: bool = False,
        flush_engine: Callable[[int | None], None] = lambda page: None,
        tlb: Tlb | None = None,
    ) -> None:
        self.memory = memory
        self.physical_address_width = physical_address_width
        self.page1gb = page1gb
        self.amd = amd
        self.flush_engine = flush_engine
        self.tlb = tlb or Tlb()
        self.second_level: SecondLevel = IdentitySecondLevel()
        self.hlat: Hlat | None = None
        self.asid = 0
        self.reserved_page: PhysicalAddress | None = None
        self._redirected: PhysicalAddress | None = None
        self.pkrs = 0
        self._registers: tuple[int, ...] = ()
        self._seen_second_level: SecondLevel = self.second_level
        self._walks = WalkMemory(memory)
        self._large_granted: set[tuple[int, int]] = set()
        self._numbers: dict[tuple[int | None, ...], int] = {}  # of contexts; none is ever given again
        self._next_number = itertools.count(1).__next__
        self._number: int | None = None
        self.update(CpuState())

    # What fills rest on.

    def translations(self, implicit: set[int]) -> Translations | None:
        """Where it is kept from now on, None to be asked for each fill; ``implicit`` as in `Translations`."""
        if self.reserved_page is not None or self.hlat is not None:
            return None
        if self._number is None:
            context = *self._registers, self.second_level.tag
            number = self._numbers.get(context)
            if number is None:
                if len(self._numbers) >= _CONTEXTS_NUMBERED:
                    self._numbers.clear()
                number = self._numbers[context] = self._next_number()
            self._number = number
        return Translations(self._number, *self.tlb.pages(), implicit, self._large_granted)

    def basis(self, linear: int) -> Basis | None:
        """What the last fill at ``linear`` rests on, if it can be said."""
        if self._masking is not None and masked(linear, self._masking) != linear:
            return None
        page = (linear & self._linear_mask) >> PAGE_SHIFT
        found, remembered = self.tlb.find(page), self._walks.remembered(page)
        if found is None and remembered is not None:
            found = remembered[0]
        if found is None:
            return None
        entries = remembered[1] if remembered is not None and remembered[0] is found else None
        return Basis(found, _large_page(found.size, page) if found.size > PAGE_SIZE else None, entries)

    # Following the registers.

    def update(self, state: CpuState) -> None:
        """Follow the control and PDPTE registers, PKRU, ``pkrs``, ``second_level`` and ``asid`` as they now are.

        Invalidates nothing in the TLB: that is a property of the operation that changed them, not of their values.
        """
        registers = (
            state.cr0 & CR0_PAGING,
            state.cr3,
            state.cr4 & CR4_PAGING,
            state.efer & EFER_PAGING,
            *state.pdptrs,
            state.pkru,
            self.pkrs,
            self.asid,
        )
        second_level = self.second_level
        if registers == self._registers and second_level is self._seen_second_level:
            return
        self._registers, self._seen_second_level = registers, second_level
        self.context = context = self._context_of(registers)
        self._walks.select((*registers, second_level.tag), remembers=second_level.names_evidence)
        self._number = None
        self._permissions = context.permissions
        self._linear_mask = MASK64 if context.efer & Efer.LMA else MASK32
        self._masking = masking(context.cr3, context.cr4, context.efer)
        self.tlb.select(TlbTag(self.asid, self.second_level.tag, self._pcid(context)))
        self._flush_engine_all()

    def _context_of(self, registers: tuple[int, ...]) -> PagingContext:
        cr0, cr3, cr4, efer, pdpte0, pdpte1, pdpte2, pdpte3, pkru, pkrs, _ = registers
        return _paging_context(
            cr0,
            cr3,
            cr4,
            efer,
            self.physical_address_width,
            (pdpte0, pdpte1, pdpte2, pdpte3),
            pkru,
            pkrs,
            self.page1gb,
            self.second_level.walks_pdptes,
            self.amd,
        )

    @staticmethod
    def _pcid(context: PagingContext) -> int:
        if context.mode is PagingMode.NONE:
            return NO_PAGING
        return context.cr3 & PCID_MASK if context.cr4 & Cr4.PCIDE else 0

    def controls_written(self, state: CpuState) -> None:
        """The guest wrote CR0, CR4 or IA32_EFER: invalidate what that invalidates, and follow."""
        old = self.context
        self.update(state)
        if _invalidates_all(old, self.context):
            self.tlb.invalidate_asid(self.asid)
            self._flush_engine_all()

    def cr3_written(self, state: CpuState, *, preserve: bool = False) -> None:
        """The guest wrote CR3; ``preserve`` is bit 63 of the source with CR4.PCIDE = 1.

        Spec: SDM Vol. 3, "Operations that Invalidate TLBs and Paging-Structure Caches".
        """
        self.update(state)
        if not preserve:
            self.tlb.invalidate_pcid(self.tlb.tag.pcid)
            self._flush_engine_all()

    def vm_transition(self, state: CpuState, second_level: SecondLevel, asid: int, *, flush: bool) -> None:
        """A VM entry or VM exit loaded ``state``; ``flush`` when mappings of identifier 0 do not survive it.

        Spec: SDM Vol. 3, "Operations that Invalidate Cached Mappings" (VM entries and VM exits without VPID).
        """
        if flush:
            self.tlb.invalidate_asid(0)
        self.second_level = second_level
        self.asid = asid
        self.update(state)
        if flush:
            self._flush_engine_all()

    def load_pdptrs(self, cr3: int) -> tuple[int, int, int, int]:
        """The PDPTEs that ``cr3`` references, for the caller to put into the PDPTE registers.

        Raises `InstructionAborted` with #GP(0) for reserved bits, or with the second level's fault.
        """
        if self.second_level.walks_pdptes:
            return 0, 0, 0, 0
        result = load_pdptrs(cr3, self.physical_address_width, self.memory, self.second_level)
        if isinstance(result, InvalidPdpte):
            raise InstructionAborted(Fault(Vector.GP, 0))
        if isinstance(result, SecondLevelFault):
            raise InstructionAborted(result)
        return result

    # Invalidations. Their operands have been checked by the instruction.

    def invlpg(self, linear: int) -> None:
        """INVLPG."""
        page = (linear & self._linear_mask) >> PAGE_SHIFT
        self.tlb.invalidate_page(page)
        self._flush_engine_page(page)

    def invpcid(self, kind: int, pcid: int, linear: int) -> None:
        """INVPCID of type ``kind`` (0 to 3)."""
        page = (linear & self._linear_mask) >> PAGE_SHIFT
        if kind == 0:
            self.tlb.invalidate_pcid_page(pcid, page)
        elif kind == 1:
            self.tlb.invalidate_pcid(pcid)
        else:
            self.tlb.invalidate_asid(self.asid, keep_global=kind == 3)
        self._flush_engine_all()

    def invvpid(self, kind: int, vpid: int, linear: int) -> None:
        """INVVPID of type ``kind`` (0 to 3)."""
        if kind == 0:
            self.tlb.invalidate_asid_page(vpid, linear >> PAGE_SHIFT)
        elif kind == 2:
            self.tlb.invalidate_asids()
        else:
            self.tlb.invalidate_asid(vpid, keep_global=kind == 3)
        self._flush_engine_all()

    def invept(self, kind: int, eptp: int) -> None:
        """INVEPT of type ``kind`` (1 or 2)."""
        if kind == 1:
            self.tlb.invalidate_root(eptp)
        else:
            self.tlb.invalidate_roots()
        self._flush_engine_all()

    def invlpga(self, asid: int, linear: int) -> None:
        """INVLPGA."""
        self.tlb.invalidate_asid_page(asid, (linear & self._linear_mask) >> PAGE_SHIFT)
        self._flush_engine_all()

    def forget(self, selection: Selection) -> None:
        """INVLPGB, of this processor or of another one."""
        self.tlb.forget(selection)
        self._flush_engine_all()

    def flush_asid(self, asid: int | None, *, keep_global: bool = False) -> None:
        """TLB_CONTROL: forget what is tagged with ``asid``, or everything (None).

        Spec: APM Vol. 2, "TLB Flush".
        """
        if asid is None:
            self.tlb.clear()
        else:
            self.tlb.flush_asid(asid, keep_global=keep_global)
        self._flush_engine_all()

    def _flush_engine_all(self) -> None:
        self._large_granted.clear()
        self.flush_engine(None)

    def _flush_engine_page(self, page: int) -> None:
        noted = self._large_granted
        if len(noted) >= _LARGE_PAGES_NOTED or any(_large_page(size, page) in noted for size in LARGE_SIZES):
            # The engine may hold pieces of this large page that the TLB has already evicted.
            self._flush_engine_all()
        else:
            self.flush_engine(page)

    # Translation.

    def fill(self, linear: int, kind: AccessKind, cpl: int, ac: bool, *, implicit: bool = False) -> Grant | Refusal:
        """Answer a miss of the engine's TLB at ``linear`` (any address in the page; a fault reports it as given)."""
        privilege = _privilege_of(cpl, ac, implicit)
        result = self.resolve(linear, kind, privilege)
        if not isinstance(result, Translation):
            return result
        if result.size > PAGE_SIZE and len(self._large_granted) < _LARGE_PAGES_NOTED:
            self._large_granted.add(_large_page(result.size, (linear & self._linear_mask) >> PAGE_SHIFT))
        return Grant(result.physical >> PAGE_SHIFT, self._permissions[privilege][result.attributes] & result.cacheable)

    def resolve(self, linear: int, kind: AccessKind, privilege: Privilege) -> Translation | Refusal:
        """The translation for one access, from the TLB or by a walk, with its flags set; or why there is none."""
        linear &= self._linear_mask
        if self._masking is not None and kind is not AccessKind.EXECUTE:
            linear = masked(linear, self._masking)
        page = linear >> PAGE_SHIFT
        cached = self.tlb.find(page) or self._walks.recall(page)
        if privilege is _SUPERVISOR_SHADOW_STACK and self.second_level.checks_shadow_stacks:
            cached = None
        if cached is not None and self._permissions[privilege][cached.attributes] & cached.cacheable & kind:
            result: Translation | Refusal = cached
        else:
            result = self._walk(LinearAddress(linear), kind, privilege)
        if self.reserved_page is not None and isinstance(result, Translation):
            return self._except_reserved_page(result, LinearAddress(linear), kind)
        return result

    def _except_reserved_page(
        self, found: Translation, linear: LinearAddress, kind: AccessKind
    ) -> Translation | ReservedPageAccess:
        if found.physical != self.reserved_page:
            return found
        if self._redirected is not None:
            return evolve(found, physical=self._redirected)
        return ReservedPageAccess(GuestPhysicalAddress(found.guest_physical | linear & PAGE_OFFSET_MASK), linear, kind)

    @contextmanager
    def redirection(self, target: PhysicalAddress, linear: int) -> Iterator[None]:
        """While it lasts, accesses to the reserved page, mapped at ``linear``, go to the page ``target``."""
        self._redirected = target
        try:
            yield
        finally:
            self._redirected = None
            self._flush_engine_page((linear & self._linear_mask) >> PAGE_SHIFT)

    def _walk(self, linear: LinearAddress, kind: AccessKind, privilege: Privilege) -> Translation | Refusal:
        page = linear >> PAGE_SHIFT
        if not is_canonical(self.context, linear):
            # A stack reference would be #SS(0): the one who knows it is one replaces the vector.
            return Fault(Vector.GP, 0)
        steps: list[WalkStep] | None = [] if self._walks.wants(page) else None
        if self.hlat is None:
            result = walk(self.context, linear, kind, privilege, self.memory, self.second_level, steps)
        else:
            result = walk_with_hlat(self.hlat, self.context, linear, kind, privilege, self.memory, self.second_level)
        if isinstance(result, Translation):
            if steps is not None:
                self._walks.remember(page, result, self.second_level.evidence(steps, result.guest_physical))
            self.tlb.insert(page, result)
            return result
        self.tlb.invalidate_page(page)
        if isinstance(result, PageFault):
            return Fault(Vector.PF, result.error_code, result.linear)
        return result

    def trace_walk(
        self, linear: int, kind: AccessKind, privilege: Privilege
    ) -> tuple[list[WalkStep], Translation | PageFault | SecondLevelFault]:
        """Walk past the TLB, recording each entry used. Sets flags like the access would."""
        steps: list[WalkStep] = []
        linear &= self._linear_mask
        where = self.context, LinearAddress(linear), kind, privilege, self.memory, self.second_level, steps
        result = walk(*where) if self.hlat is None else walk_with_hlat(self.hlat, *where)
        return steps, result

    def translate(self, linear: int, kind: AccessKind, *, user: bool = False, ac: bool = False) -> PhysicalAddress:
        """Physical address of one byte; raises `InstructionAborted` with the fault or the second level's event.

        ``user`` and ``ac`` here and below: an access made at CPL 3; an explicit supervisor-mode access with RFLAGS.AC
        set. The default is the implicit supervisor-mode access of descriptor tables, TSS and inner stacks.
        """
        return self._translate(linear, kind, _privilege(user, ac))

    def _translate(self, linear: int, kind: AccessKind, privilege: Privilege, size: int = 1) -> PhysicalAddress:
        result = self.resolve(linear, kind, privilege)
        if isinstance(result, Translation):
            return PhysicalAddress(result.physical | linear & PAGE_OFFSET_MASK)
        if isinstance(result, SubPageWrite):
            decided = result.decide(size)
            if not isinstance(decided, SecondLevelFault):
                return decided
            result = decided
        raise InstructionAborted(result)

    def _pieces(
        self, linear: int, size: int, kind: AccessKind, privilege: Privilege
    ) -> list[tuple[PhysicalAddress, int]]:
        """Physical address and length of each page's part of an access; every page is checked before any is used."""
        pieces = []
        while size > 0:
            length = min(size, PAGE_SIZE - (linear & PAGE_OFFSET_MASK))
            pieces.append((self._translate(linear, kind, privilege, length), length))
            linear += length
            size -= length
        return pieces

    # Memory accesses of the model itself.

    def read_bytes(self, linear: int, size: int, *, user: bool = False, ac: bool = False) -> bytes:
        """``size`` bytes at ``linear``; wraps at the end of the address space."""
        privilege = _privilege(user, ac)
        if (linear & PAGE_OFFSET_MASK) + size <= PAGE_SIZE:
            return self.memory.read(self._translate(linear, AccessKind.READ, privilege), size)
        return self._load(self._pieces(linear, size, AccessKind.READ, privilege))

    def write_bytes(
        self, linear: int, data: bytes | bytearray | memoryview, *, user: bool = False, ac: bool = False
    ) -> None:
        """Store ``data`` at ``linear``: all of it, or, when any page faults, nothing."""
        privilege, size = _privilege(user, ac), len(data)
        if (linear & PAGE_OFFSET_MASK) + size <= PAGE_SIZE:
            self.memory.write(self._translate(linear, AccessKind.WRITE, privilege, size), data)
            return
        self._store(self._pieces(linear, size, AccessKind.WRITE, privilege), data)

    def _load(self, pieces: list[tuple[PhysicalAddress, int]]) -> bytes:
        return b"".join(self.memory.read(physical, length) for physical, length in pieces)

    def _store(self, pieces: list[tuple[PhysicalAddress, int]], data: bytes | bytearray | memoryview) -> None:
        position = 0
        for physical, length in pieces:
            self.memory.write(physical, data[position : position + length])
            position += length

    def read(self, linear: int, size: int, *, user: bool = False, ac: bool = False) -> int:
        """Unsigned little-endian integer of ``size`` bytes at ``linear``."""
        if size == 8 and not linear & 7:
            return self.memory.read_u64(self._translate(linear, AccessKind.READ, _privilege(user, ac)))
        return int.from_bytes(self.read_bytes(linear, size, user=user, ac=ac), "little")

    def write(self, linear: int, size: int, value: int, *, user: bool = False, ac: bool = False) -> None:
        """Store the low ``size`` bytes of ``value`` at ``linear``, little-endian."""
        self.write_bytes(linear, (value & (1 << 8 * size) - 1).to_bytes(size, "little"), user=user, ac=ac)

    def shadow_read(self, linear: int, size: int, *, user: bool) -> int:
        """What `read` gives, by a shadow-stack access: one of user mode, or of supervisor mode."""
        return int.from_bytes(
            self._load(self._pieces(linear, size, AccessKind.READ, _shadow_privilege(user))), "little"
        )

    def shadow_write(self, linear: int, size: int, value: int, *, user: bool) -> None:
        """Store the low ``size`` bytes of ``value`` at ``linear`` by a shadow-stack access."""
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        self._store(self._pieces(linear, size, AccessKind.WRITE, _shadow_privilege(user)), data)

    def check(self, linear: int, size: int, kind: AccessKind, *, user: bool = False, ac: bool = False) -> None:
        """Raise what an access of ``size`` bytes at ``linear`` would raise, without making it."""
        self._pieces(linear, size, kind, _privilege(user, ac))


def _shadow_privilege(user: bool) -> Privilege:
    return Privilege.USER_SHADOW_STACK if user else Privilege.SUPERVISOR_SHADOW_STACK


def _privilege(user: bool, ac: bool) -> Privilege:
    if user:
        return Privilege.USER
    return Privilege.SUPERVISOR_AC if ac else Privilege.SUPERVISOR
