"""The EPT walk: translations, misconfigurations, violations and their qualifications, accessed and dirty flags."""

import itertools

import pytest

from vtx.vmx.ept import (
    EptConfig,
    EptMisconfiguration,
    EptViolation,
    ExtendedPageTables,
    PageModificationLogFull,
)
from vtx.x86.memory import PhysicalMemory
from vtx.x86.page_rights import EXECUTE_DISABLE, USER, WRITABLE
from vtx.x86.second_level import AccessKind, SecondLevelPage

READ, WRITE, EXECUTE = AccessKind

R, W, X, PAGE, A, D, XU = 1, 2, 4, 0x80, 0x100, 0x200, 0x400
RWX = R | W | X
UC, WT, WP, WB = 0, 4, 5, 6
ROOT = 0x10000
AD = 0x40
GPA = 0x1_2345_6789
LINEAR = 0xFFFF_8000_1234_5678
NAMES = {48: "PML5E", 39: "PML4E", 30: "PDPTE", 21: "PDE", 12: "PTE"}


class Tables:
    """EPT tables at ROOT, ROOT + 0x1000, ... mapping GPA, down to the level whose entries map 1 << ``stop`` bytes."""

    def __init__(self, *, stop=12, length=4, frame=0, flags=RWX, memory_type=WB, eptp_bits=0, log=None, **config):
        self.memory = PhysicalMemory(1 << 20)
        self.shifts = [shift for shift in (48, 39, 30, 21, 12)[5 - length :] if shift >= stop]
        self.entries = []
        for level, shift in enumerate(self.shifts):
            self.entries.append(ROOT + level * 0x1000 + (GPA >> shift & 0x1FF) * 8)
            value = ROOT + (level + 1) * 0x1000 | flags
            if shift == stop:
                value = frame | memory_type << 3 | flags | (PAGE if shift != 12 else 0)
            self.set(level, value)
        eptp = ROOT | (length - 1) << 3 | WB | eptp_bits
        self.config = EptConfig(eptp, **({"physical_address_width": 46} | config))
        self.ept = ExtendedPageTables(self.config, self.memory, log)

    def get(self, level):
        return self.memory.read_u64(self.entries[level])

    def set(self, level, value):
        self.memory.write_u64(self.entries[level], value)

    def translate(self, kind=READ, rights=WRITABLE | USER):
        return self.ept.translate(GPA, kind, LINEAR, rights)

    def structure(self, update=False, linear=LINEAR):
        return self.ept.paging_structure(GPA, update, linear)


@pytest.mark.parametrize(
    ("stop", "length", "frame"),
    [(12, 4, 0x7000), (21, 4, 0x1_0060_0000), (30, 4, 0x7_C000_0000), (12, 5, 0x7000), (30, 5, 0x7_C000_0000)],
)
def test_translation(stop, length, frame):
    tables = Tables(stop=stop, length=length, frame=frame)
    physical = frame | GPA & (1 << stop) - 1
    assert tables.translate() == SecondLevelPage(physical & ~0xFFF, READ | WRITE | EXECUTE, 1 << stop)
    assert tables.structure() == physical


@pytest.mark.parametrize("memory_type", range(8))
@pytest.mark.parametrize("stop", [12, 21, 30])
def test_memory_type_of_a_page(memory_type, stop):
    result = Tables(stop=stop, memory_type=memory_type).translate()
    if memory_type in (2, 3, 7):
        assert result == EptMisconfiguration(GPA, LINEAR)
    else:
        assert isinstance(result, SecondLevelPage)


def set_at(tables, level, clear, value):
    tables.set(level, tables.get(level) & ~clear | value)


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("bits", range(8))
@pytest.mark.parametrize("execute_only", [False, True])
def test_permission_bits_that_are_misconfigurations(level, bits, execute_only):
    tables = Tables(execute_only=execute_only)
    set_at(tables, level, RWX, bits)
    result = tables.translate()
    # Write without read, always; execute without read, unless the processor has execute-only translations.
    wrong = bits in (0b010, 0b110) or (bits == 0b100 and not execute_only)
    assert isinstance(result, EptMisconfiguration) == wrong


@pytest.mark.parametrize("bits", range(16))
@pytest.mark.parametrize("execute_only", [False, True])
def test_permission_bits_with_mode_based_execute_control(bits, execute_only):
    tables = Tables(execute_only=execute_only, mode_based_execute=True)
    read, write, execute, execute_user = bits & 1, bits & 2, bits & 4, bits & 8
    set_at(tables, 3, RWX | XU, bits & RWX | (XU if execute_user else 0))
    wrong = not read and (write or ((execute or execute_user) and not execute_only))
    assert isinstance(tables.translate(), EptMisconfiguration) == bool(wrong)


def test_bit_10_is_ignored_without_mode_based_execute_control():
    tables = Tables()
    set_at(tables, 3, RWX, XU)
    # Not present, whatever bit 10 says.
    assert tables.translate() == EptViolation(GPA, LINEAR, 0x181)


