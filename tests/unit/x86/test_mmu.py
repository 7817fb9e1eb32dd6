"""The MMU: fills, the model's own accesses, and when cached translations die."""

import pytest

from vtx.x86.memory import PhysicalMemory
from vtx.x86.mmu import Grant, Mmu
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.page_rights import Privilege
from vtx.x86.paging import Translation
from vtx.x86.second_level import AccessKind, IdentitySecondLevel, SecondLevelFault
from vtx.x86.state import CpuState
from vtx.x86.tlb import Tlb

READ, WRITE, EXECUTE = AccessKind
PE, WP, PG = 1, 1 << 16, 1 << 31
PSE, PAE, PGE, PCIDE, SMEP, SMAP, PKE = 1 << 4, 1 << 5, 1 << 7, 1 << 17, 1 << 20, 1 << 21, 1 << 22
LME, LMA, NXE = 1 << 8, 1 << 10, 1 << 11
P, RW, US, A, D, PS, G = 1, 2, 4, 0x20, 0x40, 0x80, 0x100

ROOT, OTHER_ROOT = 0x1000, 0x2000
PAGE_TABLE = 0x5000
BASE = 0x7F12_3460_0000  # what the page table maps: 2 MBytes from here


def long_mode_state(**changes):
    state = CpuState(cr0=PE | PG | WP, cr3=ROOT, cr4=PAE, efer=LME | LMA | NXE)
    for name, value in changes.items():
        setattr(state, name, value)
    return state


class Rig:
    """An MMU in 4-level paging: BASE + n pages through the page table; two roots that share all below."""

    def __init__(self, **changes):
        self.memory = PhysicalMemory(4 << 20)
        self.flushes = []
        self.mmu = Mmu(self.memory, 46, flush_engine=self.flushes.append)
        for root in (ROOT, OTHER_ROOT):
            self.entry(root, 39, 0x3000 | P | RW | US)
        self.entry(0x3000, 30, 0x4000 | P | RW | US)
        self.entry(0x4000, 21, PAGE_TABLE | P | RW | US)
        self.state = long_mode_state(**changes)
        self.mmu.update(self.state)
        self.flushes.clear()

    def entry(self, table, shift, value):
        self.memory.write_u64(table + (BASE >> shift & 0x1FF) * 8, value)

    def map(self, page, value):
        self.memory.write_u64(PAGE_TABLE + 8 * page, value)
        return BASE + 0x1000 * page

    def pte(self, page):
        return self.memory.read_u64(PAGE_TABLE + 8 * page)

    def fill(self, page, kind=READ, cpl=0, ac=False):
        return self.mmu.fill(BASE + 0x1000 * page, kind, cpl, ac)


def aborts_with(call):
    with pytest.raises(InstructionAborted) as caught:
        call()
    return caught.value.cause


def test_reset_state_is_identity():
    mmu = Mmu(PhysicalMemory(1 << 20), 46)
    assert mmu.fill(0x8_1234, EXECUTE, 0, False) == Grant(0x81, READ | WRITE | EXECUTE)
    assert mmu.fill(0xFFFF_FFF0, READ, 0, False) == Grant(0xF_FFFF, READ | WRITE | EXECUTE)


def test_fill_grants_writes_only_once_dirty():
    rig = Rig()
    rig.map(0, 0x9000 | P | RW | US)
    assert rig.fill(0) == Grant(9, READ | EXECUTE)
    assert rig.pte(0) & (A | D) == A
    grant = rig.fill(0, WRITE)
    assert grant == Grant(9, READ | WRITE | EXECUTE)
    assert (grant.readable, grant.writable, grant.executable) == (True, True, True)
    assert rig.pte(0) & (A | D) == A | D
    assert rig.fill(0, READ) == Grant(9, READ | WRITE | EXECUTE)


