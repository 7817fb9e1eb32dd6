"""Sub-page write permissions: tables, decisions, and code of a guest that writes to such pages."""

from __future__ import annotations

import pytest

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import Reason
from vmcs.fields import Field
from vmcs.region import Vmcs
from vtx.addresses import GuestPhysicalAddress, LinearAddress
from vtx.bench.hypervisor import install
from vtx.bench.listing import code
from vtx.machine import Machine
from vtx.vmx.ept import (
    EptConfig,
    EptViolation,
    ExtendedPageTables,
    PageModificationLogFull,
)
from vtx.vmx.sub_page_tables import SubPageEvent, SubPageTables
from vtx.x86.memory import PhysicalMemory
from vtx.x86.second_level import AccessKind, SecondLevelPage, SubPageWrite

EPT, SPPT, PAGE = 0x1_0000, 0x2_0000, 0x3_0000
GUEST_PAGE = 0x5000
SUB_PAGES = 1 << 61
R, RW, RX = 1, 3, 5
DIRTY = 1 << 9


def permissions(*numbers: int) -> int:
    return sum(1 << 2 * number for number in numbers)


class Tables:
    """One guest-physical page, `GUEST_PAGE`, mapped by EPT to `PAGE` with the given leaf bits, and its sub-pages."""

    def __init__(self, leaf: int = R | SUB_PAGES, allowed: int = 0, eptp_bits: int = 0, **more: object) -> None:
        self.memory = PhysicalMemory(1 << 20)
        for level in range(3):
            self.memory.write_u64(EPT + 0x1000 * level, EPT + 0x1000 * (level + 1) | 7)
            self.memory.write_u64(SPPT + 0x1000 * level, SPPT + 0x1000 * (level + 1) | 1)
        self.leaf = EPT + 0x3000 + 8 * (GUEST_PAGE >> 12)
        self.memory.write_u64(self.leaf, PAGE | 6 << 3 | leaf)
        self.memory.write_u64(SPPT + 0x3000 + 8 * (GUEST_PAGE >> 12), allowed)
        self.tables = ExtendedPageTables(
            EptConfig(EPT | 0x1E | eptp_bits, 46),
            self.memory,
            sub_pages=SubPageTables(SPPT, 46, self.memory),
            **more,  # type: ignore[arg-type]
        )

    def access(self, offset: int = 0, kind: AccessKind = AccessKind.WRITE) -> object:
        address = GUEST_PAGE + offset
        return self.tables.translate(GuestPhysicalAddress(address), kind, LinearAddress(0x7000 + offset), 0)

    def write(self, offset: int, size: int = 1) -> object:
        decision = self.access(offset)
        assert isinstance(decision, SubPageWrite)
        return decision.decide(size)


@pytest.mark.parametrize(
    ("allowed", "offset", "size", "expected"),
    [
        (permissions(0), 0, 128, True),
        (permissions(0), 0, 129, False),
        (permissions(0, 1), 127, 2, True),
        (permissions(1), 127, 2, False),
        (permissions(31), 0xFFF, 1, True),
        (permissions(31), 0xF80, 128, True),
        (permissions(31), 0xF7F, 2, False),
        (permissions(*range(32)), 0, 4096, True),
        (0, 0x80, 8, False),
    ],
)
def test_write__needs_permission_for_every_sub_page(allowed: int, offset: int, size: int, expected: bool) -> None:
    tables = Tables(allowed=allowed)
    result = tables.write(offset, size)
    if expected:
        assert result == PAGE + offset
    else:
        # Write access to a page that is readable and nothing else; linear address valid, of the access itself.
        assert result == EptViolation(GUEST_PAGE + offset, 0x7000 + offset, 0x2 | 1 << 3 | 1 << 7 | 1 << 8)


@pytest.mark.parametrize("level", range(3))
def test_tables__not_valid_is_a_miss(level: int) -> None:
    tables = Tables(allowed=permissions(0))
    tables.memory.write_u64(SPPT + 0x1000 * level, SPPT + 0x1000 * (level + 1))
    assert tables.write(0x10) == SubPageEvent(GUEST_PAGE + 0x10, 0x7010, miss=True)


@pytest.mark.parametrize("level", range(3))
@pytest.mark.parametrize("bit", [1, 11, 46, 51, 52, 63])
def test_tables__reserved_bits_are_a_misconfiguration(level: int, bit: int) -> None:
    tables = Tables(allowed=permissions(0))
    tables.memory.write_u64(SPPT + 0x1000 * level, SPPT + 0x1000 * (level + 1) | 1 | 1 << bit)
    assert tables.write(0) == SubPageEvent(GUEST_PAGE, 0x7000, miss=False)