RESERVED_CASES = [
    (stop, width, large_pages, length)
    for stop, width, large_pages, length in itertools.product((12, 21, 30), (36, 46, 52), (True, False), (4, 5))
    if large_pages or stop == 12
]


@pytest.mark.parametrize(("stop", "width", "large_pages", "length"), RESERVED_CASES)
def test_reserved_bits(stop, width, large_pages, length):
    tables = Tables(stop=stop, length=length, physical_address_width=width, page_2mb=large_pages, page_1gb=large_pages)
    for level, shift in enumerate(tables.shifts):
        original = tables.get(level)
        maps_page = shift == stop
        for bit in range(3, 64):
            if original >> bit & 1 or (maps_page and bit in (3, 4, 5)):
                continue
            if bit == 7 and shift in (21, 30) and large_pages:
                continue  # would map a page here
            address_bit = max(stop, 12) <= bit < width if maps_page else 12 <= bit < width
            if address_bit:
                continue
            tables.set(level, original | 1 << bit)
            reserved = width <= bit <= 51
            if maps_page:
                reserved |= 12 <= bit < shift
            else:
                reserved |= 3 <= bit <= 7
            actual = tables.translate() == EptMisconfiguration(GPA, LINEAR)
            assert actual == reserved, f"{NAMES[shift]} bit {bit}"
        tables.set(level, original)


@pytest.mark.parametrize(("stop", "capability"), [(21, "page_2mb"), (30, "page_1gb")])
def test_unsupported_page_size_is_a_misconfiguration(stop, capability):
    assert isinstance(Tables(stop=stop).translate(), SecondLevelPage)
    assert Tables(stop=stop, **{capability: False}).translate() == EptMisconfiguration(GPA, LINEAR)


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize(("kind", "access"), [(READ, 1), (WRITE, 2), (EXECUTE, 4)])
def test_violation__not_present(level, kind, access):
    tables = Tables()
    # Everything but the permission bits is ignored, reserved bits too.
    tables.set(level, 0xFFFF_FFFF_FFFF_FFF8)
    assert tables.translate(kind) == EptViolation(GPA, LINEAR, 0x180 | access)


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("bits", [0b001, 0b011, 0b100, 0b101, 0b111])
@pytest.mark.parametrize("kind", AccessKind)
def test_violation__permissions(level, bits, kind):
    tables = Tables()
    set_at(tables, level, RWX, bits)
    result = tables.translate(kind)
    if bits & kind:
        assert isinstance(result, SecondLevelPage)
        assert result.permissions == bits
    else:
        assert result == EptViolation(GPA, LINEAR, 0x180 | bits << 3 | kind)


def test_violation__permissions_are_the_and_of_all_entries():
    tables = Tables()
    set_at(tables, 0, RWX, R | W)
    set_at(tables, 2, RWX, R | X)
    assert tables.translate(WRITE) == EptViolation(GPA, LINEAR, 0x180 | R << 3 | 2)


def test_misconfiguration_below_a_missing_permission_comes_first():
    tables = Tables()
    set_at(tables, 0, RWX, R)
    set_at(tables, 3, RWX, W)
    assert tables.translate(WRITE) == EptMisconfiguration(GPA, LINEAR)


def test_violation_above_a_misconfiguration_comes_first():
    tables = Tables()
    tables.set(1, 0)
    tables.set(3, W)
    assert isinstance(tables.translate(WRITE), EptViolation)


@pytest.mark.parametrize("user_page", [False, True])
@pytest.mark.parametrize("execute", [0, X])
@pytest.mark.parametrize("execute_user", [0, XU])
def test_mode_based_execute(user_page, execute, execute_user):
    tables = Tables(flags=RWX | XU, mode_based_execute=True)
    set_at(tables, 3, X | XU, execute | execute_user)
    rights = USER if user_page else 0
    allowed = execute_user if user_page else execute
    result = tables.translate(EXECUTE, rights)
    if allowed:
        assert isinstance(result, SecondLevelPage)
        assert result.permissions & EXECUTE
    else:
        permissions = 0x18 | (0x20 if execute else 0) | (0x40 if execute_user else 0)
        assert result == EptViolation(GPA, LINEAR, 0x184 | permissions)
    data = tables.translate(READ, rights)
    assert isinstance(data, SecondLevelPage)
    assert bool(data.permissions & EXECUTE) == bool(allowed)


@pytest.mark.parametrize("rights", range(8))
def test_advanced_information(rights):
    tables = Tables(advanced_information=True, flags=R)
    expected = 0x180 | 2 | R << 3
    expected |= 0x200 if rights & USER else 0
    expected |= 0x400 if rights & WRITABLE else 0
    expected |= 0x800 if rights & EXECUTE_DISABLE else 0
    assert tables.translate(WRITE, rights) == EptViolation(GPA, LINEAR, expected)


def test_advanced_information_is_about_translations_only():
    tables = Tables(advanced_information=True, flags=0)
    assert tables.structure() == EptViolation(GPA, LINEAR, 0x081)