def test_fill_refuses_with_the_exact_page_fault():
    rig = Rig()
    rig.map(0, 0x9000 | P | RW)
    assert rig.mmu.fill(BASE + 0x123, WRITE, 3, False) == Fault(Vector.PF, 0b00111, BASE + 0x123)
    assert rig.fill(1, EXECUTE) == Fault(Vector.PF, 0b10000, BASE + 0x1000)


@pytest.mark.parametrize("linear", [1 << 47, 0xFFFF_7FFF_FFFF_FFFF, 1 << 63])
def test_fill_of_a_non_canonical_address(linear):
    assert Rig().mmu.fill(linear, READ, 0, False) == Fault(Vector.GP, 0)


def test_fill_respects_the_privilege_of_each_request():
    rig = Rig(cr4=PAE | SMAP | SMEP)
    rig.map(0, 0x9000 | P | RW | US | A | D)
    rig.map(1, 0xA000 | P | RW | A | D)
    assert rig.fill(0, READ, 3) == Grant(9, READ | WRITE | EXECUTE)
    assert rig.fill(0, READ, 0) == Fault(Vector.PF, 0b00001, BASE)
    assert rig.fill(0, READ, 0, True) == Grant(9, READ | WRITE)
    assert rig.fill(0, EXECUTE, 0, True) == Fault(Vector.PF, 0b10001, BASE)
    assert rig.fill(1, READ, 0) == Grant(10, READ | WRITE | EXECUTE)
    assert rig.fill(1, READ, 3) == Fault(Vector.PF, 0b00101, BASE + 0x1000)
    # A descriptor-table access by code at CPL 3.
    assert rig.mmu.fill(BASE + 0x1000, READ, 3, False, implicit=True) == Grant(10, READ | WRITE | EXECUTE)
    assert rig.mmu.fill(BASE, READ, 3, True, implicit=True) == Fault(Vector.PF, 0b00001, BASE)


def test_stale_until_invalidated_then_fresh():
    rig = Rig()
    rig.map(0, 0x9000 | P | RW | US | A | D)
    rig.fill(0)
    rig.map(0, 0xA000 | P | RW | US | A | D)
    assert rig.fill(0).physical_page == 9
    rig.mmu.invlpg(BASE + 0xFFF)
    assert rig.fill(0).physical_page == 10
    assert rig.flushes == [BASE >> 12]


def test_raising_rights_needs_no_invalidation():
    rig = Rig()
    rig.map(0, 0)
    assert isinstance(rig.fill(0), Fault)
    rig.map(0, 0x9000 | P | US | 1 << 63)
    assert rig.fill(0) == Grant(9, READ)
    assert isinstance(rig.fill(0, WRITE), Fault)
    rig.map(0, 0x9000 | P | RW | US | D)
    assert rig.fill(0, WRITE) == Grant(9, READ | WRITE | EXECUTE)


def test_page_fault_drops_the_stale_translation():
    rig = Rig()
    rig.map(0, 0x9000 | P | US | A)
    rig.fill(0)
    rig.map(0, 0)
    assert rig.fill(0) == Grant(9, READ | EXECUTE)
    assert isinstance(rig.fill(0, WRITE), Fault)
    assert isinstance(rig.fill(0), Fault)


def cached(rig, page=0):
    return rig.mmu.tlb.find(BASE + 0x1000 * page >> 12) is not None


def test_mov_to_cr3_without_pcid_keeps_globals_only():
    rig = Rig(cr4=PAE | PGE)
    rig.map(0, 0x9000 | P | G)
    rig.map(1, 0xA000 | P)
    rig.fill(0)
    rig.fill(1)
    rig.mmu.cr3_written(rig.state)
    assert (cached(rig, 0), cached(rig, 1)) == (True, False)
    assert None in rig.flushes


