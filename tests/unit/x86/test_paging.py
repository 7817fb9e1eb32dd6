"""The plain page walk, mode by mode."""

import pytest

from vtx.x86.memory import PhysicalMemory
from vtx.x86.page_rights import Privilege
from vtx.x86.paging import (
    InvalidPdpte,
    PageFault,
    PagingContext,
    PagingMode,
    Translation,
    WalkStep,
    is_canonical,
    load_pdptrs,
    paging_mode,
    walk,
)
from vtx.x86.second_level import AccessKind, IdentitySecondLevel, SecondLevelFault

READ, WRITE, EXECUTE = AccessKind
SUPERVISOR, USER = Privilege.SUPERVISOR, Privilege.USER

PG, WP = 1 << 31, 1 << 16
PSE, PAE, PGE, LA57, SMEP = 1 << 4, 1 << 5, 1 << 7, 1 << 12, 1 << 20
LMA, NXE = 1 << 10, 1 << 11

P, RW, US, A, D, PS, G, XD = 1, 2, 4, 0x20, 0x40, 0x80, 0x100, 1 << 63
ALL = P | RW | US

# name: (cr4, efer, entry size, level shifts); the PDPTE registers of PAE are not a level of the walk.
MODES = {
    "32-bit": (PSE, 0, 4, (22, 12)),
    "PAE": (PAE, NXE, 8, (21, 12)),
    "4-level": (PAE, LMA | NXE, 8, (39, 30, 21, 12)),
    "5-level": (PAE | LA57, LMA | NXE, 8, (48, 39, 30, 21, 12)),
}
LINEAR = {"32-bit": 0x4567_8ABC, "PAE": 0x4567_8ABC, "4-level": 0x1234_4567_8ABC, "5-level": 0xAB_1234_4567_8ABC}
ROOT = 0x1000


class Guest:
    """Page tables at ROOT, ROOT + 0x1000, ... that map one linear address through all levels."""

    def __init__(self, mode, frame=0x9000, *, width=46, flags=ALL, leaf_flags=None, stop=None, **registers):
        cr4, efer, self.entry_size, shifts = MODES[mode]
        self.mode = mode
        self.memory = PhysicalMemory(1 << 20)
        self.linear = LINEAR[mode]
        self.shifts = shifts[: shifts.index(stop) + 1] if stop else shifts
        self.entries = []
        for level, shift in enumerate(self.shifts):
            index = self.linear >> shift & (0x3FF if self.entry_size == 4 else 0x1FF)
            self.entries.append(ROOT + level * 0x1000 + index * self.entry_size)
            last = level == len(self.shifts) - 1
            page_size = PS if last and shift != 12 else 0
            value = frame | page_size | (leaf_flags or flags) if last else (ROOT + (level + 1) * 0x1000) | flags
            self.set(level, value)
        pdptrs = [0, 0, 0, 0]
        if mode == "PAE":
            pdptrs[self.linear >> 30] = ROOT | P
        values = {"cr0": PG | WP, "cr3": ROOT, "cr4": cr4, "efer": efer, "pdptrs": tuple(pdptrs)}
        values |= {"physical_address_width": width}
        self.context = PagingContext(**(values | registers))

    def get(self, level):
        read = self.memory.read_u64 if self.entry_size == 8 else self.memory.read_u32
        return read(self.entries[level])

    def set(self, level, value):
        write = self.memory.write_u64 if self.entry_size == 8 else self.memory.write_u32
        write(self.entries[level], value)

    def walk(self, kind=READ, privilege=SUPERVISOR, second_level=None, steps=None):
        second_level = second_level or IdentitySecondLevel()
        return walk(self.context, self.linear, kind, privilege, self.memory, second_level, steps)


def error_code(result):
    assert isinstance(result, PageFault), result
    return result.error_code


@pytest.mark.parametrize(
    ("cr0", "cr4", "efer", "mode"),
    [
        (0, PAE, LMA, PagingMode.NONE),
        (PG, 0, 0, PagingMode.BITS_32),
        (PG, PAE, 0, PagingMode.PAE),
        (PG, PAE | LA57, 0, PagingMode.PAE),
        (PG, PAE, LMA, PagingMode.LEVEL_4),
        (PG, PAE | LA57, LMA, PagingMode.LEVEL_5),
    ],
)
def test_paging_mode(cr0, cr4, efer, mode):
    assert paging_mode(cr0, cr4, efer) is mode


@pytest.mark.parametrize("mode", MODES)
def test_small_page(mode):
    guest = Guest(mode)
    result = guest.walk()
    assert isinstance(result, Translation)
    assert (result.physical, result.guest_physical, result.size) == (0x9000, 0x9000, 0x1000)
    assert (result.user, result.writable, result.execute_disable, result.protection_key) == (True, True, False, 0)