# Paging-structure accesses: (eptp bits, EPT permissions, update) -> qualification or None.
STRUCTURES = [
    (0, 0, False, 0x081),
    (0, R, False, None),
    (0, R, True, 0x08B),
    (0, R | X, True, 0x0AB),
    (0, R | W, True, None),
    (0, X, False, 0x0A1),
    (AD, 0, False, 0x083),
    (AD, R, False, 0x08B),
    (AD, R | X, False, 0x0AB),
    (AD, R | X, True, 0x0AB),
    (AD, R | W, False, None),
]


@pytest.mark.parametrize(("eptp_bits", "permissions", "update", "qualification"), STRUCTURES)
def test_paging_structure_access(eptp_bits, permissions, update, qualification):
    tables = Tables(eptp_bits=eptp_bits)
    set_at(tables, 3, RWX, permissions)
    result = tables.structure(update)
    if qualification is None:
        assert result == GPA & 0xFFF
    else:
        assert result == EptViolation(GPA, LINEAR, qualification)


def test_pdpte_load_has_no_linear_address():
    tables = Tables(flags=0)
    assert tables.structure(linear=None) == EptViolation(GPA, None, 0x001)


@pytest.mark.parametrize(("length", "limit"), [(4, 1 << 48), (5, 1 << 57)])
def test_guest_physical_address_beyond_the_walk(length, limit):
    tables = Tables(length=length, physical_address_width=52)
    address = limit | GPA
    assert tables.ept.translate(address, READ, LINEAR, 0) == EptViolation(address, LINEAR, 0x181)


def test_walk_lengths_that_vm_entry_refuses():
    for length in (1, 2, 3, 6, 7, 8):
        with pytest.raises(ValueError, match=f"page-walk length {length} "):
            ExtendedPageTables(EptConfig(ROOT | length - 1 << 3, 46), PhysicalMemory(1 << 16))


@pytest.mark.parametrize("stop", [12, 21, 30])
def test_accessed_and_dirty(stop):
    tables = Tables(stop=stop, eptp_bits=AD)
    before = [tables.get(level) for level in range(len(tables.entries))]
    clean = tables.translate(READ)
    assert isinstance(clean, SecondLevelPage)
    assert clean.permissions == READ | EXECUTE  # a write must come back to set the dirty flag
    assert [tables.get(level) for level in range(len(before))] == [value | A for value in before]
    dirty = tables.translate(WRITE)
    assert isinstance(dirty, SecondLevelPage)
    assert dirty.permissions == READ | WRITE | EXECUTE
    after = [tables.get(level) for level in range(len(before))]
    assert after == [value | A for value in before[:-1]] + [before[-1] | A | D]
    again = tables.translate(READ)
    assert isinstance(again, SecondLevelPage)
    assert again.permissions == READ | WRITE | EXECUTE


def test_paging_structure_read_dirties_the_page_when_flags_are_enabled():
    tables = Tables(eptp_bits=AD)
    tables.structure()
    assert tables.get(3) & (A | D) == A | D


@pytest.mark.parametrize("eptp_bits", [0, AD])
def test_no_flags_when_disabled_or_refused(eptp_bits):
    tables = Tables(eptp_bits=eptp_bits, flags=R)
    before = [tables.get(level) for level in range(4)]
    assert isinstance(tables.translate(WRITE), EptViolation)
    assert [tables.get(level) for level in range(4)] == before
    assert isinstance(tables.translate(READ), SecondLevelPage)
    after = [tables.get(level) for level in range(4)]
    assert after == [value | (A if eptp_bits else 0) for value in before]


def test_page_modification_log():
    logged = []
    tables = Tables(eptp_bits=AD, log=lambda page: logged.append(page) is None)
    tables.translate(READ)
    assert logged == [None]  # only whether there is room
    tables.translate(WRITE)
    tables.translate(WRITE)
    assert logged == [None, GPA & ~0xFFF]


def test_page_modification_log__a_dirty_page_is_not_logged_again():
    logged = []
    tables = Tables(eptp_bits=AD, log=lambda page: logged.append(page) is None)
    tables.set(3, tables.get(3) | D)  # dirty, yet not accessed: software cleared that flag alone
    assert isinstance(tables.translate(WRITE), SecondLevelPage)
    assert logged == [None]
    assert tables.get(3) & (A | D) == A | D


def test_page_modification_log_full():
    tables = Tables(eptp_bits=AD, log=lambda page: False)
    before = [tables.get(level) for level in range(4)]
    assert tables.translate(WRITE) == PageModificationLogFull(GPA, LINEAR)
    assert tables.translate(READ) == PageModificationLogFull(GPA, LINEAR)
    assert [tables.get(level) for level in range(4)] == before
    for level in range(4):
        tables.set(level, tables.get(level) | A)
    assert isinstance(tables.translate(READ), SecondLevelPage)


def test_tag_tells_configurations_apart_but_keeps_the_root():
    plain, flags = Tables().ept.tag, Tables(eptp_bits=AD).ept.tag
    mode_based = Tables(mode_based_execute=True).ept.tag
    assert len({plain, flags, mode_based}) == 3
    assert {tag & 0xF_FFFF_FFFF_F000 for tag in (plain, flags, mode_based)} == {ROOT}