@pytest.mark.parametrize("bit", [1, 33, 63])
def test_tables__odd_bits_of_the_last_entry_are_reserved(bit: int) -> None:
    assert Tables(allowed=1 | 1 << bit).write(0) == SubPageEvent(GUEST_PAGE, 0x7000, miss=False)


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        (R, AccessKind.WRITE),  # bit 61 is clear
        (4 | SUB_PAGES, AccessKind.WRITE),  # not readable
        (R | SUB_PAGES, AccessKind.EXECUTE),
    ],
)
def test_access__that_is_not_eligible_is_a_violation(leaf: int, kind: AccessKind) -> None:
    assert isinstance(Tables(leaf, allowed=permissions(*range(32))).access(0, kind), EptViolation)


def test_access__that_ept_allows_needs_no_sub_pages() -> None:
    for leaf, kind in ((R | SUB_PAGES, AccessKind.READ), (RW | SUB_PAGES, AccessKind.WRITE)):
        assert isinstance(Tables(leaf).access(0, kind), SecondLevelPage)


def test_read__does_not_make_a_page_writable() -> None:
    page = Tables(allowed=permissions(*range(32))).access(0, AccessKind.READ)
    assert isinstance(page, SecondLevelPage)
    assert not page.permissions & AccessKind.WRITE


def test_paging_structures__have_no_sub_page_permissions() -> None:
    tables = Tables(allowed=permissions(*range(32)))
    result = tables.tables.paging_structure(GuestPhysicalAddress(GUEST_PAGE), True, LinearAddress(0))
    assert isinstance(result, EptViolation)


def test_control__is_needed() -> None:
    tables = Tables(allowed=permissions(*range(32)))
    tables.tables.sub_pages = None
    assert isinstance(tables.access(), EptViolation)


def test_large_page__has_no_sub_pages() -> None:
    tables = Tables(allowed=permissions(*range(32)))
    tables.memory.write_u64(EPT + 0x2000, 1 << 7 | 6 << 3 | R | SUB_PAGES)
    assert isinstance(tables.access(), EptViolation)


def test_allowed_write__sets_the_dirty_flag_and_is_logged() -> None:
    logged: list[int] = []

    def log(page: GuestPhysicalAddress | None) -> bool:
        if page is None:
            return True
        logged.append(page)
        return len(logged) < 2

    tables = Tables(allowed=permissions(1), eptp_bits=1 << 6, log_dirty=log)
    assert isinstance(tables.write(0), EptViolation)
    assert not tables.memory.read_u64(tables.leaf) & DIRTY
    assert tables.write(0x80) == PAGE + 0x80
    assert tables.memory.read_u64(tables.leaf) & DIRTY
    assert logged == [GUEST_PAGE]
    tables.memory.write_u64(tables.leaf, tables.memory.read_u64(tables.leaf) & ~DIRTY)
    assert tables.write(0x80) == PageModificationLogFull(GUEST_PAGE + 0x80, 0x7080)


# ---- with the engine

ROOT, PDPT, PD, PT = 0x50_0000, 0x50_1000, 0x50_2000, 0x50_3000
SPP_TABLES = 0x51_0000
TARGET = 0x40_0000

GUEST = code("""\
48 b8 88 77 66 55 44 33 22 11   ; mov rax,1122334455667788h
c6 04 25 85 00 40 00 99         ; mov byte [400085h],99h
48 89 04 25 7c 00 40 00         ; mov [40007Ch],rax
48 c7 c4 80 01 40 00            ; mov rsp,400180h
50                              ; push rax
48 8b 1c 25 7c 00 40 00         ; mov rbx,[40007Ch]
f0 48 0f c1 04 25 00 0f 40 00   ; lock xadd [400F00h],rax
f4                              ; hlt
""")