@pytest.mark.parametrize(
    ("mode", "stop", "frame", "physical"),
    [
        # Bits of the linear address below the page size select the 4-KByte piece.
        ("32-bit", 22, 0x1_0000_0000 >> 32 << 13 | 0x8040_0000, 0x1_8040_0000 | 0x27_8000),
        ("32-bit", 22, 0xFF << 13 | 0x8040_0000, 0xFF_8040_0000 | 0x27_8000),
        ("PAE", 21, 0x1_0060_0000, 0x1_0060_0000 | 0x07_8000),
        ("4-level", 21, 0x1_0060_0000, 0x1_0060_0000 | 0x07_8000),
        ("4-level", 30, 0x3_4000_0000, 0x3_4000_0000 | 0x0567_8000),
        ("5-level", 30, 0x3_4000_0000, 0x3_4000_0000 | 0x0567_8000),
    ],
)
def test_large_page(mode, stop, frame, physical):
    result = Guest(mode, frame, stop=stop).walk()
    assert isinstance(result, Translation)
    assert result.physical == physical
    assert result.size == 1 << stop


def test_large_page__pat_bit_12_is_no_address_bit():
    result = Guest("4-level", 0x60_0000 | 1 << 12, stop=21).walk()
    assert isinstance(result, Translation)
    assert result.physical == 0x67_8000


def test_32_bit_without_pse_ignores_page_size():
    guest = Guest("32-bit", cr4=0)
    guest.set(0, guest.get(0) | PS)
    result = guest.walk()
    assert isinstance(result, Translation)
    assert result.size == 0x1000


@pytest.mark.parametrize("mode", MODES)
def test_not_present(mode):
    levels = len(MODES[mode][3])
    for level in range(levels):
        guest = Guest(mode)
        guest.set(level, guest.get(level) & ~P)
        assert error_code(guest.walk()) == 0
        assert error_code(guest.walk(WRITE, USER)) == 0b00110
        # With P = 0 all other bits are ignored, reserved ones too.
        guest.set(level, (1 << 8 * guest.entry_size) - 2)
        assert error_code(guest.walk(READ, USER)) == 0b00100


def test_pae_pdpte_register_not_present():
    assert error_code(Guest("PAE", pdptrs=(0, 0, 0, 0)).walk(WRITE)) == 0b00010


def reserved_bits(mode, shift, leaf, width, nxe, page1gb):
    """Typed again from the tables of entry formats: a predicate per bit instead of masks per level."""

    def reserved(bit):
        if mode == "32-bit":
            return leaf and shift == 22 and min(40, width) - 19 <= bit <= 21
        if bit == 63:
            return not nxe
        if bit >= 52:
            return mode == "PAE"
        if bit >= width:
            return True
        if leaf and shift != 12:
            return 13 <= bit < shift
        if bit == 7:
            return shift >= 39 or (shift == 30 and not page1gb)
        return False

    return {bit for bit in range(32 if mode == "32-bit" else 64) if reserved(bit)}


RESERVED_CASES = [
    (mode, stop, width, nxe, page1gb)
    for mode, stops in {
        "32-bit": (12, 22),
        "PAE": (12, 21),
        "4-level": (12, 21, 30),
        "5-level": (12, 21, 30),
    }.items()
    for stop in stops
    for width in (32, 36, 39, 46, 52)
    for nxe in (False, True)
    for page1gb in (True, False)
    if page1gb or stop != 30
]


@pytest.mark.parametrize(("mode", "stop", "width", "nxe", "page1gb"), RESERVED_CASES)
def test_reserved_bits(mode, stop, width, nxe, page1gb):
    efer = MODES[mode][1] & ~NXE | (NXE if nxe else 0)
    guest = Guest(mode, 0, stop=stop, width=width, efer=efer, page1gb=page1gb)
    for level, shift in enumerate(guest.shifts):
        leaf = shift == stop
        expected = reserved_bits(mode, shift, leaf, width, nxe, page1gb)
        original = guest.get(level)
        for bit in range(3, 8 * guest.entry_size):
            becomes_page = bit == 7 and shift in ((21, 22, 30) if page1gb else (21, 22))
            if original >> bit & 1 or becomes_page:
                continue
            guest.set(level, original | 1 << bit)
            steps = []
            result = guest.walk(steps=steps)
            # An address bit may lead the walk astray, to a fault further down: the entry itself must be to blame.
            blamed = len(steps) == level + 1
            is_reserved = blamed and isinstance(result, PageFault) and result.error_code == 0b01001
            assert is_reserved == (bit in expected), f"{mode} shift {shift} bit {bit}"
        guest.set(level, original)