def test_mov_to_cr3_with_pcid():
    rig = Rig(cr4=PAE | PCIDE, cr3=ROOT | 1)
    rig.map(0, 0x9000 | P)
    rig.fill(0)
    rig.state.cr3 = OTHER_ROOT | 2
    rig.mmu.cr3_written(rig.state)
    assert not cached(rig)
    rig.fill(0)
    rig.state.cr3 = ROOT | 1
    rig.mmu.cr3_written(rig.state, preserve=True)
    assert cached(rig)
    rig.state.cr3 = OTHER_ROOT | 2
    rig.mmu.cr3_written(rig.state)
    assert not cached(rig)


@pytest.mark.parametrize(
    ("register", "old", "new", "drops"),
    [
        ("cr0", PE | PG | WP, PE | PG, False),
        ("cr0", PE | PG, PE | PG | WP, False),
        ("cr4", PAE, PAE | PGE, True),
        ("cr4", PAE | PGE, PAE, True),
        ("cr4", PAE, PAE | PSE, True),
        ("cr4", PAE | PCIDE, PAE, True),
        ("cr4", PAE, PAE | PCIDE, False),
        ("cr4", PAE, PAE | SMEP, True),
        ("cr4", PAE | SMEP, PAE, False),
        ("cr4", PAE, PAE | SMAP, False),
        ("cr4", PAE, PAE | PKE, False),
        ("efer", LME | LMA | NXE, LME | LMA, True),
    ],
)
def test_control_register_changes(register, old, new, drops):
    rig = Rig(**{register: old})
    rig.map(0, 0x9000 | P | G)
    rig.fill(0)
    rig.flushes.clear()
    setattr(rig.state, register, new)
    rig.mmu.controls_written(rig.state)
    assert cached(rig) is not drops
    assert None in rig.flushes


def test_leaving_paging_drops_everything():
    rig = Rig(cr4=PAE | PGE)
    rig.map(0, 0x9000 | P | G)
    rig.fill(0)
    rig.state.cr0, rig.state.efer = PE, LME
    rig.mmu.controls_written(rig.state)
    assert len(rig.mmu.tlb) == 0


def test_protection_keys_act_without_any_invalidation():
    rig = Rig(cr4=PAE | PKE)
    rig.map(0, 0x9000 | P | RW | US | A | D | 3 << 59)
    assert rig.fill(0) == Grant(9, READ | WRITE | EXECUTE)
    rig.flushes.clear()
    rig.state.pkru = 2 << 6
    rig.mmu.update(rig.state)
    assert rig.flushes == [None]
    assert rig.fill(0) == Grant(9, READ | EXECUTE)
    assert rig.fill(0, WRITE) == Fault(Vector.PF, 0b100011, BASE)


def test_update_without_a_change_leaves_the_engine_alone():
    rig = Rig()
    rig.state.cr0 |= 8  # CR0.TS does not matter to paging
    rig.mmu.update(rig.state)
    assert rig.flushes == []


def test_invlpg_of_a_large_page_flushes_all_its_pieces_from_the_engine():
    rig = Rig()
    rig.entry(0x4000, 21, 0x20_0000 | PS | P | RW | US)
    rig.fill(3)
    rig.mmu.invlpg(BASE + 0x1000)
    assert rig.flushes == [None]
    assert not cached(rig, 3)
    rig.mmu.invlpg(BASE)
    assert rig.flushes == [None, BASE >> 12]


def test_invlpg_of_a_large_page_the_tlb_has_evicted_still_flushes_the_engine():
    rig = Rig()
    rig.mmu.tlb = Tlb(capacity=2)
    rig.mmu.tlb.select(rig.mmu.tlb.tag)
    rig.entry(0x4000, 21, 0x20_0000 | PS | P | RW | US)
    for page in range(8):
        rig.fill(page)
    rig.entry(0x4000, 21, PAGE_TABLE | P | RW | US)
    rig.mmu.invlpg(BASE)
    assert rig.flushes == [None]