def run_guest(
    allowed: int, *, second: int | None = None, guest: bytes = GUEST, more: dict[Field, int] | None = None
) -> tuple[Machine, Vmcs]:
    machine = Machine(profile="everything", memory=16 << 20)
    memory = machine.memory
    vmcs = install(
        machine,
        guest=guest,
        controls=(c.ENABLE_EPT, c.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT, c.HLT_EXITING),
        fields={f.EPT_POINTER: ROOT | 0x1E, f.SUB_PAGE_PERMISSION_TABLE_POINTER: SPP_TABLES, **(more or {})},
    )
    memory.write_u64(ROOT, PDPT | 7)
    memory.write_u64(PDPT, PD | 7)
    for number in range(8):
        memory.write_u64(PD + 8 * number, number << 21 | 1 << 7 | 6 << 3 | 7)
    memory.write_u64(PD + 8 * (TARGET >> 21), PT | 7)
    for number in range(512):
        memory.write_u64(PT + 8 * number, TARGET + (number << 12) | 6 << 3 | 7)
    memory.write_u64(PT, TARGET | 6 << 3 | R | SUB_PAGES)
    if second is not None:
        memory.write_u64(PT + 8, TARGET + 0x1000 | 6 << 3 | R | SUB_PAGES)
        memory.write_u64(SPP_TABLES + 0x3008, second)
    for level in range(3):
        index = TARGET >> 39 - 9 * level & 0x1FF
        memory.write_u64(SPP_TABLES + 0x1000 * level + 8 * index, SPP_TABLES + 0x1000 * (level + 1) | 1)
    memory.write_u64(SPP_TABLES + 0x3000, allowed)
    result = machine.run(max_instructions=10_000)
    assert result.exit_value == 0, result.message
    return machine, vmcs


def test_guest__writes_where_it_may() -> None:
    machine, vmcs = run_guest(permissions(0, 1, 2, 0xF00 >> 7))
    assert vmcs[f.EXIT_REASON] == Reason.HLT
    memory = machine.memory
    assert memory.read_u64(TARGET + 0x7C) == 0x1122_3344_5566_7788
    assert memory.read_u8(TARGET + 0x85) == 0x99
    assert memory.read_u64(TARGET + 0x178) == 0x1122_3344_5566_7788
    assert memory.read_u64(TARGET + 0xF00) == 0x1122_3344_5566_7788


@pytest.mark.parametrize(
    ("allowed", "where", "rip"),
    [
        ((0, 2, 30), 0x85, 10),
        ((1, 2, 30), 0x7C, 18),
        ((0, 1, 30), 0x178, 33),
        ((0, 1, 2), 0xF00, 42),
    ],
)
def test_guest__is_stopped_at_the_exact_write(allowed: tuple[int, ...], where: int, rip: int) -> None:
    machine, vmcs = run_guest(permissions(*allowed))
    assert vmcs[f.EXIT_REASON] == Reason.EPT_VIOLATION
    assert vmcs[f.GUEST_PHYSICAL_ADDRESS] == vmcs[f.GUEST_LINEAR_ADDRESS] == TARGET + where
    assert vmcs[f.GUEST_RIP] & 0xFFF == rip
    assert vmcs[f.EXIT_QUALIFICATION] & 0x1FF == 0x18A
    assert machine.memory.read_u8(TARGET + where) == 0


CROSSING = code("""\
48 89 04 25 fc 0f 40 00         ; mov [400FFCh],rax
f4                              ; hlt
""")


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [((31,), (0,), None), ((31,), (1,), 0x1000), ((30,), (0,), 0xFFC), ((), (), 0xFFC)],
)
def test_guest__writes_across_two_such_pages(
    first: tuple[int, ...], second: tuple[int, ...], where: int | None
) -> None:
    _, vmcs = run_guest(permissions(*first), second=permissions(*second), guest=CROSSING)
    if where is None:
        assert vmcs[f.EXIT_REASON] == Reason.HLT
        assert vmcs[f.GUEST_RIP] & 0xFFF == 9  # the host has skipped the HLT
    else:
        assert vmcs[f.EXIT_REASON] == Reason.EPT_VIOLATION
        assert vmcs[f.GUEST_PHYSICAL_ADDRESS] == TARGET + where
        assert vmcs[f.GUEST_RIP] & 0xFFF == 0


def test_guest__exits_for_a_miss_and_for_a_misconfiguration() -> None:
    _, vmcs = run_guest(2)
    assert (vmcs[f.EXIT_REASON], vmcs[f.EXIT_QUALIFICATION]) == (Reason.SPP_RELATED_EVENT, 0)
    assert vmcs[f.GUEST_PHYSICAL_ADDRESS] == vmcs[f.GUEST_LINEAR_ADDRESS] == TARGET + 0x85
    _, vmcs = run_guest(0, more={f.SUB_PAGE_PERMISSION_TABLE_POINTER: 0x60_0000})
    assert (vmcs[f.EXIT_REASON], vmcs[f.EXIT_QUALIFICATION]) == (Reason.SPP_RELATED_EVENT, 1 << 11)