def test_reserved_bit_wins_over_permissions_of_upper_levels():
    guest = Guest("4-level")
    guest.set(0, guest.get(0) & ~US)
    guest.set(3, guest.get(3) | 1 << 50)
    assert error_code(guest.walk(READ, USER)) == 0b01101


def test_one_gigabyte_pages_unsupported():
    assert error_code(Guest("4-level", 0, stop=30, page1gb=False).walk()) == 0b01001


@pytest.mark.parametrize(
    ("cr4", "efer", "reported"),
    [
        (PAE, LMA, False),
        (PAE, LMA | NXE, True),
        (PAE | SMEP, LMA, True),
    ],
)
def test_fetch_is_reported_only_where_it_differs_from_a_read(cr4, efer, reported):
    guest = Guest("4-level", cr4=cr4, efer=efer)
    guest.set(3, 0)
    assert error_code(guest.walk(EXECUTE, USER)) == (0b10100 if reported else 0b00100)
    assert error_code(guest.walk(READ, USER)) == 0b00100


def test_fetch_is_not_reported_without_pae_even_with_nxe():
    guest = Guest("32-bit", efer=NXE)
    guest.set(1, 0)
    assert error_code(guest.walk(EXECUTE, USER)) == 0b00100


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", AccessKind)
def test_flags_are_set_by_a_walk_that_succeeds(mode, kind):
    guest = Guest(mode)
    before = [guest.get(level) for level in range(len(guest.shifts))]
    assert isinstance(guest.walk(kind), Translation)
    leaf = len(before) - 1
    for level, value in enumerate(before):
        dirty = D if level == leaf and kind is WRITE else 0
        assert guest.get(level) == value | A | dirty


@pytest.mark.parametrize("mode", MODES)
def test_flags_are_left_alone_by_a_walk_that_faults(mode):
    guest = Guest(mode, leaf_flags=P)
    before = [guest.get(level) for level in range(len(guest.shifts))]
    assert error_code(guest.walk(WRITE)) == 0b00011
    assert [guest.get(level) for level in range(len(guest.shifts))] == before


def test_flags_survive_in_a_self_referencing_table():
    # One entry serves as all four levels: its flags must add up, whatever order they are set in.
    memory = PhysicalMemory(1 << 16)
    memory.write_u64(ROOT, ROOT | ALL)
    context = PagingContext(PG | WP, ROOT, PAE, LMA, 46)
    result = walk(context, 0, WRITE, SUPERVISOR, memory, IdentitySecondLevel())
    assert isinstance(result, Translation)
    assert result.physical == ROOT
    assert memory.read_u64(ROOT) == ROOT | ALL | A | D


def test_read_of_a_clean_page_does_not_let_writes_pass_unseen():
    guest = Guest("4-level")
    clean = guest.walk(READ)
    assert isinstance(clean, Translation)
    assert not clean.dirty
    assert clean.permissions(guest.context, SUPERVISOR) == READ | EXECUTE
    written = guest.walk(WRITE)
    assert isinstance(written, Translation)
    assert written.dirty
    assert written.permissions(guest.context, SUPERVISOR) == READ | WRITE | EXECUTE
    again = guest.walk(READ)
    assert isinstance(again, Translation)
    assert again.permissions(guest.context, SUPERVISOR) == READ | WRITE | EXECUTE


@pytest.mark.parametrize(("cr4", "flags", "is_global"), [(PGE, G, True), (PGE, 0, False), (0, G, False)])
def test_global(cr4, flags, is_global):
    result = Guest("4-level", leaf_flags=ALL | flags, cr4=PAE | cr4).walk()
    assert isinstance(result, Translation)
    assert result.global_ is is_global


def test_protection_key_is_read_only_in_ia_32e_modes():
    result = Guest("4-level", leaf_flags=ALL | 0xB << 59).walk()
    assert isinstance(result, Translation)
    assert result.protection_key == 0xB
    # In PAE paging the same bits are reserved.
    assert error_code(Guest("PAE", leaf_flags=ALL | 0xB << 59).walk()) == 0b01001


def test_without_paging_addresses_are_32_bits_and_nothing_is_checked():
    context = PagingContext(WP, 0xDEAD_B000, SMEP, 0, 46)
    memory = PhysicalMemory(1 << 16)
    for kind in AccessKind:
        result = walk(context, 0x1_8765_4321, kind, USER, memory, IdentitySecondLevel())
        assert isinstance(result, Translation)
        assert result.physical == 0x8765_4000
        assert result.permissions(context, SUPERVISOR) == READ | WRITE | EXECUTE
        assert not result.global_


def test_fault_carries_the_exact_address():
    guest = Guest("4-level")
    guest.set(3, 0)
    result = guest.walk()
    assert isinstance(result, PageFault)
    assert result.linear == LINEAR["4-level"]