def test_invlpg_after_more_large_pages_than_are_noted_flushes_everything():
    mmu = Mmu(PhysicalMemory(1 << 20), 46, flush_engine=(flushes := []).append)
    memory = mmu.memory
    # Every entry of the one table maps a 2-MByte page, whatever the upper indices are.
    for index in range(512):
        memory.write_u64(0x1000 + 8 * index, 0x2000 | P | RW)
        memory.write_u64(0x2000 + 8 * index, 0x3000 | P | RW)
        memory.write_u64(0x3000 + 8 * index, PS | P | RW)
    mmu.update(long_mode_state())
    for region in range(5000):
        assert isinstance(mmu.fill(region << 21, READ, 0, False), Grant)
    flushes.clear()
    mmu.invlpg(4999 << 21)
    assert flushes == [None]


@pytest.mark.parametrize("kind", range(4))
def test_invpcid(kind):
    rig = Rig(cr4=PAE | PCIDE | PGE, cr3=ROOT | 1)
    rig.map(0, 0x9000 | P)
    rig.map(1, 0xA000 | P | G)
    rig.map(2, 0xB000 | P)
    for page in range(3):
        rig.fill(page)
    rig.flushes.clear()
    rig.mmu.invpcid(kind, 1, BASE)
    left = [cached(rig, page) for page in range(3)]
    assert left == {0: [0, 1, 1], 1: [0, 1, 0], 2: [0, 0, 0], 3: [0, 1, 0]}[kind]
    assert rig.flushes == [None]


class Offset(IdentitySecondLevel):
    """A second level that moves guest-physical addresses up by 1 MByte and refuses one page."""

    def __init__(self, tag, refused=None):
        self._tag, self.refused = tag, refused

    @property
    def tag(self):
        return self._tag

    def paging_structure(self, address, update, linear):
        return address + (1 << 20)

    def translate(self, address, kind, linear, rights, user=False):
        if address >> 12 == self.refused:
            return SecondLevelFault(address, linear)
        return super().translate(address + (1 << 20), kind, linear, rights, user)


def enter_guest(rig, asid, flush, second_level):
    """A guest with paging disabled, and pages cached in it and in the host."""
    rig.map(0, 0x9000 | P)
    rig.fill(0)
    guest = CpuState()
    rig.mmu.vm_transition(guest, second_level, asid, flush=flush)
    return guest


def test_vm_transitions_with_identifiers_keep_everything():
    rig = Rig()
    second_level = Offset(0x10_0000)
    guest = enter_guest(rig, 1, False, second_level)
    assert rig.mmu.fill(0x2000, READ, 0, False) == Grant(0x102, 7)
    rig.mmu.vm_transition(rig.state, IdentitySecondLevel(), 0, flush=False)
    assert cached(rig)
    rig.mmu.vm_transition(guest, second_level, 1, flush=False)
    assert rig.mmu.tlb.find(2) is not None
    rig.mmu.invvpid(1, 1, 0)
    assert rig.mmu.tlb.find(2) is not None  # a guest-physical mapping: INVEPT's business
    rig.mmu.invept(1, 0x10_001E)
    assert rig.mmu.tlb.find(2) is None


def test_vm_transitions_without_identifiers_flush():
    rig = Rig()
    enter_guest(rig, 0, True, Offset(0x10_0000))
    rig.mmu.vm_transition(rig.state, IdentitySecondLevel(), 0, flush=True)
    assert not cached(rig)


@pytest.mark.parametrize(("kind", "left"), [(0, [1, 0, 1, 1]), (1, [1, 0, 0, 1]), (2, [1, 0, 0, 0]), (3, [1, 0, 0, 1])])
def test_invvpid(kind, left):
    rig = Rig()
    rig.map(0, 0x9000 | P)
    rig.map(1, 0xA000 | P)
    identity = IdentitySecondLevel()
    for vpid, page in ((0, 0), (7, 0), (7, 1), (8, 0)):
        rig.mmu.vm_transition(rig.state, identity, vpid, flush=False)
        rig.fill(page)
    rig.mmu.invvpid(kind, 7, BASE)
    found = []
    for vpid, page in ((0, 0), (7, 0), (7, 1), (8, 0)):
        rig.mmu.vm_transition(rig.state, identity, vpid, flush=False)
        found.append(cached(rig, page))
    assert found == left


