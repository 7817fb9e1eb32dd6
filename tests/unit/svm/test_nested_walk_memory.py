"""Walks under nested paging that are remembered give what a walk would give, whatever happens to entries."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtx.svm.nested_paging import NestedPaging
from vtx.x86 import mmu as mmu_module
from vtx.x86.memory import PhysicalMemory
from vtx.x86.mmu import Grant, Mmu
from vtx.x86.second_level import AccessKind
from vtx.x86.state import CpuState

READ, WRITE, EXECUTE = AccessKind
P, RW, US, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
ALL = P | RW | US | A | D

# Guest tables at guest-physical 11000H and on, nested tables at physical 1000H and on. Guest-physical pages 10H to 1FH
# are at physical 20H to 2FH, and the data pages 8 and 9 at 18H and 19H.
NESTED, GUEST, OFFSET = 0x1000, 0x1_1000, 0x1_0000
NESTED_LEAVES = NESTED + 0x3000
LINEAR = 0x7000


def entries() -> list[int]:
    """Physical addresses of all entries that the walk for `LINEAR` uses."""
    guest = [GUEST + OFFSET + 0x1000 * level for level in range(3)] + [GUEST + OFFSET + 0x3000 + 8 * 7]
    nested = [NESTED, NESTED + 0x1000, NESTED + 0x2000]
    return guest + nested + [NESTED_LEAVES + 8 * page for page in (0x11, 0x12, 0x13, 0x14, 8, 9)]


class Rig:
    """A guest and its MMU, all of whose translations are dropped before each access, as TLB_CONTROL can ask for."""

    def __init__(self) -> None:
        self.memory = PhysicalMemory(1 << 20)
        write = self.memory.write_u64
        for level in range(3):
            write(GUEST + OFFSET + 0x1000 * level, GUEST + 0x1000 * (level + 1) | P | RW | US | A)
            write(NESTED + 0x1000 * level, NESTED + 0x1000 * (level + 1) | P | RW | US | A)
        write(GUEST + OFFSET + 0x3000 + 8 * 7, 0x8000 | ALL)
        for page in range(0x20):
            write(NESTED_LEAVES + 8 * page, (page << 12) + OFFSET | ALL)
        self.host = CpuState(cr0=0x8001_0001, cr3=0, cr4=0x20, efer=0xD00)
        self.state = CpuState(cr0=0x8001_0001, cr3=GUEST, cr4=0x20, efer=0xD00)
        self.mmu, self.nested = self.new(self.memory)

    def new(self, memory: PhysicalMemory) -> tuple[Mmu, NestedPaging]:
        nested = NestedPaging(NESTED, self.host, memory, 48, page1gb=True, gmet=False)
        mmu = Mmu(memory, 48, amd=True)
        mmu.second_level, mmu.asid = nested, 1
        mmu.update(self.state)
        return mmu, nested

    def fill(self, kind: AccessKind = READ, *, vmrun: bool = True) -> object:
        self.mmu.flush_asid(None)
        if vmrun:
            self.nested.begin()
        return self.mmu.fill(LINEAR, kind, 0, False)

    def plain(self, kind: AccessKind = READ) -> object:
        """The same access by an MMU that remembers nothing, on a copy of the memory."""
        copy = PhysicalMemory(1 << 20)
        copy.write(0, self.memory.read(0, 1 << 20))
        result = self.new(copy)[0].fill(LINEAR, kind, 0, False)
        self.expected = copy
        return result


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each walk of the guest's tables."""
    seen: list[int] = []
    real = mmu_module.walk

    def counted(*arguments: object) -> object:
        seen.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(mmu_module, "walk", counted)
    return seen


def test_repeated_access__walks_no_more(walks: list[int]) -> None:
    rig = Rig()
    assert [rig.fill() for _ in range(8)] == [Grant(0x18, READ | WRITE | EXECUTE)] * 8
    assert len(walks) <= 3


@pytest.mark.parametrize("address", entries())
@pytest.mark.parametrize("change", [P, RW, A, 0x1000, NX])
def test_any_entry_that_changed__counts(address: int, change: int) -> None:
    rig = Rig()
    for _ in range(4):
        rig.fill()
    rig.memory.write_u64(address, rig.memory.read_u64(address) ^ change)
    for kind in (READ, WRITE, EXECUTE):
        assert (rig.plain(kind), rig.fill(kind)) == (rig.fill(kind), rig.plain(kind))
        assert rig.memory.read(0, 1 << 20) == rig.expected.read(0, 1 << 20)


def test_table_that_was_found_before_its_page_moved__is_looked_for_anew() -> None:
    """Until the next VMRUN a processor may go on with where a table was; what it remembers beyond that is right."""
    rig = Rig()
    for _ in range(4):
        rig.fill()
    rig.mmu.fill(LINEAR - 0x1000, READ, 0, False)  # not mapped, but now it is known where the tables are
    moved = NESTED_LEAVES + 8 * 0x14  # the page of the last guest table
    rig.memory.write_u64(moved, 0x3_0000 | ALL)
    rig.memory.write_u64(0x3_0000 + 8 * 7, 0x9000 | ALL)
    rig.memory.write_u64(GUEST + OFFSET + 0x2000 + 8, GUEST + 0x3000 | P | RW | US | A)
    for _ in range(3):  # data accesses to the page of the table have its new place remembered, walks use the old one
        assert rig.fill(vmrun=False) == Grant(0x18, READ | WRITE | EXECUTE)
        rig.nested.translate(GUEST + 0x3000, READ, LINEAR, 7)  # type: ignore[arg-type]
    assert rig.fill() == Grant(0x19, READ | WRITE | EXECUTE)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(entries()),
            st.sampled_from((0, P, RW, US, A, D, PS, NX, 0x1000, 0x8000, 1 << 51)),
            st.sampled_from((READ, WRITE, EXECUTE)),
        ),
        max_size=12,
    )
)
def test_agrees_with_walking(changes: list[tuple[int, int, AccessKind]]) -> None:
    rig = Rig()
    for _ in range(4):
        rig.fill()
    for address, change, kind in changes:
        rig.memory.write_u64(address, rig.memory.read_u64(address) ^ change)
        for _ in range(3):
            expected = rig.plain(kind)
            assert rig.fill(kind) == expected
            assert rig.memory.read(0, 1 << 20) == rig.expected.read(0, 1 << 20)