def test_steps_name_every_entry_read():
    guest = Guest("5-level")
    values = [guest.get(level) for level in range(5)]
    steps = []
    guest.walk(steps=steps)
    names = ["PML5E", "PML4E", "PDPTE", "PDE", "PTE"]
    assert steps == [WalkStep(*step) for step in zip(names, guest.entries, values, strict=True)]


def test_steps_end_at_the_entry_that_faults():
    guest = Guest("4-level")
    guest.set(1, 0)
    steps = []
    guest.walk(steps=steps)
    assert [step.name for step in steps] == ["PML4E", "PDPTE"]


def test_tables_outside_memory_read_as_ones():
    # Unbacked memory answers with ones: present, and reserved bits set.
    context = PagingContext(PG, 0x3F_0000_0000, PAE, LMA, 46)
    result = walk(context, 0, READ, SUPERVISOR, PhysicalMemory(1 << 16), IdentitySecondLevel())
    assert error_code(result) == 0b01001


class Refusing(IdentitySecondLevel):
    """A second level that refuses one access: by guest-physical page, and by whether it is an update or the page."""

    def __init__(self, page, what):
        self.page, self.what = page, what

    def paging_structure(self, address, update, linear):
        if address >> 12 == self.page and self.what == ("update" if update else "read"):
            return SecondLevelFault(address, linear)
        return super().paging_structure(address, update, linear)

    def translate(self, address, kind, linear, rights, user=False, shadow_stack=False):
        if address >> 12 == self.page and self.what == "page":
            return SecondLevelFault(address, linear)
        return super().translate(address, kind, linear, rights, user)


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("what", ["read", "update"])
def test_second_level_refuses_a_paging_structure(level, what):
    guest = Guest("4-level")
    result = guest.walk(second_level=Refusing(1 + level, what))
    assert result == SecondLevelFault(guest.entries[level], guest.linear)


def test_second_level_refuses_the_page_after_the_flags_are_set():
    guest = Guest("4-level")
    result = guest.walk(WRITE, second_level=Refusing(9, "page"))
    assert result == SecondLevelFault(0x9ABC, guest.linear)
    assert guest.get(3) & (A | D) == A | D


def test_page_fault_comes_before_the_second_level_sees_the_page():
    guest = Guest("4-level", leaf_flags=P | RW)
    assert error_code(guest.walk(READ, USER, second_level=Refusing(9, "page"))) == 0b00101


def pdpte_memory(entries, base=0x2000):
    memory = PhysicalMemory(1 << 16)
    for index, entry in enumerate(entries):
        memory.write_u64(base + 8 * index, entry)
    return memory


def test_load_pdptrs():
    entries = (0x3001, 0, 0x5019, 0xFFFF_FFFF_FFFF_FFFE)
    # Bits 4:0 of CR3 are ignored, and so is everything above bit 31.
    for cr3 in (0x2000, 0x201F, 0x1_0000_2000):
        assert load_pdptrs(cr3, 46, pdpte_memory(entries), IdentitySecondLevel()) == entries
    assert load_pdptrs(0x2FE0, 46, pdpte_memory(entries, 0x2FE0), IdentitySecondLevel()) == entries


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("bit", range(1, 64))
def test_load_pdptrs__reserved_bits(index, bit):
    entries = [0x3001, 0x3001, 0x3001, 0x3001]
    entries[index] |= 1 << bit
    result = load_pdptrs(0x2000, 40, pdpte_memory(entries), IdentitySecondLevel())
    if bit in (1, 2, 5, 6, 7, 8) or bit >= 40:
        assert result == InvalidPdpte(index, entries[index])
    else:
        assert result == tuple(entries)


def test_load_pdptrs__refused_by_the_second_level_has_no_linear_address():
    result = load_pdptrs(0x2000, 46, pdpte_memory([0] * 4), Refusing(2, "read"))
    assert result == SecondLevelFault(0x2000, None)


@pytest.mark.parametrize(
    ("cr4", "efer", "address", "canonical"),
    [
        (PAE, LMA, 0x7FFF_FFFF_FFFF, True),
        (PAE, LMA, 0x8000_0000_0000, False),
        (PAE, LMA, 0xFFFF_7FFF_FFFF_FFFF, False),
        (PAE, LMA, 0xFFFF_8000_0000_0000, True),
        (PAE | LA57, LMA, 0x8000_0000_0000, True),
        (PAE | LA57, LMA, 0x0100_0000_0000_0000, False),
        (PAE | LA57, LMA, 0xFF00_0000_0000_0000, True),
        (PAE, 0, 0xFFFF_FFFF, True),
    ],
)
def test_is_canonical(cr4, efer, address, canonical):
    assert is_canonical(PagingContext(PG, 0, cr4, efer, 46), address) is canonical