def test_second_level_fault_reaches_both_users():
    rig = Rig()
    enter_guest(rig, 1, False, Offset(0x10_0000, refused=4))
    assert rig.mmu.fill(0x4567, READ, 0, False) == SecondLevelFault(0x4567, 0x4567)
    assert aborts_with(lambda: rig.mmu.read(0x4FFF, 1)) == SecondLevelFault(0x4FFF, 0x4FFF)


def test_read_and_write():
    rig = Rig()
    linear = rig.map(0, 0x9000 | P | RW | US)
    rig.mmu.write(linear + 8, 4, 0x1_2345_6789)
    assert rig.mmu.read(linear + 8, 4) == 0x2345_6789
    assert rig.memory.read_u64(0x9008) == 0x2345_6789
    rig.mmu.write_bytes(linear, b"abc")
    assert rig.mmu.read_bytes(linear, 3) == b"abc"
    assert rig.mmu.translate(linear + 0x123, READ) == 0x9123


def test_access_across_pages():
    rig = Rig()
    linear = rig.map(0, 0x9000 | P | RW | US)
    rig.map(1, 0xB000 | P | RW | US)
    rig.mmu.write(linear + 0xFFD, 8, 0x8877_6655_4433_2211)
    assert rig.memory.read(0x9FFD, 3) == bytes.fromhex("112233")
    assert rig.memory.read(0xB000, 5) == bytes.fromhex("4455667788")
    assert rig.mmu.read(linear + 0xFFD, 8) == 0x8877_6655_4433_2211


def test_write_across_pages_is_all_or_nothing():
    rig = Rig()
    linear = rig.map(0, 0x9000 | P | RW | US)
    rig.map(1, 0xB000 | P | US)
    fault = aborts_with(lambda: rig.mmu.write(linear + 0xFFE, 4, 0xFFFF_FFFF))
    # The address reported is that of the first byte that cannot be written.
    assert fault == Fault(Vector.PF, 0b00011, linear + 0x1000)
    assert rig.memory.read(0x9FFE, 2) == bytes(2)
    assert aborts_with(lambda: rig.mmu.check(linear + 0xFFE, 4, WRITE)) == fault
    rig.mmu.check(linear + 0xFFE, 4, READ)


def test_bytes_over_many_pages():
    rig = Rig()
    for page in range(4):
        rig.map(page, 0x1_0000 + 0x2000 * page | P | RW)
    data = bytes(range(256)) * 40
    rig.mmu.write_bytes(BASE + 0x800, data)
    assert rig.mmu.read_bytes(BASE + 0x800, len(data)) == data
    assert rig.memory.read(0x1_2000, 4) == data[0x800:0x804]


def test_privilege_of_the_models_accesses():
    rig = Rig(cr4=PAE | SMAP)
    user, supervisor = rig.map(0, 0x9000 | P | RW | US), rig.map(1, 0xA000 | P | RW)
    assert rig.mmu.read(user, 1, user=True) == 0
    assert aborts_with(lambda: rig.mmu.read(user, 1)) == Fault(Vector.PF, 0b00001, user)
    assert rig.mmu.read(user, 1, ac=True) == 0
    assert aborts_with(lambda: rig.mmu.write(supervisor, 1, 0, user=True)) == Fault(Vector.PF, 0b00111, supervisor)
    rig.mmu.write(supervisor, 1, 0)


def test_access_to_a_non_canonical_address():
    assert aborts_with(lambda: Rig().mmu.read(1 << 47, 1)) == Fault(Vector.GP, 0)


def test_access_that_leaves_the_canonical_half():
    rig = Rig()
    rig.memory.write_u64(ROOT + 0xFF * 8, 0x3000 | P | RW | US)
    rig.memory.write_u64(0x3000 + 0x1FF * 8, 0x4000 | P | RW | US)
    rig.memory.write_u64(0x4000 + 0x1FF * 8, PAGE_TABLE | P | RW | US)
    rig.map(0x1FF, 0x9000 | P | RW | US)
    assert rig.mmu.read(0x7FFF_FFFF_FFFC, 4) == 0
    assert aborts_with(lambda: rig.mmu.read(0x7FFF_FFFF_FFFD, 4)) == Fault(Vector.GP, 0)


def test_addresses_wrap_at_4_gbytes_outside_ia_32e_mode():
    memory = PhysicalMemory(1 << 20)
    mmu = Mmu(memory, 46)
    memory.write(0, b"\x34\x12")
    assert mmu.read(0x1_0000_0000, 2) == 0x1234
    assert mmu.read(0xFFFF_FFFE, 4) == 0x1234_FFFF
    assert mmu.fill(0x1_0000_0000, READ, 0, False) == Grant(0, 7)


def test_addresses_wrap_at_64_bits():
    rig = Rig()
    for root_index, table in ((0x1FF, 0x3000), (0, 0x3000)):
        rig.memory.write_u64(ROOT + root_index * 8, table | P | RW | US)
    for index in (0x1FF, 0):
        rig.memory.write_u64(0x3000 + index * 8, 0x4000 | P | RW | US)
        rig.memory.write_u64(0x4000 + index * 8, PAGE_TABLE | P | RW | US)
    rig.map(0x1FF, 0x9000 | P)
    rig.map(0, 0xA000 | P)
    rig.memory.write(0x9FFF, b"\x01")
    rig.memory.write(0xA000, b"\x02")
    assert rig.mmu.read(0xFFFF_FFFF_FFFF_FFFF, 2) == 0x0201


def test_load_pdptrs():
    rig = Rig()
    rig.memory.write_u64(0x6000, 0x7001)
    assert rig.mmu.load_pdptrs(0x6000) == (0x7001, 0, 0, 0)
    rig.memory.write_u64(0x6018, 0x7003)
    assert aborts_with(lambda: rig.mmu.load_pdptrs(0x6000)) == Fault(Vector.GP, 0)


def test_load_pdptrs_refused_by_the_second_level():
    rig = Rig()

    class Refuses(IdentitySecondLevel):
        def paging_structure(self, address, update, linear):
            return SecondLevelFault(address, linear)

    rig.mmu.vm_transition(rig.state, Refuses(), 1, flush=False)
    assert aborts_with(lambda: rig.mmu.load_pdptrs(0x6000)) == SecondLevelFault(0x6000, None)


def test_pae_uses_the_loaded_registers_not_memory():
    rig = Rig()
    rig.memory.write_u64(0x6000, 0x7001)
    state = CpuState(cr0=PE | PG, cr3=0x6000, cr4=PAE, pdptrs=[0x8001, 0, 0, 0])
    rig.memory.write_u64(0x8000, PS | P | RW)
    rig.mmu.update(state)
    assert rig.mmu.fill(0x1234, READ, 0, False) == Grant(1, READ | EXECUTE)


def test_trace_walk():
    rig = Rig()
    rig.map(0, 0x9000 | P)
    steps, result = rig.mmu.trace_walk(BASE, READ, Privilege.SUPERVISOR)
    assert [step.name for step in steps] == ["PML4E", "PDPTE", "PDE", "PTE"]
    assert isinstance(result, Translation)


@pytest.mark.parametrize("linear", [-1, 1 << 64, (1 << 64) + 0x1000, -(1 << 70)])
def test_any_integer_is_an_address(linear):
    mmu = Rig().mmu
    assert isinstance(mmu.fill(linear, READ, 0, False), Fault | Grant)
    mmu.invlpg(linear)
